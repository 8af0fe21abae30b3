"""TLS for both transports and both ends; what is wrong with a key or certificate is told before anything is opened."""

import ssl
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import grpc

from shared.serving.protocol import SSLConfig


def server_context(config: SSLConfig, path: str) -> ssl.SSLContext:
    """What a server of Python's own needs to speak TLS; ValueError where the config that was read from a path is wrong.

    With `client_verify` every client must show a certificate that `custom_ca` has signed.
    """
    if not config.server_key or not config.server_cert:
        raise ValueError(f"{path} must hold server_key and server_cert, in PEM")
    if config.client_verify and not config.custom_ca:
        raise ValueError(f"{path} has client_verify and no custom_ca, against which clients are to be verified")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile("w") as file:  # ssl takes keys from files alone; this one is its owner's to read
        file.write(f"{config.server_key}\n{config.server_cert}\n")
        file.flush()
        _load_pair(context, file.name, file.name, f"server_key and server_cert of {path}")
    if config.client_verify:
        try:
            context.load_verify_locations(cadata=config.custom_ca)
        except ssl.SSLError as error:
            raise ValueError(f"custom_ca of {path} holds no certificate in PEM: {_reason(error)}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def server_credentials(config: SSLConfig, path: str) -> grpc.ServerCredentials:
    """As `server_context`, for gRPC, which itself would only say that it cannot have the port."""
    server_context(config, path)
    pairs = [(config.server_key.encode(), config.server_cert.encode())]
    return grpc.ssl_server_credentials(pairs, config.custom_ca.encode() or None, config.client_verify)


def client_context(files: Sequence[Path]) -> ssl.SSLContext:
    """What a client needs to speak TLS: its `files` are (), (root,) or (root, key, certificate), in PEM.

    Raises:
        ValueError: a file holds something else, or the key and the certificate do not belong together.
        OSError: a file cannot be read.
    """
    for path in files:
        path.open("rb").close()  # ssl would not say which it misses
    try:
        context = ssl.create_default_context(cafile=files[0] if files else None)
    except ssl.SSLError as error:
        raise ValueError(f"{files[0]} holds no certificate in PEM: {_reason(error)}") from error
    if len(files) == 3:
        _load_pair(context, files[2], files[1], f"{files[1]} and {files[2]}")
    return context


def client_credentials(files: Sequence[Path]) -> grpc.ChannelCredentials:
    """As `client_context`, for gRPC."""
    client_context(files)
    return grpc.ssl_channel_credentials(*[path.read_bytes() for path in files])


def _load_pair(context: ssl.SSLContext, certificate: str | Path, key: str | Path, named: str) -> None:
    def refuse() -> NoReturn:  # else OpenSSL would ask for the passphrase at the terminal
        raise ValueError(f"{named}: the key is encrypted; give it without a passphrase")

    try:
        context.load_cert_chain(certificate, key, password=refuse)
    except ssl.SSLError as error:
        raise ValueError(f"{named} are no key and its certificate in PEM: {_reason(error)}") from error


def _reason(error: ssl.SSLError) -> str:
    return error.reason.lower().replace("_", " ") if error.reason else "unreadable"
