"""TLS over both transports: who is let in, what wrong files are told, and clients that are slow about it."""

import asyncio
import contextlib
import logging
import shutil
import socket
import ssl
import subprocess
import time
import warnings
from types import SimpleNamespace

import grpc
import numpy as np
import pytest

from shared.serving.client import AsyncClient, Client, ServerError
from shared.serving.flags import Flags, parse
from shared.serving.server import Server

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificates")
X = {"x": np.ones((1, 2), np.float32)}
BOTH = pytest.mark.parametrize("over", ["grpc", "rest"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files in PEM: an authority's certificate, keys and certificates that it signed, and some that it did not."""
    root = tmp_path_factory.mktemp("certificates")

    def openssl(*words):
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True, cwd=root)

    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    for authority in ("ca", "other"):
        openssl(*new, "-subj", f"/CN={authority}", "-keyout", f"{authority}.key", "-out", f"{authority}.pem")
    for name, authority in (("server", "ca"), ("client", "ca"), ("stranger", "other")):
        openssl(*new, "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-CA", f"{authority}.pem",
                "-CAkey", f"{authority}.key", "-keyout", f"{name}.key", "-out", f"{name}.pem")  # fmt: skip
    openssl("ec", "-in", "server.key", "-aes256", "-passout", "pass:x", "-out", "encrypted.key")
    (root / "garbage.pem").write_text("no PEM\n")
    return SimpleNamespace(**{path.name.replace(".", "_"): path for path in root.iterdir()})


@pytest.fixture
def config(tmp_path):
    """Write a SSLConfig; values that are paths stand for what is in them."""

    def write(**values):
        lines = []
        for name, value in values.items():
            text = str(value).lower() if value is True else '"' + value.read_text().replace("\n", "\\n") + '"'
            lines.append(f"{name}: {text}\n")
        path = tmp_path / "ssl.config"
        path.write_text("".join(lines))
        return str(path)

    return write


def serving(tree, **changes):
    return Server(Flags(models=str(tree), port=-1, rest_api_port=-1, max_num_load_retries=0, **changes))


def one_way(config, files):
    return config(server_key=files.server_key, server_cert=files.server_pem)


def both_ways(config, files):
    return config(server_key=files.server_key, server_cert=files.server_pem, custom_ca=files.ca_pem, client_verify=True)


def address_of(server, over):
    return server.address if over == "grpc" else f"https://{server.rest_address}"


def refused(address, *certificate):
    with Client(address, certificate=certificate, retries=0, timeout=10) as client, pytest.raises(ServerError) as error:
        client.predict("affine", X)
    assert error.value.code == grpc.StatusCode.UNAVAILABLE
    return error.value.details


@BOTH
def test_a_server_that_says_who_it_is(tree, config, files, over):
    path = one_way(config, files)
    with serving(tree, ssl_config_file=path, rest_ssl_config_file=path) as server:
        address = address_of(server, over)
        with Client(address, certificate=(files.ca_pem,)) as client:
            assert client.predict("affine", X)["y"].tolist() == [[3.0, 3.0]]
            assert client.status("affine") == {1: ("AVAILABLE", "")}
        assert "certificate" in refused(address, files.other_pem).lower()  # nor is another's root taken for ours
        if over == "rest":
            assert "certificate" in refused(address)
            refused(f"http://{server.rest_address}")  # without TLS there is nothing to be had


@BOTH
def test_a_server_that_asks_who_calls(tree, config, files, over):
    path = both_ways(config, files)
    with serving(tree, ssl_config_file=path, rest_ssl_config_file=path) as server:
        address = address_of(server, over)
        with Client(address, certificate=(files.ca_pem, files.client_key, files.client_pem)) as client:
            assert client.predict("affine", X)["y"].tolist() == [[3.0, 3.0]]

        async def ask():
            async with AsyncClient(address, certificate=(files.ca_pem, files.client_key, files.client_pem)) as client:
                return await client.predict("affine", X)

        assert asyncio.run(ask())["y"].tolist() == [[3.0, 3.0]]
        refused(address, files.ca_pem)
        refused(address, files.ca_pem, files.stranger_key, files.stranger_pem)


@BOTH
def test_ask_and_load_from_the_command_line(tree, config, files, over, cornucopia, tmp_path):
    path = both_ways(config, files)
    (tmp_path / "token").write_text("secret")
    with serving(tree, ssl_config_file=path, rest_ssl_config_file=path, token_file=str(tmp_path / "token")) as server:
        flags = (f"--address={address_of(server, over)}", "--token=secret")
        mine = f"--certificate={files.ca_pem},{files.client_key},{files.client_pem}"
        assert "3.0000 3.0000" in cornucopia("ask", "affine", "--x=1,1", *flags, mine).stdout
        assert "errors     none" in cornucopia("load", "affine", "--x=1,1", "--seconds=0.5", *flags, mine).stdout
        for command in ("ask", "load"):
            said = cornucopia(command, "affine", "--x=1,1", *flags, f"--certificate={files.other_pem}", expect=2).stderr
            assert "no server answers at" in said
            assert "certificate" in said.lower()  # and why
    for command in ("ask", "load"):
        told = cornucopia(command, "affine", "--help").stdout
        assert "ROOT,KEY,CERTIFICATE" in told
        assert "authorization: Bearer TOKEN" in told


WRONG_CONFIGS = {
    "nothing": ({}, "must hold server_key and server_cert, in PEM"),
    "no key": ({"server_key": "garbage_pem", "server_cert": "server_pem"}, "are no key and its certificate in PEM"),
    "no certificate": ({"server_key": "server_key", "server_cert": "garbage_pem"}, "are no key and its certificate"),
    "another's key": ({"server_key": "client_key", "server_cert": "server_pem"}, "in PEM: key values mismatch"),
    "a passphrase": ({"server_key": "encrypted_key", "server_cert": "server_pem"}, "without a passphrase"),
    "no authority": ({"server_key": "server_key", "server_cert": "server_pem", "client_verify": True},
                     "has client_verify and no custom_ca"),
    "bad authority": ({"server_key": "server_key", "server_cert": "server_pem", "client_verify": True,
                       "custom_ca": "garbage_pem"}, "custom_ca of .* holds no certificate in PEM"),
}  # fmt: skip


@pytest.mark.parametrize("flag", ["ssl_config_file", "rest_ssl_config_file"])
def test_wrong_configs_are_told(tree, config, files, flag):
    for values, text in WRONG_CONFIGS.values():
        path = config(**{key: getattr(files, value) if value is not True else True for key, value in values.items()})
        with pytest.raises(ValueError, match=text) as error:
            serving(tree, **{flag: path})
        assert path in str(error.value)


def test_a_flag_without_its_port():
    with pytest.raises(ValueError, match="--rest_ssl_config_file is given without --rest_api_port"):
        parse(["--rest_ssl_config_file=x"])


@pytest.mark.parametrize("address", ["127.0.0.1:1", "https://127.0.0.1:1"])
def test_wrong_files_of_a_client_are_told(files, address, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        Client(address, certificate=(tmp_path / "missing",))
    with pytest.raises(ValueError, match=r"garbage.pem holds no certificate in PEM"):
        Client(address, certificate=(files.garbage_pem,))
    with pytest.raises(ValueError, match=r"client.pem are no key and its certificate in PEM: key values mismatch"):
        Client(address, certificate=(files.ca_pem, files.server_key, files.client_pem))


# What must not hold up others.


@pytest.fixture
def running(tree, config, files):
    path = one_way(config, files)
    with serving(tree, rest_ssl_config_file=path, client_header_timeout_seconds=1.0) as server:
        yield server
        with Client(f"https://{server.rest_address}", certificate=(files.ca_pem,), retries=0) as client:
            assert client.predict("affine", X)["y"].tolist() == [[3.0, 3.0]]


@contextlib.contextmanager
def connected(server, files=None):
    """A connection to the REST port; with files TLS over it, else the bare one."""
    host, _, port = server.rest_address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        if not files:
            yield connection
            return
        context = ssl.create_default_context(cafile=files.ca_pem)
        with context.wrap_socket(connection, server_hostname=host) as secure:
            yield secure


def closed_after(connection):
    """Seconds until the server hangs up."""
    begun = time.monotonic()
    with contextlib.suppress(ConnectionResetError, ssl.SSLError):
        while connection.recv(65536):
            pass
    return time.monotonic() - begun


def test_slow_clients_are_hung_up_on(running, files):
    with (
        connected(running) as mute, connected(running) as dripping, connected(running, files) as silent,
        connected(running, files) as half,
    ):  # fmt: skip
        half.sendall(b"POST /v1/models/affine:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        begun = time.monotonic()
        hello = iter(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200))  # the beginning of a ClientHello
        with contextlib.suppress(OSError):
            while time.monotonic() - begun < 10:
                dripping.sendall(bytes([next(hello)]))
                time.sleep(0.2)
        assert 0.5 < time.monotonic() - begun < 5
        for connection in (mute, silent):
            closed_after(connection)
        assert time.monotonic() - begun < 5
        assert b" 504 " in half.recv(65536)


def test_other_protocols_at_the_port(running):
    for said in (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"\x00" * 1000, b"SSH-2.0-x\r\n"):
        with connected(running) as connection:
            connection.sendall(said)
            assert closed_after(connection) < 5


def test_the_end_of_a_server_amid_a_handshake(tree, config, files, caplog):
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        server = serving(tree, rest_ssl_config_file=one_way(config, files))
        with connected(server) as mute, connected(server, files):
            mute.sendall(b"\x16\x03\x01")
            time.sleep(0.1)
            begun = time.monotonic()
            server.stop(5)
            assert time.monotonic() - begun < 4
            closed_after(mute)
    assert not caplog.records
