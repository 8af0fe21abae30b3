"""The load tool: what it counts, what it sends, and what it says."""

import itertools
import json
import signal
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
import stand_in
from conftest import ROOT

from shared.serving import client, load, protocol, replay
from shared.serving.client import ServerError

BOTH = pytest.mark.parametrize("over", [stand_in.over_grpc, stand_in.over_rest], ids=["grpc", "rest"])


def write_records(path, *bodies):
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        for body in bodies:
            file.write(len(body).to_bytes(8, "little") + b"crc." + body + b"crc.")


def warm_up(folder, values, **options):
    log = protocol.PredictionLog()
    log.predict_log.request.CopyFrom(client.request("adder", values, **options))
    write_records(folder / load.WARM_UP, log.SerializeToString(), b"")


def test_a_closed_loop_keeps_so_many_on_their_way():
    lock, state = threading.Lock(), {"now": 0, "most": 0}

    def call(trace):
        with lock:
            state["now"] += 1
            state["most"] = max(state["most"], state["now"])
        time.sleep(0.05)
        with lock:
            state["now"] -= 1
            state["ended"] = time.perf_counter()
        return {"run": 6.0, "batch": 4.0} if trace else None

    begun = time.perf_counter()
    found = load.run(call, concurrency=4, seconds=1)
    assert state["most"] == 4
    assert 40 < found.throughput <= 80  # four callers, 50 ms each
    assert 50 <= found.percentile(50) <= found.percentile(95) <= found.percentile(99)
    assert 0.9 <= found.seconds < state["ended"] - begun  # of which the first tenth is not counted
    assert found.stages == {"run": 6.0, "batch": 4.0}
    assert found.waited == pytest.approx(0, abs=0.5)
    assert 0 <= found.client < 10


def test_a_rate_is_kept_and_a_stall_is_charged_to_all_who_waited():
    stalls, numbers, stood = threading.Lock(), itertools.count(1), []

    def call(trace):
        with stalls:  # one after the other, as one worker would
            if next(numbers) == 120:
                begun = time.perf_counter()
                time.sleep(0.3)
                stood.append(1000 * (time.perf_counter() - begun))

    found = load.run(call, seconds=3, rate=100)
    assert len(found.latencies) == pytest.approx(270, abs=3)  # those of the first tenth are not counted
    assert 60 < found.throughput < 110
    assert 250 < found.latencies.max() < stood[0] + 400
    # A caller who waits for the answer would have met the stall once; a tenth of the schedule meets it.
    assert (found.latencies > 50).sum() > 15
    assert found.percentile(50) < 50


def test_failures_are_counted_by_code_and_do_not_count_as_answers():
    def call(trace):
        time.sleep(0.005)
        raise ServerError(grpc.StatusCode.UNAVAILABLE, "down")

    found = load.run(call, concurrency=1, seconds=1)
    assert set(found.errors) == {"UNAVAILABLE"}
    assert 25 < found.errors["UNAVAILABLE"] <= 200
    assert len(found.latencies) == found.throughput == 0
    said = load.describe(found)
    assert f"{found.errors['UNAVAILABLE']} UNAVAILABLE" in said
    assert "p50 nan ms" in said


def test_settings_that_make_no_load_are_refused():
    with pytest.raises(ValueError, match="needs 1 caller or more"):
        load.run(lambda trace: None, concurrency=0)
    with pytest.raises(ValueError, match="needs 1 example or more, not 0"):
        load.load("adder", {}, batch=0)


def test_stages_in_the_syntax_of_server_timing():
    assert load.stages(stand_in.TIMING) == {"decode": 0.1, "queue": 0.2, "run": 0.5, "encode": 0.1, "batch": 8.0}
    assert load.stages('cache;desc="hit, or so", db;dur="1.5";desc=x') == {"db": 1.5}
    assert load.stages("") == {}


def result(**changes):
    values = {"seconds": 2.0, "latencies": np.arange(1.0, 101.0), "errors": {}, "waited": 0.0, "took": 3.1,
              "stages": {"decode": 0.2, "run": 2.2, "queue": 0.4, "batch": 7.5}, "client": 0.1234}  # fmt: skip
    return load.Result(**{**values, **changes})


def test_a_result_says_where_the_time_went():
    said = load.describe(result(), batch=4).splitlines()
    assert said == [
        "throughput 50.0 requests/s, 200.0 examples/s",
        "latency    p50 50.50 ms, p95 95.05 ms, p99 99.01 ms",
        "errors     none",
        "client     0.123 ms of processor time for each request",
        "batches    7.5 examples ran together on average",
        "time       of 3.10 ms on average, 2.20 ms (71 %) the network ran, 0.40 ms (13 %) in the queue, "
        "0.20 ms (6 %) decoding, 0.30 ms (10 %) between client and server",
    ]
    assert "of 4.10 ms on average, 1.00 ms (24 %) before it was sent" in load.describe(result(waited=1.0))
    assert load.describe(result(stages={})).splitlines()[-1] == "time       the server does not say where it went"


@BOTH
def test_a_call_sends_ready_bytes_and_asks_for_the_stages(over):
    message = client.request("adder", {"a": np.ones(2, np.float32), "b": np.float32(1)})
    with over() as (address, server), load.calling(address, message, token="t") as call:
        assert call(False) is None
        assert call(True) == load.stages(stand_in.TIMING)
        assert ["server-timing" in headers for _, headers in server.calls] == [False, True]
        assert all(headers["authorization"] == "Bearer t" for _, headers in server.calls)
        server.timing = ""
        assert call(True) == {}
        server.failures = [grpc.StatusCode.NOT_FOUND]
        with pytest.raises(ServerError, match="told to fail") as error:
            call(False)
        assert error.value.code == grpc.StatusCode.NOT_FOUND
        assert call(False) is None  # goes on after a failure


@BOTH
def test_the_command_loads_a_server_with_inputs_of_the_flags(over, capsys):
    with over() as (address, server):
        assert load.load("adder", {"a": "1", "b": "2"}, address=address, seconds=0.4, concurrency=2, batch=3)
        said = capsys.readouterr().out
        assert "with the inputs of the flags, 3 examples a request, 2 at once, for 0.4 s" in said
        assert "the network ran" in said
        assert "examples/s" in said
        server.timing = ""
        server.failures = [None, None, *[grpc.StatusCode.NOT_FOUND] * 3]
        assert not load.load("adder", {}, address=address, seconds=0.3, rate=50)
        said = capsys.readouterr().out
    assert "with zeros and empty strings, 1 example a request, 50 requests/s" in said
    assert "errors     3 NOT_FOUND" in said
    assert "the server does not say" in said


def test_the_warm_up_request_of_the_newest_version(tmp_path):
    assert load.warm_up(tmp_path) is None
    warm_up(tmp_path / "9", {"a": [9.0], "b": 1.0})
    warm_up(tmp_path / "00010", {"a": [1.0, 2.0], "b": 1.0})
    (tmp_path / "draft").mkdir()
    inputs, origin = load.warm_up(tmp_path)
    assert inputs["a"].tolist() == [1.0, 2.0]
    assert origin == f"the first request of {tmp_path / '00010' / load.WARM_UP}"
    assert load.warm_up(tmp_path, "score") is None  # it is for another signature
    assert load.warm_up(tmp_path, "serving_default") is not None


def test_records_as_tensorflow_writes_them(tmp_path):
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(tmp_path / "r")) as writer:
        for body in (b"one", b"", b"x" * 1000):
            writer.write(body)
    assert list(load.records(tmp_path / "r")) == [b"one", b"", b"x" * 1000]
    (tmp_path / "cut").write_bytes((tmp_path / "r").read_bytes()[:-1])
    with pytest.raises(ValueError, match="ends within a record"):
        list(load.records(tmp_path / "cut"))


def test_the_warm_up_request_is_sent(tmp_path, capsys):
    warm_up(tmp_path / "adder" / "1", {"a": np.ones(5, np.float32), "b": np.float32(1)})
    with stand_in.over_grpc() as (address, server):
        assert load.load("adder", {}, address=address, seconds=0.2, saved_models=tmp_path)
    assert "with the first request of" in capsys.readouterr().out
    assert {method for method, _ in server.calls} == {"Predict"}  # no metadata is needed


def test_recorded_requests_are_sent_again_and_their_answers_compared(tmp_path, capsys):
    import serving_models

    from shared.serving.flags import Flags
    from shared.serving.server import Server

    judge, models = serving_models.Judge(), tmp_path / "models"
    serving_models.save(serving_models.Affine(), models / "affine" / "1")
    serving_models.save(judge, models / "judge" / "1", {"serving_default": judge.classify, "regress": judge.regress})
    flags = {"models": str(models), "port": -1, "request_log": str(tmp_path / "log"), "request_log_rate": 1.0}
    several = protocol.MultiInferenceRequest()
    for signature, method in (("", "classify"), ("regress", "regress")):
        task = several.tasks.add(method_name=f"tensorflow/serving/{method}")
        task.model_spec.name, task.model_spec.signature_name = "judge", signature
    several.input.example_list.examples.add()
    with Server(Flags(**flags)) as server, client.Client(server.address) as asking:
        for value in (0.0, 0.0001, 1.0, 2.0):
            asking.predict("affine", {"x": np.full((1, 2), value, np.float32)}, version=1)
        asking.classify("judge", [{"x": 1.0}])
        asking.regress("judge", [{"x": 1.0}, {"x": 2.0}], signature="regress")
        with grpc.insecure_channel(server.address) as channel:
            channel.unary_unary(f"/{protocol.PREDICTION}/MultiInference")(several.SerializeToString(), timeout=20)
    (affine,), (judged,) = tmp_path.glob("log-affine-*"), tmp_path.glob("log-judge-*")
    extra = protocol.PredictionLog()
    extra.predict_log.request.CopyFrom(client.request("affine", {"x": np.ones((1, 2), np.float32)}))
    write_records(tmp_path / "more" / "log", extra.SerializeToString())
    affine.write_bytes(affine.read_bytes() + (tmp_path / "more" / "log").read_bytes())
    serving_models.save(serving_models.Affine(3.0), models / "affine" / "2")  # 0 stays, and what is near it
    (models / "same").symlink_to(models / "judge")  # under another name
    with Server(Flags(models=str(models), port=-1)) as server:
        assert load.load("affine", {}, address=server.address, seconds=0.5, requests=str(affine))
        said = capsys.readouterr().out
        assert f"with the 5 requests of {affine}, 8 at once, for 0.5 s\n" in said
        assert said.endswith("answers    2 of 4 (50.0 %) equal those recorded; 1 recorded without an answer\n")
        assert load.load("same", {}, address=server.address, seconds=0.5, requests=str(judged))
        assert capsys.readouterr().out.endswith("answers    3 of 3 (100.0 %) equal those recorded\n")
        with pytest.raises(ValueError, match="sends over gRPC what was recorded"):
            load.load("affine", {}, address=server.address, batch=2, requests=str(affine))
    session = protocol.PredictionLog()
    session.session_run_log.SetInParent()
    wrong = {"holds no request": [], "record 0 of .* is no PredictionLog": [b"\xff"],
             "is a session_run_log": [session.SerializeToString()]}  # fmt: skip
    for number, (text, bodies) in enumerate(wrong.items()):
        write_records(tmp_path / str(number) / "log", *bodies)
        with pytest.raises(ValueError, match=text):
            load.load("affine", {}, requests=str(tmp_path / str(number) / "log"))


def test_what_counts_as_equal():
    a, b = np.array([1.0, np.nan], np.float32), np.array([b"x"], object)
    for one, other, expected in (
        (a, a * np.float32(1.0005), True), (a, a * np.float32(1.01), False), (a, a.astype(float), False),
        (a, a[None], False), (b, b.copy(), True), (b, np.array([b"y"], object), False),
        (np.array([1]), np.array([2]), False), (np.array([1j]), np.array([1.0001j]), True),
    ):  # fmt: skip
        assert replay._alike(one, other) == expected


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [("other", ValueError, r"the server refuses \(NOT_FOUND\)"), ("adder", ConnectionError, "no server answers at")],
)
def test_a_load_that_cannot_begin_says_why(model, kind, message):
    with stand_in.over_grpc() as (address, _), pytest.raises(kind, match=message):
        load.load(model, {}, address=address if model == "other" else "127.0.0.1:1")


def start(*words):
    code = "from shared.command import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, cwd=ROOT)  # fmt: skip


def test_exit_codes_and_an_early_end():
    with stand_in.over_grpc() as (address, server):
        flags = ("load", "adder", f"--address={address}", "--concurrency=2")
        server.failures = [None, None, grpc.StatusCode.INTERNAL]
        with start(*flags, "--seconds=0.3") as process:
            said = process.communicate(timeout=60)
        assert process.returncode == 1, said
        assert "1 INTERNAL" in said[0]
        server.most_at_once, server.wait = 0, 0.01  # so that calls are answered side by side
        with start(*flags, "--seconds=30") as process:
            while server.most_at_once < 2:  # both callers call, so the load has begun
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert "throughput" in said[0]
        assert time.monotonic() - begun < 20


def test_the_client_costs_little():
    """Measured on two cores that others use too: 0.14 ms over gRPC, 0.09 ms over REST; the bounds are loose."""
    message = client.request("adder", {"a": np.ones(1, np.float32), "b": np.float32(1)})
    code = (
        "import json, sys, time\n"
        "sys.path.insert(0, 'tests')\n"
        "import stand_in\n"
        "with stand_in.over_grpc() as (one, _), stand_in.over_rest() as (other, _):\n"
        "    print(json.dumps([one, other]), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as process:
        for address in json.loads(process.stdout.readline()):
            with load.calling(address, message) as call:
                found = load.run(call, concurrency=4, seconds=0.8)
            assert len(found.latencies) > 50
            assert found.client < 1.0
        process.stdin.close()
