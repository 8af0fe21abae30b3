"""What a hostile or broken client sends hurts nobody: the server answers, and others are served meanwhile."""

import contextlib
import gzip
import json
import resource
import socket
import struct
import threading
import time
import tracemalloc

import grpc
import numpy as np
import psutil
import pytest
import serving_models
from conftest import until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from shared.serving import protocol, tensors
from shared.serving.client import Client, ServerError, request
from shared.serving.flags import Flags
from shared.serving.refusal import invalid
from shared.serving.server import Server

X = {"x": np.ones((1, 2), np.float32)}
CODES = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL", "FAILED_PRECONDITION", "UNIMPLEMENTED"}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    serving_models.write(root)
    flags = Flags(model_config_file=str(root / "models.config"), port=-1, rest_api_port=-1,
                  allow_version_labels_for_unavailable_models=True)  # fmt: skip
    with Server(flags) as server:
        yield server


@pytest.fixture(scope="module")
def impatient(tree):
    """A server that gives a client a second for the head of its request."""
    with Server(Flags(models=str(tree), port=-1, rest_api_port=-1, client_header_timeout_seconds=1.0)) as server:
        yield server


@pytest.fixture(autouse=True)
def _answers_afterwards(running):
    yield
    for address in (running.address, f"http://{running.rest_address}"):
        with Client(address, retries=0, timeout=10) as client:
            assert client.predict("affine", X)["y"].tolist() == [[3.0, 3.0]]


def connected(server):
    host, _, port = server.rest_address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def posted(server, body, headers="", path="/v1/models/affine:predict"):
    """HTTP status of a body that is posted as it is, and the answer."""
    with connected(server) as connection:
        headers += f"Host: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(f"POST {path} HTTP/1.1\r\n{headers}\r\n".encode() + body)
        data = b""
        while part := connection.recv(65536):
            data += part
    return int(data.split()[1]), data.partition(b"\r\n\r\n")[2]


@pytest.fixture(scope="module")
def calls(running):
    with grpc.insecure_channel(running.address) as channel:
        yield {name: channel.unary_unary(f"/{service}/{name}")
               for service in (protocol.PREDICTION, protocol.MODEL) for name in protocol.methods(service)}  # fmt: skip


def code_of(call, data):
    try:
        call(data, timeout=10)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


SLOW = {"max_examples": 150, "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(**SLOW)
@given(some.sampled_from(["Predict", "Classify", "Regress", "MultiInference", "GetModelMetadata", "GetModelStatus",
                          "HandleReloadConfigRequest"]), some.binary(max_size=200))  # fmt: skip
def test_random_bytes_over_grpc(calls, name, data):
    assert code_of(calls[name], data) in CODES


@settings(**SLOW)
@given(some.data())
def test_messages_with_bytes_changed_over_grpc(calls, data):
    message = bytearray(request("affine", X).SerializeToString())
    for _ in range(data.draw(some.integers(1, 4))):
        message[data.draw(some.integers(0, len(message) - 1))] = data.draw(some.integers(0, 255))
    assert code_of(calls["Predict"], bytes(message)) in CODES


json_values = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=10),
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@settings(**SLOW)
@given(some.sampled_from(["affine", "adder", "echo", "judge"]), some.sampled_from(["predict", "classify", "regress"]),
       some.sampled_from(["instances", "inputs", "examples", "context"]), json_values)  # fmt: skip
def test_any_json(running, model, verb, key, value):
    status, answer = posted(running, json.dumps({key: value}).encode(), path=f"/v1/models/{model}:{verb}")
    assert status in (200, 400, 501)
    assert json.loads(answer.decode(errors="replace"))


@settings(**SLOW)
@given(some.binary(max_size=200))
def test_random_bytes_as_json(running, body):
    status, answer = posted(running, body)
    assert status == 400
    assert "error" in json.loads(answer)


@settings(**SLOW)
@given(some.binary(max_size=300))
def test_random_bytes_as_http(running, data):
    with connected(running) as connection:
        connection.sendall(data + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(65536)
    assert not answer or answer.startswith(b"HTTP/1.")


def test_what_is_no_http_is_told_in_one_line(running, caplog):
    with connected(running) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")  # a gRPC client's first bytes
        assert b" 400 " in connection.recv(1000)
    (told,) = [record for record in caplog.records if "no valid HTTP" in record.message]
    assert told.levelname == "WARNING"
    assert told.exc_info is None


@pytest.mark.parametrize("name", ["../../../etc/passwd", "..", "/etc", "adder/../adder", "adder\x00", "a" * 100_000])
def test_names_are_never_paths(running, name):
    with Client(running.address, retries=0) as client, pytest.raises(ServerError, match="NOT_FOUND"):
        client.predict(name, X)
    quoted = "".join(f"%{byte:02x}" for byte in name.encode()[:1000])
    with connected(running) as connection:
        connection.sendall(f"GET /v1/models/{quoted}/metadata HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b" 404 " in connection.recv(65536).split(b"\r\n")[0]


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"instances":['])
def test_deep_nesting(running, opening):
    status, _ = posted(running, b'{"instances": ' + opening * 200_000)
    assert status == 400


@pytest.mark.parametrize(("most", "status", "megabytes"), [(1_000_000, 429, 10), (0, 400, 130)])
def test_a_bomb_of_zeros_meets_the_limit(tmp_path, most, status, megabytes):
    serving_models.save(serving_models.Affine(), tmp_path / "affine" / "1")
    body = gzip.compress(bytes(300_000_000))
    with Server(Flags(models=str(tmp_path), port=-1, rest_api_port=-1, max_request_bytes=most)) as server:
        tracemalloc.start()
        try:
            found, answer = posted(server, body, "Content-Encoding: gzip\r\n")
            assert tracemalloc.get_traced_memory()[1] < megabytes * 1e6
        finally:
            tracemalloc.stop()
    assert found == status
    assert (b"JSON Parse error: The document is empty" in answer) == (status == 400)  # as TensorFlow Serving says it


def test_compressed_bodies(running):
    body = b'{"instances": [[1, 2]]}'
    sent = gzip.compress(body)
    for good in (sent, gzip.compress(body[:9]) + gzip.compress(body[9:])):
        assert posted(running, good, "Content-Encoding: gzip\r\n")[0] == 200
    for bad in (b"", body, sent[:-9], sent[:-1], sent[:20] + b"?" + sent[21:], sent + b"?"):
        assert posted(running, bad, "Content-Encoding: gzip\r\n")[0] == 400


def hung_up_on_after(connection):
    """Seconds until a client that sends its headers slowly cannot go on."""
    begun, headers = time.monotonic(), iter(b"GET /livez HTTP/1.1\r\nX: " + bytes(b"x" * 50))
    with contextlib.suppress(OSError):
        for byte in headers:
            connection.sendall(bytes([byte]))
            time.sleep(0.2)
    return time.monotonic() - begun


def test_slow_clients_are_hung_up_on(impatient):
    with connected(impatient) as nothing, connected(impatient) as dripping, connected(impatient) as half:
        half.sendall(b"POST /v1/models/affine:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert 0.5 < hung_up_on_after(dripping) < 5
        with contextlib.suppress(ConnectionResetError):
            assert nothing.recv(100) == b""
        assert b" 504 " in half.recv(65536)


def test_slow_clients_are_hung_up_on_at_their_next_request_too_and_idle_ones_are_not(impatient):
    def asks(connection):
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        return connection.recv(65536).startswith(b"HTTP/1.1 200 ")

    with connected(impatient) as dripping, connected(impatient) as idle:
        assert asks(dripping)
        assert asks(idle)
        assert 0.5 < hung_up_on_after(dripping) < 5
        assert asks(idle)
        time.sleep(1.2)
        assert asks(idle)  # the time of a request that was answered has ended


@contextlib.contextmanager
def many_files(wanted):
    """While this block lasts, so many may be open; where the machine allows fewer, the test is skipped."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < wanted:
        pytest.skip(f"this machine allows {hard} open files; {wanted} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_thousands_of_idle_connections(running):
    wanted = 2000
    with many_files(3 * wanted), contextlib.ExitStack() as opened:
        for _ in range(wanted):
            opened.enter_context(connected(running))
        begun = time.monotonic()
        assert posted(running, b'{"instances": [[1, 2]]}')[0] == 200
        assert time.monotonic() - begun < 2


def test_a_thousand_idle_connections_over_grpc(running):
    """Half of them say nothing, half are channels of gRPC that ask nothing."""
    wanted = 1000
    host, _, port = running.address.rpartition(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and empty settings
    with many_files(6 * wanted), contextlib.ExitStack() as opened:
        for number in range(wanted):
            connection = opened.enter_context(socket.create_connection((host, int(port)), timeout=10))
            if number % 2:
                connection.sendall(preface)
        assert connection.recv(100)  # the server's own settings: they are taken for clients
        with Client(running.address, retries=0, timeout=10) as client:
            begun = time.monotonic()
            assert client.predict("affine", X)["y"].tolist() == [[3.0, 3.0]]
            assert time.monotonic() - begun < 2


def test_a_message_above_the_limit_is_refused_unread(tmp_path):
    serving_models.save(serving_models.Affine(), tmp_path / "affine" / "1")
    large = request("affine", {"x": np.zeros((2_500_000, 2), np.float32)}).SerializeToString()
    with (
        Server(Flags(models=str(tmp_path), port=-1, max_request_bytes=1_000_000)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call = channel.unary_unary(f"/{protocol.PREDICTION}/Predict")
        before = psutil.Process().memory_info().rss
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as error:
                call(large, timeout=20)
            assert error.value.code().name == "RESOURCE_EXHAUSTED"
            assert "larger than max (20000" in error.value.details()
            assert call(request("affine", X).SerializeToString(), timeout=20)  # over the same connection
        assert psutil.Process().memory_info().rss - before < 100_000_000


def nested(inside, *tags, depth=1):
    """Fields within fields, so many times as deep; their tags from without to within."""
    for _ in range(depth):
        for tag in reversed(tags):
            inside = tag + tensors._varint(len(inside)) + inside
    return inside


def groups(depth):
    """Of field 100, which nobody knows: each opens within the one before."""
    return b"\xa3\x06" * depth + b"\xa4\x06" * depth


NESTED = {
    # inputs { value { variant_val { tensors { variant_val { ...
    "tensors": ("Predict", lambda depth: nested(nested(b"", b"\x7a", b"\x1a", depth=depth), b"\x12", b"\x12")),
    "groups": ("Predict", groups),
    # input { example_list { examples { ...
    "groups in an example": ("MultiInference", lambda depth: nested(groups(depth), b"\x12", b"\x0a", b"\x0a")),
}  # fmt: skip


@pytest.mark.parametrize(("name", "make"), NESTED.values(), ids=NESTED.keys())
def test_deep_nesting_over_grpc(calls, name, make):
    assert code_of(calls[name], make(10)) == "INVALID_ARGUMENT"  # the message is one, and names no model
    for depth in (1_000, 300_000 if make is groups else 5_000):
        with pytest.raises(grpc.RpcError) as error:
            calls[name](make(depth), timeout=20)
        assert error.value.code().name == "INTERNAL"
        assert error.value.details() == f"the message is no {name} request: it cannot be parsed"


def test_clients_that_vanish(running):
    body = json.dumps({"instances": [[1.0, 2.0]] * 20_000}).encode()
    for cut in (10, len(body) // 2, len(body)):
        connection = connected(running)
        head = f"POST /v1/models/affine:predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body[:cut])
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, no goodbye
        connection.close()
    before = threading.active_count()
    with grpc.insecure_channel(running.address) as channel:
        call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
        message = request("affine", {"x": np.ones((200_000, 2), np.float32)}).SerializeToString()
        for _ in range(20):
            call.future(message).cancel()
    time.sleep(0.5)
    assert threading.active_count() <= before + 8  # the pool's that woke, and one that prepares a way of running


def test_a_token_is_compared_whole(tmp_path):
    from shared.serving.gate import Gate
    from shared.serving.refusal import RefusedError

    gate = Gate(token="secret")
    gate.enter("Bearer secret")
    for wrong in ("", "secret", "Bearer", "Bearer secre", "Bearer secret ", "bearer secret", "Bearer sécret"):
        with pytest.raises(RefusedError):
            gate.enter(wrong)


def test_calls_that_send_nothing_stop_nobody(running):
    """More half-open calls than threads: the others are answered, if later."""
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    stop = threading.Event()

    def nothing():
        stop.wait(20)
        yield from ()

    with grpc.insecure_channel(running.address) as channel:
        half = channel.stream_unary("/tensorflow.serving.PredictionService/Predict")
        open_calls = [half.future(nothing()) for _ in range(6)]
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        open_calls += [stub.ServerReflectionInfo(nothing()) for _ in range(6)]
        assert reflection_pb2.ServerReflectionRequest()
        time.sleep(0.2)
        with Client(running.address, retries=0, timeout=15) as client:
            assert client.predict("affine", X)["y"].tolist() == [[3.0, 3.0]]
        stop.set()
        for call in open_calls:
            call.cancel()


def test_a_call_that_is_cancelled_while_it_waits_for_a_thread_is_not_run(running, monkeypatch):
    ran, go = [], threading.Event()

    def slow(*_):
        ran.append(True)
        go.wait(10)
        raise invalid("enough")

    monkeypatch.setattr(running.core.inference, "predict", slow)
    with grpc.insecure_channel(running.address) as channel:
        call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
        futures = [call.future(request("affine", X).SerializeToString()) for _ in range(60)]
        until(lambda: ran)
        time.sleep(0.2)  # for the others to come, and wait
        for future in futures:
            future.cancel()
        time.sleep(0.3)
        begun = len(ran)
        go.set()
        monkeypatch.undo()
        assert channel.unary_unary("/tensorflow.serving.PredictionService/Predict")(
            request("affine", X).SerializeToString(), timeout=10
        )
        assert 0 < begun < 60
        assert len(ran) == begun


def test_a_shape_beyond_all_measure(running, calls):
    message = request("affine", X)
    for size in (2**40, 2**40):
        message.inputs["x"].tensor_shape.dim.add(size=size)
    with pytest.raises(grpc.RpcError) as error:
        calls["Predict"](message.SerializeToString(), timeout=10)
    assert (error.value.code().name, error.value.details()) == ("INVALID_ARGUMENT", "tensor parsing error: x")
    assert posted(running, b"", path=f"/v1/models/affine/versions/{'9' * 5000}:predict")[0] == 400
