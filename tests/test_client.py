"""The client over gRPC and REST, against a server without TensorFlow."""

import asyncio
import inspect
import shutil
import subprocess
import sys
import time

import grpc
import numpy as np
import pytest
import stand_in
from conftest import ROOT

from shared.serving import ask, client, client_rest, protocol
from shared.serving.client import AsyncClient, Client, ServerError

BOTH = pytest.mark.parametrize("over", [stand_in.over_grpc, stand_in.over_rest], ids=["grpc", "rest"])
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@BOTH
def test_plain_values_become_what_the_signature_takes(over):
    with over() as (address, server), Client(address) as one:
        answer = one.predict("adder", {"a": [1, 2.5], "b": 1})
        again = one.predict("adder", {"a": np.array([0.1], np.float32), "b": 0.2})
    assert answer["sum"].dtype == again["sum"].dtype == np.float32
    assert answer["sum"].tolist() == [2.0, 3.5]
    assert answer["text"].tolist() == ["2.0 ü".encode(), "3.5 ü".encode()]
    assert again["sum"].tolist() == [float(np.float32(0.1) + np.float32(0.2))]
    asked = [method for method, _ in server.calls if "etadata" in method]
    assert len(asked) == 1  # what is known is not asked for again


@BOTH
def test_strings_are_exact(over):
    sent = [b"zero at the end\0", b"\xff\x00no text", "grüße", b""]
    with over() as (address, _), Client(address) as one:
        assert one.predict("echo", {"data": sent})["data_bytes"].tolist() == [*sent[:2], "grüße".encode(), b""]
        assert one.predict("echo", {"data": np.array(sent[:2], object)})["data_bytes"].tolist() == sent[:2]


@BOTH
def test_numbers_are_exact(over):
    floats = np.array([0.1, 1e-45, 3.4028235e38, -0.0, np.nan, np.inf, -np.inf], np.float32)
    whole = np.array([[2**63 - 1, -(2**63)]])
    with over() as (address, _), Client(address) as one:
        found = one.predict("adder", {"a": floats, "b": np.float32(0)}, outputs=["sum"])
        wide = one.predict("typed", {"a": whole})
    assert set(found) == {"sum"}
    np.testing.assert_array_equal(found["sum"], floats)
    assert wide["a"].dtype == np.int64
    np.testing.assert_array_equal(wide["a"], whole)
    assert wide["shape"].dtype == np.int32
    assert wide["shape"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.5, 2], "takes int64, not"),
        ([[1], [2, 3]], "inhomogeneous"),
        ([2**70], "takes int64, not"),
        ("x", "not 'x'"),
        (["x", 1], "not 1"),
    ],
)
def test_plain_values_that_do_not_fit_are_refused(value, message):
    with stand_in.over_grpc() as (address, _), Client(address) as one, pytest.raises(ValueError, match=message):
        one.predict("typed", {"a": value})


@BOTH
def test_errors_of_the_server(over):
    with over() as (address, _), Client(address) as one:
        with pytest.raises(ServerError, match=r"NOT_FOUND: Servable not found for request: Latest\(x\)") as error:
            one.predict("x", {"a": 1})
        assert (error.value.code, error.value.details) == (
            grpc.StatusCode.NOT_FOUND,
            "Servable not found for request: Latest(x)",
        )
        with pytest.raises(ServerError, match='Serving signature key "S" not found') as error:
            one.predict("adder", {"a": np.ones(1, np.float32), "b": np.float32(1)}, signature="S")
        assert error.value.code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)
        with pytest.raises(ServerError, match="Unrecognized servable version label: L"):
            one.predict("adder", {"a": np.ones(1, np.float32), "b": np.float32(1)}, label="L")


@BOTH
def test_metadata_and_status(over):
    with over() as (address, _), Client(address) as one:
        assert one.inputs("adder") == {"a": (np.dtype("f4"), (-1,)), "b": (np.dtype("f4"), ())}
        assert one.outputs("adder") == {"sum": (np.dtype("f4"), (-1,)), "text": (np.dtype("O"), (-1,))}
        assert one.signatures("adder") == ["serving_default"]
        assert one.status("adder") == {2: ("AVAILABLE", ""), 1: ("END", "no variables")}
        with pytest.raises(ValueError, match="adder has no signature sing; one of serving_default"):
            one.inputs("adder", signature="sing")


@BOTH
def test_what_was_learnt_is_forgotten_when_a_call_fails(over):
    with over() as (address, server), Client(address, retries=0) as one:
        one.inputs("adder")
        one.outputs("adder")
        assert len(server.calls) == 1
        with pytest.raises(ServerError):
            one.predict("x", {"a": 1})
        server.calls.clear()
        one.inputs("adder")
        assert len(server.calls) == 1


@pytest.mark.parametrize("coroutines", [False, True])
def test_another_version_with_other_outputs_is_learnt_of(coroutines):
    """Over REST an only output comes without its name, so the answer of a version that swapped in does not fit."""

    def older(one):
        one._learnt = {key: {name: type(signature).FromString(signature.SerializeToString())
                             for name, signature in found.items()} for key, found in one._learnt.items()}  # fmt: skip
        for found in one._learnt.values():
            del found["serving_default"].outputs["text"]

    asked = ("adder", {"a": [1.0], "b": 2.0})

    async def both(address):
        async with AsyncClient(address, retries=0) as one:
            await one.predict(*asked)
            older(one)
            with pytest.raises(TypeError):
                await one.predict(*asked)
            return await one.predict(*asked)

    with stand_in.over_rest() as (address, _), Client(address, retries=0) as one:
        if coroutines:
            answer = asyncio.run(both(address))
        else:
            one.predict(*asked)
            older(one)
            with pytest.raises(TypeError):
                one.predict(*asked)
            answer = one.predict(*asked)
    assert answer["sum"].tolist() == [3.0]


@BOTH
def test_versions_and_labels(over):
    sent = {"a": [1.0], "b": 0.0}
    with over() as (address, _), Client(address) as one:
        assert one.predict("adder", sent, version=1)["sum"].tolist() == [1001.0]
        assert one.predict("adder", sent, label="stable")["sum"].tolist() == [1.0]
        with pytest.raises(ValueError, match="by version 1 and by label stable; give one of them"):
            one.predict("adder", sent, version=1, label="stable")


@BOTH
def test_classify_and_regress(over):
    examples = [{"x": 1.1, "n": 2, "s": b"a\0"}, {"x": [2.0], "n": [1, 2], "s": ["u", "v"]}]
    with over() as (address, server), Client(address) as one:
        if over is stand_in.over_rest:
            examples[1]["x"] = 2.0  # the answer of this server is the feature itself
        classes = one.classify("adder", examples)
        assert [[score for _, score in found] for found in classes] == [[float(np.float32(1.1))], [2.0]]
        assert one.regress("adder", [{"x": 0.1}, {"x": 2.0}]) == [float(np.float32(0.1)), 2.0]
    if over is stand_in.over_grpc:
        assert classes[0][0][0] == classes[1][0][0] == "n:int64_list/s:bytes_list/x:float_list"
    assert len(server.calls) == 2


@BOTH
def test_large_batches_go_in_parts_at_once_and_come_back_in_order(over):
    numbers = np.arange(1000, dtype=np.float32)
    with over() as (address, server), Client(address) as one:
        one.inputs("adder")
        server.calls.clear()
        server.wait = 0.3
        begun = time.monotonic()
        found = one.predict("adder", {"a": numbers, "b": np.float32(0.5)}, batch=64)
        assert time.monotonic() - begun < 16 * 0.3  # one after the other they would wait longer
        assert len(server.calls) == 16
        assert 1 < server.most_at_once <= 8
        np.testing.assert_array_equal(found["sum"], numbers + 0.5)
        assert found["text"].shape == (1000,)
        with pytest.raises(ValueError, match=r"output shape of shape \(2,\) has no row for each of 3 examples"):
            one.predict("typed", {"a": np.ones((6, 2), np.int64)}, batch=3)
        with pytest.raises(ValueError, match=r"inputs of one length; batch is 0"):
            one.predict("adder", {"a": numbers, "b": np.float32(0.5)}, batch=0)
        server.failures = [grpc.StatusCode.NOT_FOUND]
        with pytest.raises(ServerError, match="told to fail"):
            one.predict("adder", {"a": numbers, "b": np.float32(0.5)}, batch=64)


@BOTH
def test_messages_of_any_size(over):
    data = [b"\1" * (6 << 20)]  # above the 4 MB that gRPC allows by itself
    with over() as (address, server), Client(address) as one:
        one.inputs("echo")
        server.failures = [UNAVAILABLE]  # and one that is sent again
        assert one.predict("echo", {"data": data})["data_bytes"].tolist() == data


@BOTH
def test_an_unavailable_server_is_asked_again(over):
    with over() as (address, server):
        with Client(address) as one:
            server.failures = [UNAVAILABLE] * 2
            assert one.status("adder")[2] == ("AVAILABLE", "")
            assert len(server.calls) == 3
            server.failures = [grpc.StatusCode.NOT_FOUND]
            with pytest.raises(ServerError, match="told to fail"):  # no retry mends this
                one.status("adder")
            assert len(server.calls) == 4
        with Client(address, retries=0) as one:
            server.failures = [UNAVAILABLE]
            with pytest.raises(ServerError) as error:
                one.status("adder")
            assert error.value.code == UNAVAILABLE


def test_pauses_double_to_a_bound():
    drawn = [list(client.pauses(8)) for _ in range(50)]
    for number, most in enumerate([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]):
        assert 0.5 * most < max(pauses[number] for pauses in drawn) <= most


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_no_server(scheme):
    with Client(f"{scheme}127.0.0.1:1", retries=1) as one, pytest.raises(ServerError) as error:
        one.predict("adder", {"a": 1})
    assert error.value.code == UNAVAILABLE


@BOTH
def test_deadlines(over):
    sent = {"a": np.ones(1, np.float32), "b": np.float32(1)}
    with over() as (address, server), Client(address) as one:
        one.inputs("adder")
        server.wait = 5.0
        begun = time.monotonic()
        with pytest.raises(ServerError) as error:
            one.predict("adder", sent, timeout=0.1)
        assert error.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - begun < 4.5


@BOTH
def test_a_token_is_sent_with_every_call(over):
    with over() as (address, server), Client(address, token="secret") as one:
        one.predict("adder", {"a": [1.0], "b": 1.0})
    assert [headers["authorization"] for _, headers in server.calls] == ["Bearer secret"] * 2


@BOTH
def test_coroutines_do_the_same(over):
    async def ask_all(address):
        async with AsyncClient(address) as one:
            several = [one.predict("adder", {"a": [float(number)], "b": 1}) for number in range(5)]
            found = await asyncio.gather(*several)
            large = await one.predict("adder", {"a": np.arange(100, dtype=np.float32), "b": 0.0}, batch=9)
            with pytest.raises(ServerError, match="NOT_FOUND"):
                await one.predict("x", {"a": 1})
            return found, large, await one.status("adder"), await one.inputs("adder")

    with over() as (address, server):
        server.failures = [UNAVAILABLE]
        found, large, status, inputs = asyncio.run(ask_all(address))
    assert [answer["sum"].tolist() for answer in found] == [[number + 1.0] for number in range(5)]
    np.testing.assert_array_equal(large["sum"], np.arange(100))
    assert status[1] == ("END", "no variables")
    assert inputs["b"] == (np.dtype("f4"), ())


def test_addresses_and_certificates():
    with pytest.raises(ValueError, match="ftp://x is no address"):
        Client("ftp://x")
    with pytest.raises(ValueError, match=r"not 2 files"):
        Client(certificate=("a", "b"))
    with pytest.raises(ValueError, match="has no TLS"):
        Client("http://x", certificate=("a",))
    with stand_in.over_grpc() as (address, _), Client(f"grpc://{address}") as one:
        assert one.signatures("adder") == ["serving_default"]


@BOTH
@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_tls_both_ways(over, tmp_path):
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    options = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=test"]
    extensions = ["subjectAltName=IP:127.0.0.1", "keyUsage=critical,digitalSignature,keyCertSign"]
    options += [word for extension in extensions for word in ("-addext", extension)]
    subprocess.run(["openssl", *options, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    with over(files=(key, certificate)) as (address, _):
        with Client(address, certificate=(certificate, key, certificate)) as one:
            assert one.predict("adder", {"a": [1.0], "b": 1.0})["sum"].tolist() == [2.0]
        with Client(address, certificate=(certificate,), retries=0) as one, pytest.raises(ServerError) as error:
            one.status("adder")  # does not say who it is
        assert error.value.code == UNAVAILABLE


def test_names_cannot_leave_their_place_in_a_path():
    spec = protocol.ModelSpec(name="a/../b:predict", version_label="x/y")
    sent = client_rest.to_request(client.Call("GetModelMetadata", spec, 1.0))
    assert sent == {"method": "GET", "url": "/v1/models/a%2F..%2Fb%3Apredict/labels/x%2Fy/metadata"}


def test_signatures_stay_with_a_call_when_another_fails():
    class Forgetful(dict):
        """Another thread's call failed the moment after."""

        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            self.clear()

    with stand_in.over_rest() as (address, _), Client(address) as one:
        one._learnt = Forgetful()
        assert one.signatures("adder")


def test_methods_tell_what_they_take():
    assert list(inspect.signature(Client.predict).parameters)[:3] == ["self", "model", "inputs"]
    assert set(inspect.signature(Client).parameters) >= {"address", "timeout", "token", "certificate", "retries"}


def test_a_request_is_one_for_the_official_stubs():
    from tensorflow_serving.apis import predict_pb2

    sent = client.request("m", {"a": [1.0, 2.0], "s": "x\0"}, signature="S", version=3)
    found = predict_pb2.PredictRequest.FromString(sent.SerializeToString())
    assert (found.model_spec.name, found.model_spec.signature_name, found.model_spec.version.value) == ("m", "S", 3)
    assert found.inputs["s"].string_val == [b"x\0"]
    assert found.inputs["a"].tensor_shape.dim[0].size == 2
    assert client.request("m", {}, label="L").model_spec.version_label == "L"


def test_neither_tensorflow_nor_long_to_load():
    code = (
        "import sys, time\n"
        "sys.path.insert(0, 'tests')\n"
        "begun = time.process_time()\n"
        "from shared.serving import client\n"
        "took = time.process_time() - begun\n"
        "assert 'httpx2' not in sys.modules\n"
        "from shared.serving import ask, load\n"
        "import stand_in\n"
        "for over in (stand_in.over_grpc, stand_in.over_rest):\n"
        "    with over() as (address, _), client.Client(address) as one:\n"
        "        assert one.predict('adder', {'a': [1.0], 'b': 1})['sum'].tolist() == [2.0]\n"
        "        sys.argv = ['cornucopia', 'ask', 'adder', '--a=1', '--b=3', f'--address={address}']\n"
        "        from shared import command\n"
        "        command.main()\n"
        "assert not {'tensorflow', 'tensorflow_serving', 'keras'} & set(sys.modules)\n"
        "print(took)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum        4.0000") == 2
    assert float(done.stdout.split()[-1]) < 1.0  # 0.15 s on an idle machine


@BOTH
def test_ask_shows_so_many_of_the_best(over, capsys, monkeypatch):
    with over() as (address, _):
        ask.ask("adder", {"a": "1", "b": "2"}, address=address, version=1, token="t", timeout=5)
        assert "sum        1003.0000" in capsys.readouterr().out
        with pytest.raises(ValueError, match="--a takes one float32 number, not '1,2'"):
            ask.ask("adder", {"a": "1,2", "b": "2"}, address=address)
        with pytest.raises(ValueError, match=r"refuses .INVALID_ARGUMENT.: Unrecognized servable version label: L"):
            ask.ask("adder", {"a": "1", "b": "2"}, address=address, label="L")
    with pytest.raises(ValueError, match="--x takes 4 float32 numbers with commas or spaces between, not '1,2'"):
        ask.read("m", {"x": "1,2"}, {"x": (np.dtype(np.float32), (-1, 4))})
    assert ask.read("m", {"x": "1,2"}, {"x": (np.dtype(np.float32), (-1, -1))})["x"].tolist() == [[1, 2]]
    square = {"x": (np.dtype(np.float32), (-1, 2, 2))}
    assert ask.read("m", {"x": "1,2,3,4"}, square)["x"].tolist() == [[[1, 2], [3, 4]]]
    with pytest.raises(ValueError, match="--x takes 4 float32 numbers with commas or spaces between, not '1,2'"):
        ask.read("m", {"x": "1,2"}, square)
    with pytest.raises(ValueError, match="--x takes any count of float32 numbers with commas or spaces between"):
        ask.read("m", {"x": "one"}, {"x": (np.dtype(np.float32), (-1, -1))})
    written = {"tokens": np.array([b"a", b"\n"], object), "names": np.array([b"a", b"b"], object)}
    assert ask.describe(written).splitlines() == ["names      a b", r"tokens     'a' '\n'"]
    inner = ServerError(grpc.StatusCode.INVALID_ARGUMENT, "text is empty\n\t [[{{node a/Assert}}]] [Op:b]")
    assert str(ask.explained(inner, "")) == "the server refuses (INVALID_ARGUMENT): text is empty"
    best = {"top_labels": np.array([b"a", b"b", b"c"], object), "top_scores": np.array([0.5, 0.3, 0.2])}
    assert ask.describe(best, top=2).splitlines() == ["top 1      0.5000  a", "top 2      0.3000  b"]
    assert len(ask.describe(best).splitlines()) == 3
