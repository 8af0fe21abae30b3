"""The flags of the server, in both spellings, and what each does where another test does not show it."""

import dataclasses
import io
import json
import logging
import re
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request

import grpc
import numpy as np
import pytest
import serving_models
import tensorflow as tf
from conftest import ready_line, started, until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.serving import flags, grpc_transport, inference, load, profiling, protocol, rest, server, tensors
from shared.serving.client import Client, ServerError
from shared.serving.flags import Flags, parse
from shared.serving.gate import Recorder
from shared.serving.records import records

X = {"x": np.ones((1, 2), np.float32)}


def serving(tree, **changes):
    return server.Server(Flags(models=str(tree), **{"port": -1, "max_num_load_retries": 0, **changes}))


def get(address, path, **headers):
    request = urllib.request.Request(f"http://{address}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, reply.headers, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


def test_upstreams_spelling():
    found, warnings = parse(
        ["--port=9000", "--rest_api_port=9001", "--model_name=m", "--model_base_path=/models/m",
         "--enable_batching=true", "--enable_model_warmup=false", "--tensorflow_session_parallelism=2",
         "--enable_profiler=false", "--flush_filesystem_caches=false", "--xla_cpu_compilation_enabled"]
    )  # fmt: skip
    assert (found.port, found.rest_api_port, found.model_name, found.model_base_path) == (9000, 9001, "m", "/models/m")
    assert (found.enable_batching, found.enable_model_warmup, found.enable_profiler) == (True, False, False)
    assert [one.split()[0] for one in warnings] == ["--flush_filesystem_caches", "--xla_cpu_compilation_enabled"]
    assert parse(["--enable-batching", "--no-enable-model-warmup"])[0].enable_batching


def test_upstreams_defaults():
    expected = {
        "port": 8500, "rest_api_port": 0, "rest_api_timeout_in_ms": 30000, "model_name": "default",
        "model_config_file_poll_wait_seconds": 0, "file_system_poll_wait_seconds": 1, "max_num_load_retries": 5,
        "load_retry_interval_micros": 60_000_000, "enable_batching": False, "saved_model_tags": "serve",
        "allow_version_labels_for_unavailable_models": False, "enable_model_warmup": True,
        "rest_api_enable_cors_support": False, "enable_signature_method_name_check": False,
        "enable_serialization_as_tensor_content": False, "enable_profiler": True,
    }  # fmt: skip
    assert {name: getattr(Flags(), name) for name in expected} == expected


WRONG = {
    "no port": (["--port=0"], "at least one of --port and --grpc_socket_path"),
    "same port": (["--rest_api_port=8500"], "they must differ"),
    "batching": (["--batching_parameters_file=x"], "without --enable_batching"),
    "two sources": (["--models=a", "--model_base_path=b"], "each say which models to serve"),
    "address": (["--model_base_path=gs://models/m"], "is a URI, and the server reads folders"),
    "threads": (["--tensorflow_session_parallelism=1", "--tensorflow_intra_op_parallelism=1"], "excludes"),
    "share": (["--request_log_rate=2"], "a share from 0 to 1, not 2"),
    "boolean": (["--enable_batching=perhaps"], "takes true or false, not 'perhaps'"),
    "format": (["--log_format=xml"], "text or json, not xml"),
}


@pytest.mark.parametrize(("words", "text"), WRONG.values(), ids=WRONG.keys())
def test_flags_that_contradict_each_other(words, text):
    with pytest.raises(ValueError, match=text):
        parse(words)


def test_a_flag_file_is_read_in_either_spelling(tmp_path):
    path = tmp_path / "flags"
    path.write_text("--token_file=secret\n--port=1\n")
    for words in ([f"--flagfile={path}"], ["--flagfile", str(path)]):
        found, _ = parse([*words, "--port=2"])
        assert (found.token_file, found.port, found.flagfile) == ("secret", 2, str(path))
    with pytest.raises(FileNotFoundError):
        parse(["--flagfile", str(tmp_path / "none")])


def test_unknown_flag_is_answered_without_tensorflow(cornucopia):
    done = cornucopia("serve", "--prot=1", expect=2)
    assert "prot" in done.stderr + done.stdout


def test_flag_file_and_its_reload(tree, tmp_path):
    (tmp_path / "flags").write_text(f"# a comment\n--models={tree}\n--port=-1\n--rest_api_port=-1\n")
    with started(tmp_path, "--flagfile=flags", "--log_format=json") as process:
        address = re.search(r"REST on http://(\S+);", ready_line(process))[1]
        assert get(address, "/v1/models/affine")[0] == 200
        (tmp_path / "token").write_text("secret\n")
        with (tmp_path / "flags").open("a") as file:
            file.write("--token_file=token\n--access_log\n--drain_seconds=1\n")
        process.send_signal(signal.SIGHUP)
        until(lambda: get(address, "/v1/models/affine")[0] == 401, seconds=10)
        assert get(address, "/v1/models/affine", Authorization="Bearer secret")[0] == 200
        process.send_signal(signal.SIGTERM)
        lines = [json.loads(line) for line in process.stderr if line.startswith("{")]
    assert process.returncode == 0
    assert any(line.get("message") == "--drain_seconds takes effect at the next start" for line in lines)
    assert any(line.get("entrypoint") == "REST" and line["status"] == "UNAUTHENTICATED" for line in lines)


@pytest.mark.parametrize("wrong", ["model_config_file", "models", "token_file", "request_log"])
def test_where_one_new_flag_is_wrong_none_is_taken(tree, tmp_path, wrong):
    (tmp_path / "token").write_text("secret")
    (tmp_path / "empty").write_text("")
    (tmp_path / "config").write_text("nonsense {")
    values = {"model_config_file": tmp_path / "config", "models": tmp_path / "none", "token_file": tmp_path / "empty",
              "request_log": tmp_path / "empty" / "log"}  # fmt: skip
    changes = {"token_file": str(tmp_path / "token"), "request_log": str(tmp_path / "log"), "access_log": True}
    with serving(tree) as one, Client(one.address, retries=0) as client:
        before = one.flags
        with pytest.raises((ValueError, OSError)):
            one.reload(dataclasses.replace(before, **{**changes, wrong: str(values[wrong])}))
        assert (one.core.gate.open, one.core.access, one.core.recorder, one.flags) == (True, None, None, before)
        assert client.predict("affine", X)["y"].shape == (1, 2)


def test_token(tree, tmp_path):
    (tmp_path / "token").write_text("secret\n")
    with serving(tree, token_file=str(tmp_path / "token"), rest_api_port=-1) as one:
        with Client(one.address, retries=0) as client, pytest.raises(ServerError, match="UNAUTHENTICATED"):
            client.predict("affine", X)
        with (
            Client(one.address, token="wrong", retries=0) as client,
            pytest.raises(ServerError, match="UNAUTHENTICATED"),
        ):
            client.predict("affine", X)
        for address in (one.address, f"http://{one.rest_address}"):
            with Client(address, token="secret") as client:
                assert client.predict("affine", X)["y"].tolist() == [[3.0, 3.0]]
        assert get(one.rest_address, "/livez")[0] == 200  # a platform asks without one
        assert get(one.rest_address, "/models")[0] == 401


def code_of(client):
    try:
        client.predict("affine", X)
    except ServerError as error:
        return error.code.name
    return "OK"


def test_limits(tree):
    with serving(tree, max_requests_per_second=5.0, rest_api_port=-1) as one, Client(one.address, retries=0) as client:
        codes = [code_of(client) for _ in range(20)]
        assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"}
        assert 5 <= codes.count("OK") <= 15
        assert 429 in {get(one.rest_address, "/v1/models/affine")[0] for _ in range(10)}
    with serving(tree, max_request_bytes=10_000, rest_api_port=-1) as one:
        for address in (one.address, f"http://{one.rest_address}"):
            with Client(address, retries=0) as client:
                assert client.predict("affine", X)["y"].shape == (1, 2)
                with pytest.raises(ServerError, match="RESOURCE_EXHAUSTED"):
                    client.predict("affine", {"x": np.ones((10_000, 2), np.float32)})


def test_what_a_call_waits_for_a_thread_is_told(tree, monkeypatch, capsys):
    """One thread, eight callers, 20 ms a run: each waits for the seven before it."""
    monkeypatch.setattr(grpc_transport.Pool, "LOOK", 60.0)  # so that no other thread comes to help
    runs = []
    with serving(tree, grpc_max_threads=1, rest_api_port=-1) as one:
        run = one.core.models.served()["affine"][1].answer

        def slow(*arguments):
            begun = time.perf_counter()
            time.sleep(0.02)
            found = run(*arguments)
            runs.append(1000 * (time.perf_counter() - begun))
            return found

        monkeypatch.setattr(one.core.models.served()["affine"][1], "answer", slow)
        assert load.load("affine", {}, address=one.address, concurrency=8, seconds=2)
        text = get(one.rest_address, "/monitoring/prometheus/metrics")[2]
    said = capsys.readouterr().out
    waited, ran, rest = (float(re.search(rf"\((\d+) %\) {name}", said)[1])
                         for name in ("in the queue", "the network ran", "between client and server"))  # fmt: skip
    assert waited > 75, said
    assert ran < 20, said
    assert rest < 15, said
    mean = {}
    for name, labels in (("cornucopia:serving:stage_latency", 'API="Predict",stage="queue"'),
                         ("tensorflow:serving:request_latency", 'API="Predict",entrypoint="GRPC"')):  # fmt: skip
        total, count = (float(re.search(rf':{name}_{end}{{model_name="affine",{labels}}} (.*)', text)[1])
                        for end in ("sum", "count"))  # fmt: skip
        mean[name] = total / count / 1000  # milliseconds
    queue, latency = mean.values()
    assert 100 < queue < latency
    assert latency - queue == pytest.approx(np.mean(runs), rel=0.5)


def test_a_server_that_refuses_requests_is_watched_all_the_same(slow, tmp_path):
    """No limit holds for what is asked for to see an overload, nor does it wait for the threads that are busy."""
    metrics = "/monitoring/prometheus/metrics"
    (tmp_path / "token").write_text("secret")
    limits = {"max_requests_at_a_time": 1, "max_requests_per_second": 0.001, "rest_api_num_threads": 1}
    with serving(slow, rest_api_port=-1, token_file=str(tmp_path / "token"), **limits) as one:
        token = {"Authorization": "Bearer secret"}
        body = json.dumps({"inputs": [str(tmp_path / "go")]}).encode()
        request = urllib.request.Request(f"http://{one.rest_address}/v1/models/slow:predict", body, headers=token)
        asking = threading.Thread(target=lambda: urllib.request.urlopen(request, timeout=20).close())
        asking.start()
        try:
            until(lambda: "serving:rest_requests_in_flight 2\n" in get(one.rest_address, metrics, **token)[2])
            assert get(one.rest_address, "/v1/models/slow", **token)[0] == 429
            assert get(one.rest_address, metrics, **token)[0] == 200
            assert get(one.rest_address, metrics)[0] == 401
            assert [get(one.rest_address, path)[0] for path in ("/livez", "/readyz")] == [200, 200]
        finally:
            (tmp_path / "go").touch()
            asking.join()


@pytest.mark.parametrize("batching", [False, True])
def test_the_wait_for_a_thread_is_time_in_the_queue(slow, tmp_path, batching):
    def ask(name, took):
        body = json.dumps({"inputs": [str(tmp_path / name)]}).encode()
        request = urllib.request.Request(f"http://{one.rest_address}/v1/models/slow:predict", body,
                                         headers={"Server-Timing": "1"})  # fmt: skip
        with urllib.request.urlopen(request, timeout=20) as answer:
            took.update(load.stages(answer.headers["Server-Timing"]))

    (tmp_path / "there").touch()
    with serving(slow, rest_api_port=-1, rest_api_num_threads=1, enable_batching=batching) as one:
        first, second = {}, {}
        asking = [threading.Thread(target=ask, args=arguments) for arguments in (("go", first), ("there", second))]
        try:
            for number, thread in enumerate(asking, 2):
                thread.start()
                until_told(one, f":cornucopia:serving:rest_requests_in_flight {number}")
            time.sleep(0.3)
        finally:
            (tmp_path / "go").touch()
            for thread in asking:
                thread.join()
    assert first["queue"] < 200 < 250 < second["queue"]  # milliseconds


def test_gate_admits_so_many_at_a_time():
    from shared.serving.gate import Gate
    from shared.serving.refusal import RefusedError

    gate = Gate(most=2)
    gate.enter("")
    gate.enter("")
    with pytest.raises(RefusedError, match="2 requests are being answered"):
        gate.enter("")
    gate.leave()
    gate.enter("")


def test_calls_beyond_the_limit_are_refused_when_they_come(tree, monkeypatch):
    """While those before them run, or wait for the only thread."""
    from shared.serving.client import request

    monkeypatch.setattr(grpc_transport.Pool, "LOOK", 60.0)  # so that no other thread comes to help
    go, body = threading.Event(), request("affine", X).SerializeToString()
    with serving(tree, max_requests_at_a_time=3, grpc_max_threads=1) as one:
        answer = one.core.inference.predict
        monkeypatch.setattr(one.core.inference, "predict", lambda *words: go.wait(20) and answer(*words))
        with grpc.insecure_channel(one.address) as channel:
            call = channel.unary_unary(f"/{protocol.PREDICTION}/Predict")

            def flood():
                futures = [call.future(body, timeout=20) for _ in range(10)]
                until(lambda: sum(future.done() for future in futures) == 7, seconds=10)
                assert {future.code().name for future in futures if future.done()} == {"RESOURCE_EXHAUSTED"}
                assert "3 requests are being answered" in next(f.details() for f in futures if f.done())
                return [future for future in futures if not future.done()]

            for future in flood():  # what nobody awaits any more is not inside for ever, though it never ran
                future.cancel()
            go.set()
            until(lambda: not one.core.gate._inside)
            go.clear()
            inside = flood()
            with pytest.raises(grpc.RpcError, match="3 requests are being answered"):
                channel.unary_unary(f"/{protocol.MODEL}/GetModelStatus")(b"", timeout=10)
            one.reload(dataclasses.replace(one.flags, max_requests_at_a_time=0))
            inside += [call.future(body, timeout=20) for _ in range(10)]
            time.sleep(0.1)
            assert not any(future.done() for future in inside)
            go.set()
            assert [future.code().name for future in inside] == ["OK"] * 13
            one.reload(dataclasses.replace(one.flags, max_requests_at_a_time=1))
            assert call(body, timeout=20)
            with pytest.raises(grpc.RpcError, match="requires exactly one request message"):
                channel.stream_unary(f"/{protocol.PREDICTION}/Predict")(iter(()), timeout=10)
            assert call(body, timeout=20)
        assert one.core.gate._inside == 0


def test_request_log_is_a_warm_up_and_an_evaluation_set(tree, tmp_path):
    with serving(tree, request_log=str(tmp_path / "log" / "requests"), request_log_rate=1.0, rest_api_port=-1) as one:
        for address in (one.address, f"http://{one.rest_address}"):
            with Client(address) as client:
                client.predict("affine", X)
    (path,) = (tmp_path / "log").glob("requests-*.tfrecord")
    logs = [protocol.PredictionLog.FromString(record) for record in records(path)]
    assert len(logs) == 2
    for log in logs:
        assert log.predict_log.request.model_spec.name == "affine"
        assert list(log.predict_log.response.outputs["y"].float_val) == [3.0, 3.0]
    version = tmp_path / "models" / "affine" / "1"
    serving_models.save(serving_models.Affine(), version)
    (version / "assets.extra").mkdir()
    path.rename(version / "assets.extra" / "tf_serving_warmup_requests")
    with serving(tmp_path / "models", rest_api_port=-1) as one:
        text = get(one.rest_address, "/monitoring/prometheus/metrics")[2]
    assert ':tensorflow:serving:model_warmup_latency_count{model_path="affine",status="OK"} 1' in text


@pytest.mark.parametrize("after", ["", "new"])
def test_a_request_log_may_change_while_a_request_is_answered(tree, tmp_path, monkeypatch, after):
    wants = Recorder.wants

    def changing(recorder):
        if recorder.prefix.endswith("old"):
            one.reload(dataclasses.replace(one.flags, request_log=after and str(tmp_path / after)))
        return wants(recorder)

    monkeypatch.setattr(Recorder, "wants", changing)
    for over_rest in (False, True):
        with serving(tree, request_log=str(tmp_path / "old"), request_log_rate=1.0, rest_api_port=-1) as one:
            with Client(f"http://{one.rest_address}" if over_rest else one.address, retries=0) as client:
                assert client.predict("affine", X)["y"].shape == (1, 2)
                assert client.predict("affine", X)["y"].shape == (1, 2)
            assert (one.core.recorder is not None) == bool(after)
    # What came after the change is in the new one.
    assert not list(tmp_path.glob("old-*"))
    assert [len(list(records(path))) for path in tmp_path.glob("new-*")] == ([1, 1] if after else [])


def test_each_request_log_is_a_file_of_its_own(tmp_path):
    asked = protocol.PredictRequest()
    asked.model_spec.name = "../a/b"  # never a path
    for log in [Recorder(str(tmp_path / "logs" / "log"), 1.0) for _ in range(3)]:
        log.write("predict_log", asked.SerializeToString(), b"")
        log.close()
    files = list((tmp_path / "logs").iterdir())
    assert len(files) == 3
    assert all(file.name.startswith("log-..%2Fa%2Fb-") for file in files)


def test_each_model_has_a_request_log_which_is_a_warm_up_of_its(tmp_path):
    judge, models = serving_models.Judge(), tmp_path / "models"
    serving_models.save(serving_models.Affine(), models / "affine" / "1")
    serving_models.save(judge, models / "judge" / "1", {"serving_default": judge.classify, "regress": judge.regress})
    with (
        serving(models, request_log=str(tmp_path / "log"), request_log_rate=1.0) as one,
        grpc.insecure_channel(one.address) as channel,
        Client(one.address) as client,
    ):
        client.predict("affine", X)
        for name, message in of_examples().items():
            channel.unary_unary(f"/{protocol.PREDICTION}/{name}")(message.SerializeToString(), timeout=20)
    for model, count in (("affine", 1), ("judge", 3)):
        (path,) = tmp_path.glob(f"log-{model}-*.tfrecord")
        assert len(list(records(path))) == count
        (models / model / "1" / "assets.extra").mkdir()
        path.rename(models / model / "1" / "assets.extra" / "tf_serving_warmup_requests")
    with serving(models, rest_api_port=-1) as one:
        text = get(one.rest_address, "/monitoring/prometheus/metrics")[2]
    for model in ("affine", "judge"):
        assert f':tensorflow:serving:model_warmup_latency_count{{model_path="{model}",status="OK"}} 1' in text


def test_a_warm_up_that_fails_fails_the_version(tree, tmp_path):
    version = tmp_path / "models" / "affine" / "1"
    serving_models.save(serving_models.Affine(), version)
    extra = version / "assets.extra"
    extra.mkdir()
    log = protocol.PredictionLog()
    log.predict_log.request.model_spec.name = "affine"
    with tf.io.TFRecordWriter(str(extra / "tf_serving_warmup_requests")) as writer:
        writer.write(log.SerializeToString())
    with pytest.raises(ValueError, match=r"warm-up request 0 fails: input size does not match signature"):
        serving(tmp_path / "models")
    with serving(tmp_path / "models", enable_model_warmup=False) as one, Client(one.address) as client:
        assert client.predict("affine", X)["y"].shape == (1, 2)


def test_content_in_answers(tree):
    with (
        serving(tree, enable_serialization_as_tensor_content=True) as one,
        grpc.insecure_channel(one.address) as channel,
    ):
        from shared.serving.client import request

        call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict",
                                   response_deserializer=protocol.PredictResponse.FromString)  # fmt: skip
        reply = call(request("affine", X).SerializeToString())
        assert reply.outputs["y"].tensor_content == np.array([3, 3], "<f4").tobytes()
        assert not reply.outputs["y"].float_val


def test_batching_in_a_server(tree, tmp_path):
    (tmp_path / "batching").write_text("max_batch_size { value: 4 } allowed_batch_sizes: 2 allowed_batch_sizes: 4")
    changes = {"enable_batching": True, "batching_parameters_file": str(tmp_path / "batching"), "rest_api_port": -1}
    with serving(tree, **changes) as one, Client(one.address, retries=0) as client:
        assert client.predict("affine", {"x": np.ones((3, 2), np.float32)})["y"].shape == (3, 2)
        with pytest.raises(ServerError, match="Task size 5 is larger than maximum input batch size 4"):
            client.predict("affine", {"x": np.ones((5, 2), np.float32)})
        text = get(one.rest_address, "/monitoring/prometheus/metrics")[2]
        assert ':cornucopia:serving:batch_size_sum{model_name="affine",API="Predict"} 3' in text
        # As TensorFlow Serving tells it: the pool of a batching session has no name.
        queued = ":tensorflow:serving:batching_session:queuing_latency"
        assert f"# TYPE {queued} histogram" in text
        limits = re.findall(queued + r'_bucket{thread_pool_name="",le="(.*?)"} [01]\n', text)
        assert (limits[:3], limits[-2:], len(limits)) == (["100", "120", "144"], ["1.09205e+06", "+Inf"], 53)
        assert f'{queued}_count{{thread_pool_name=""}} 1\n' in text
        assert ":tensorflow:serving:batching_session:wrapped_run_count{} 1\n" in text
    (tmp_path / "batching").write_text("allowed_batch_sizes: 4 allowed_batch_sizes: 2")
    with pytest.raises(ValueError, match="must rise"):
        serving(tree, **changes)


def test_a_config_file_leaves_no_say_to_the_flags_of_one_model(tree, tmp_path):
    (tmp_path / "config").write_text(
        f'model_config_list {{ config {{ name: "a" base_path: "{tree / "affine"}" model_platform: "tensorflow" }} }}'
    )
    both = {"model_config_file": str(tmp_path / "config"), "model_name": "b", "model_base_path": str(tree / "affine")}
    with server.Server(Flags(port=-1, **both)) as one:
        assert set(one.core.models.served()) == {"a"}


def test_signature_method_names(tree):
    with serving(tree, enable_signature_method_name_check=True) as one, Client(one.address) as client:
        assert client.predict("affine", X)["y"].shape == (1, 2)
        with pytest.raises(ServerError, match="Expected classification signature method_name to be"):
            client.classify("affine", [{"x": 1.0}])


def test_unix_socket(tree, tmp_path):
    with (
        serving(tree, port=0, grpc_socket_path=str(tmp_path / "socket")),
        Client(f"unix:{tmp_path / 'socket'}") as client,
    ):
        assert client.predict("affine", X)["y"].shape == (1, 2)


def test_unix_socket_is_as_safe_as_the_port(tree, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(grpc_transport.Grpc, "bind", lambda self, address, credentials: given.append(credentials) or 1)
    monkeypatch.setattr(server.tls, "server_credentials", lambda *_: "some")
    (tmp_path / "ssl").write_text("")
    with serving(tree, grpc_socket_path=str(tmp_path / "socket"), ssl_config_file=str(tmp_path / "ssl")):
        pass
    assert given == ["some", "some"]


@pytest.mark.parametrize("seconds", [0.3, 0.0])
def test_threads_help_out_only_where_clients_are_silent(monkeypatch, seconds):
    """Calls that take long are no reason for more threads; calls whose message does not come are, for as long."""
    monkeypatch.setattr(grpc_transport.Pool, "LOOK", 0.02)
    pool = grpc_transport.Pool(2, most=4)
    lock, now, seen, come, ended = threading.Lock(), [0], [], threading.Event(), []

    def call(pause):
        pool.heard()  # as what answers tells
        with lock:
            now[0] += 1
            seen.append(now[0])
        time.sleep(pause)
        with lock:
            now[0] -= 1
            ended.append(pause)

    try:
        if not seconds:
            for _ in range(6):
                pool.submit(come.wait)
        for _ in range(8):
            pool.submit(call, seconds)
        until(lambda: len(ended) == 8)
        if not seconds:
            assert pool._count > 6
            come.set()
            until(lambda: not pool._relieving)
            for _ in range(20):  # those that are too many find out after a call
                pool.submit(call, 0.01)
            until(lambda: len(ended) == 28)
            del seen[:]
            for _ in range(20):
                pool.submit(call, 0.02)
            until(lambda: len(ended) == 48)
        assert max(seen) == 2
    finally:
        come.set()
        pool.close()


def test_cors(tree):
    with serving(tree, rest_api_port=-1, rest_api_enable_cors_support=True) as one:
        assert get(one.rest_address, "/v1/models/affine")[1]["Access-Control-Allow-Origin"] == "*"
        request = urllib.request.Request(f"http://{one.rest_address}/v1/models/affine:predict", method="OPTIONS",
                                         headers={"Origin": "http://example.org"})  # fmt: skip
        with urllib.request.urlopen(request, timeout=10) as reply:
            assert reply.headers["Access-Control-Allow-Methods"] == "POST, GET"
    with serving(tree, rest_api_port=-1) as one:
        assert "Access-Control-Allow-Origin" not in get(one.rest_address, "/v1/models/affine")[1]


class Slow(tf.Module):
    """Answers when there is a file of the name that is its first example."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="x")])
    def __call__(self, x):
        there = tf.while_loop(lambda there: there < 1, lambda there: tf.size(tf.io.matching_files(x[0])), [0])
        return {"y": x, "there": tf.repeat(there, tf.size(x))}


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    root = tmp_path_factory.mktemp("slow")
    serving_models.save(Slow(), root / "slow" / "1")
    return root


def posted(server, file):
    """Status and error of a request to the slow model."""
    body = json.dumps({"inputs": [str(file)]}).encode()
    request = urllib.request.Request(f"http://{server.rest_address}/v1/models/slow:predict", body)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=20)
    with error.value as answer:
        return answer.code, json.loads(answer.read())["error"]


def test_what_breaks_in_the_server_is_told_counted_and_logged(slow, monkeypatch, caplog, tmp_path):
    def broken(*_):
        raise KeyError("lost")

    with serving(slow, rest_api_port=-1) as one:
        monkeypatch.setattr(one.core.inference, "predict", broken)
        assert posted(one, tmp_path / "go") == (500, "KeyError: 'lost'")
        assert "POST /v1/models/slow:predict failed" in caplog.text
        text = get(one.rest_address, "/monitoring/prometheus/metrics")[2]
        assert ':request_count{model_name="slow",status="INTERNAL"} 1\n' in text


def test_a_log_of_json_lines_holds_the_traceback_of_what_broke(tree, monkeypatch):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(server._JsonLines())
    monkeypatch.setattr(server.log, "handlers", [handler])
    with serving(tree) as one, Client(one.address, retries=0) as client:
        monkeypatch.setattr(one.core.inference, "predict", failing(KeyError("lost")))
        with pytest.raises(ServerError, match="KeyError: 'lost'"):
            client.predict("affine", X)
    (line,) = (line for line in map(json.loads, stream.getvalue().splitlines()) if line["level"] == "error")
    assert line["message"] == "Predict of affine failed"
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert line["exception"].endswith("\nKeyError: 'lost'")


def test_a_client_that_is_gone_is_no_fault_of_the_server(slow, caplog):
    told = []
    with serving(slow, rest_api_port=-1) as one:
        one.core.access = lambda *line: told.append(line[2])
        host, port = one.rest_address.split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/models/slow:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        until(lambda: told, seconds=10)
    assert told == ["CANCELLED"]
    assert "failed" not in caplog.text


def until_told(server, *lines):
    """Wait until a server's metrics have these lines."""
    end = time.monotonic() + 20
    while not set(lines) <= set((text := get(server.rest_address, "/monitoring/prometheus/metrics")[2]).split("\n")):
        assert time.monotonic() < end, text
        time.sleep(0.02)


def test_rest_timeout(slow, tmp_path):
    with serving(slow, rest_api_port=-1, rest_api_timeout_in_ms=1000) as one:
        try:
            assert posted(one, tmp_path / "go") == (504, "the answer took longer than 1 seconds")
        finally:
            (tmp_path / "go").touch()


def test_without_a_rest_timeout(tree):
    with (
        serving(tree, rest_api_port=-1, rest_api_timeout_in_ms=0) as one,
        Client(f"http://{one.rest_address}") as client,
    ):
        assert client.predict("affine", X)["y"].shape == (1, 2)


def test_a_rest_request_whose_time_is_over_in_the_queue(slow, tmp_path, monkeypatch):
    monkeypatch.setattr(rest, "SLACK", 20.0)  # the queue is to say it, however slow the machine
    (tmp_path / "batching").write_text("num_batch_threads { value: 1 }")
    changes = {"enable_batching": True, "batching_parameters_file": str(tmp_path / "batching"), "rest_api_port": -1}
    file, ran_one = tmp_path / "go", ":tensorflow:serving:batching_session:wrapped_run_count{} 1"
    with serving(slow, rest_api_timeout_in_ms=1000, **changes) as one, Client(one.address, retries=0) as client:
        long = threading.Thread(target=client.predict, args=("slow", {"x": [str(file)]}))
        long.start()
        try:
            until_told(one, ran_one)  # it has the only thread
            overdue = "Run() timeout exceeded while waiting in batching queue"
            assert posted(one, file) == (429, overdue)
            with pytest.raises(ServerError) as error:
                client.predict("slow", {"x": [str(file)]}, timeout=2)
            # Client and server both look at the clock, and either may be the first to say it.
            assert error.value.code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
            until_told(one, ':tensorflow:serving:request_count{model_name="slow",status="RESOURCE_EXHAUSTED"} 2')
        finally:
            file.touch()
            long.join()
        until_told(one, ran_one)  # what nobody awaits never ran


@pytest.mark.parametrize("batching", [False, True])
def test_a_run_is_broken_off_at_its_deadline(slow, tmp_path, monkeypatch, batching):
    monkeypatch.setattr(rest, "SLACK", 20.0)  # the run is to say it, however slow the machine
    changes = {"enforce_session_run_timeout": True, "enable_batching": batching, "rest_api_timeout_in_ms": 1000}
    with serving(slow, rest_api_port=-1, **changes) as one, Client(one.address, retries=0) as client:
        with pytest.raises(ServerError, match="DEADLINE_EXCEEDED"):
            client.predict("slow", {"x": [str(tmp_path / "never")]}, timeout=1.0)
        # A request is counted when it ends, and this one would not without a limit.
        until_told(one, ':tensorflow:serving:request_count{model_name="slow",status="DEADLINE_EXCEEDED"} 1')
        assert posted(one, tmp_path / "never") == (504, "Timed out waiting for notification")
        (tmp_path / "go").touch()
        assert client.predict("slow", {"x": [str(tmp_path / "go")]})["y"].tolist() == [str(tmp_path / "go").encode()]
        with grpc.insecure_channel(one.address) as channel:  # without a deadline
            from shared.serving.client import request

            call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
            assert call(request("slow", {"x": [str(tmp_path / "go")]}).SerializeToString())


def test_a_limit_changes_no_answer(tree):
    with serving(tree, enforce_session_run_timeout=True) as one, Client(one.address, retries=0) as client:
        assert client.predict("affine", X)["y"].tolist() == [[3.0, 3.0]]
        # What a signature says of shapes is not checked, by TensorFlow Serving neither.
        assert client.predict("affine", {"x": np.ones((2, 3, 4), np.float32)})["y"].shape == (2, 3, 4)


def test_a_profile_goes_to_who_asks_for_it(tree, tmp_path):
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    ended = threading.Event()
    with serving(tree) as one, Client(one.address) as client:

        def ask():
            while not ended.is_set():
                client.predict("affine", X)

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            tf.profiler.experimental.client.trace(f"grpc://{one.address}", str(tmp_path), 300)
        finally:
            ended.set()
            asking.join()
        (path,) = tmp_path.glob("plugins/profile/*/*")
        assert path.name == one.address.replace(":", "_") + ".xplane.pb"  # as TensorFlow Serving would call it
        seen = {known.name for plane in xplane_pb2.XSpace.FromString(path.read_bytes()).planes
                for known in plane.event_metadata.values()}  # fmt: skip
        assert {"SessionRun", "ExecutorState::Process"} <= seen
        with pytest.raises(RuntimeError, match="UNIMPLEMENTED"):  # on TPUs alone
            tf.profiler.experimental.client.monitor(f"grpc://{one.address}", 100)


def test_profiles_are_taken_one_at_a_time_of_who_has_the_token(tree, tmp_path, monkeypatch):
    from tensorflow.python.profiler import profiler_v2

    (tmp_path / "token").write_text("secret")
    request = protocol.ProfileRequest(session_id="one", emit_xspace=True, repository_root=str(tmp_path / "root"))
    request.opts.duration_ms = 60_000
    long, request.opts.duration_ms = request.SerializeToString(), 10
    with serving(tree, token_file=str(tmp_path / "token")) as one, grpc.insecure_channel(one.address) as channel:
        profile, terminate = (channel.unary_unary(f"/tensorflow.ProfilerService/{name}")
                              for name in ("Profile", "Terminate"))  # fmt: skip
        allowed = {"metadata": (("authorization", "Bearer secret"),), "timeout": 20}

        def answer():
            try:
                return protocol.ProfileResponse.FromString(profile(request.SerializeToString(), **allowed))
            except grpc.RpcError as error:
                return error.code().name, error.details()

        busy = ("INTERNAL", "Another profiling session active.")
        with pytest.raises(grpc.RpcError, match="a valid bearer token is needed"):
            profile(long, timeout=20)
        first = profile.future(long, **allowed)
        until(lambda: profiler_v2._profiler)  # it has begun
        assert answer() == busy
        terminate(protocol.TerminateRequest(session_id="another").SerializeToString(), **allowed)
        assert answer() == busy
        terminate(protocol.TerminateRequest(session_id="one").SerializeToString(), **allowed)
        assert protocol.ProfileResponse.FromString(first.result()).HasField("xspace")
        second = profile.future(long, **allowed)
        until(lambda: profiler_v2._profiler)
        second.cancel()  # it makes way for the next
        assert until(lambda: (found := answer()) != busy and found).HasField("xspace")
        monkeypatch.setattr(profiling, "LONGEST", 0.01)
        assert protocol.ProfileResponse.FromString(profile(long, **allowed)).HasField("xspace")
        assert not (tmp_path / "root").exists()  # the server writes nowhere
    with (
        serving(tree, enable_profiler=False) as one,
        grpc.insecure_channel(one.address) as channel,
        pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"),
    ):
        channel.unary_unary("/tensorflow.ProfilerService/Profile")(long, timeout=20)


def test_metrics_config(tree, tmp_path):
    for text, path, code in (
        ('prometheus_config { enable: true path: "/metrics" }', "/metrics", 200),
        ("prometheus_config { enable: true }", "/monitoring/prometheus/metrics", 200),
        ("", "/monitoring/prometheus/metrics", 404),
    ):
        (tmp_path / "monitoring").write_text(text)
        with serving(tree, rest_api_port=-1, monitoring_config_file=str(tmp_path / "monitoring")) as one:
            assert get(one.rest_address, path)[0] == code


def test_taken_ports_are_refused_before_a_model_is_loaded(tree, monkeypatch):
    with serving(tree, rest_api_port=-1) as one:
        monkeypatch.setattr(server, "Models", lambda *_, **__: pytest.fail("models are loaded"))
        with pytest.raises(OSError, match=f"port {one.port} of 127.0.0.1 cannot be had"):
            serving(tree, port=one.port)
        rest_port = int(one.rest_address.rpartition(":")[2])
        with pytest.raises(OSError, match=f"port {rest_port} of 127.0.0.1 cannot be had"):
            serving(tree, rest_api_port=rest_port)
        with pytest.raises(OSError, match=r"port 65536 of 127\.0\.0\.1 cannot be had: the last one is 65535"):
            serving(tree, port=65536)


def test_the_document_of_the_api(tmp_path):
    judge, odd = serving_models.Judge(), "a/b {x}:y"
    serving_models.save(judge, tmp_path / "judge" / "1", {"serving_default": judge.classify, "regress": judge.regress})
    serving_models.save(serving_models.Affine(), tmp_path / "affine" / "1")
    models = "".join(f'config {{ name: "{name}" base_path: "{tmp_path / base}" model_platform: "tensorflow" }}'
                     for name, base in (("judge", "judge"), (odd, "affine")))  # fmt: skip
    (tmp_path / "models.config").write_text(f"model_config_list {{ {models} }}")
    (tmp_path / "token").write_text("secret")
    changes = {"model_config_file": str(tmp_path / "models.config"), "token_file": str(tmp_path / "token")}
    token = {"Authorization": "Bearer secret"}
    with server.Server(Flags(port=-1, rest_api_port=-1, **changes)) as one:
        document = json.loads(get(one.rest_address, "/openapi.json", **token)[2])
        for path, item in document["paths"].items():
            if "get" in item:  # what the document says is there
                path, labelled = path.replace("{version}", "1"), path.endswith("/labels/{label}/metadata")
                assert get(one.rest_address, path, **token)[0] == (400 if labelled else 200), path
    try:
        from openapi_spec_validator import validate
    except ImportError:  # then by hand
        pass
    else:
        validate(document)
    where = [f"/v1/models/{name}{tail}" for name in ("judge", "a%2Fb%20%7Bx%7D%3Ay")
             for tail in ("", "/versions/{version}", "/labels/{label}")]  # fmt: skip
    verbs = {"get": ["", "/metadata"], "post": [":predict"]}
    wanted = {(path + tail, method) for path in where for method, tails in verbs.items() for tail in tails}
    wanted |= {(f"{path}:{verb}", "post") for path in where if "judge" in path for verb in ("classify", "regress")}
    calls = {(path, method): call for path, item in document["paths"].items() for method, call in item.items()
             if method != "parameters"}  # fmt: skip
    assert set(calls) == wanted
    assert len({call["operationId"] for call in calls.values()}) == len(calls)
    for path, item in document["paths"].items():
        declared = [one["name"] for one in item.get("parameters", []) if one["in"] == "path" and one["required"]]
        assert declared == re.findall("{(.*?)}", path)
    body = calls["/v1/models/judge:regress", "post"]["requestBody"]["content"]["application/json"]["schema"]
    assert [one["required"] for one in body["anyOf"]] == [["examples", "signature_name"]]
    assert "$ref" not in json.dumps(document)  # so none that leads nowhere
    (scheme,) = {name for one in document["security"] for name in one}
    assert document["components"]["securitySchemes"][scheme] == {"type": "http", "scheme": "bearer"}


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_address_in_either_spelling(tree, host):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 loopback address: {error}")
    with serving(tree, host=host, rest_api_port=-1) as one:
        assert one.address == f"[::1]:{one.port}"
        for address in (one.address, f"http://{one.rest_address}"):
            with Client(address, retries=0) as client:
                assert client.predict("affine", X)["y"].tolist() == [[3.0, 3.0]]


def test_beside_the_contract(tree):
    with serving(tree, rest_api_port=-1) as one, Client(one.address) as client:
        client.predict("affine", X)
        assert get(one.rest_address, "/readyz")[::2] == (200, "ok\n")
        assert json.loads(get(one.rest_address, "/models")[2]) == {"affine": {"versions": [1], "latest": 1}}
        document = json.loads(get(one.rest_address, "/openapi.json")[2])
        assert "security" not in document
        body = document["paths"]["/v1/models/affine:predict"]["post"]["requestBody"]["content"]["application/json"]
        columns, rows = body["schema"]["anyOf"][0]["anyOf"]
        assert (columns["required"], rows["required"]) == (["inputs"], ["instances"])
        tensor = columns["properties"]["inputs"]["anyOf"][0]["properties"]["x"]
        wanted = {
            "type": "array",
            "items": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        }
        assert tensor == wanted
        with grpc.insecure_channel(one.address) as channel:
            call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
            from shared.serving.client import request

            asked = (("x-request-id", "abc"), ("server-timing", "1"))
            _, done = call.with_call(request("affine", X).SerializeToString(), metadata=asked)
        back = dict(done.trailing_metadata())
        assert back["x-request-id"] == "abc"
        assert set(load.stages(back["server-timing"])) == {"decode", "queue", "run", "encode", "batch"}
        headers = get(one.rest_address, "/v1/models/affine", **{"X-Request-Id": "def"})[1]
        assert headers["X-Request-Id"] == "def"


def failing(error):
    def fail(*_):
        raise error

    return fail


TRACED = (("x-request-id", "abc"), ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"))
FAILURES = {  # what the model does, the message, the token, what is answered
    "answered": (None, None, "secret", "OK"),
    "refused": (None, b"", "secret", "INVALID_ARGUMENT"),
    "turned away": (None, None, "wrong", "UNAUTHENTICATED"),
    "no message": (None, b"\xff", "secret", "INTERNAL"),
    "no memory": (MemoryError(), None, "secret", "RESOURCE_EXHAUSTED"),
    "broken": (KeyError("lost"), None, "secret", "INTERNAL"),
}


@pytest.mark.parametrize(("error", "message", "token", "code"), FAILURES.values(), ids=FAILURES.keys())
def test_ids_come_back_and_are_logged_whatever_becomes_of_a_call(
    tree, tmp_path, monkeypatch, caplog, error, message, token, code
):
    from shared.serving.client import request

    (tmp_path / "token").write_text("secret")
    with serving(tree, token_file=str(tmp_path / "token"), access_log=True) as one:
        if error:
            monkeypatch.setattr(one.core.inference, "predict", failing(error))
        with caplog.at_level("INFO", "cornucopia.serve"), grpc.insecure_channel(one.address) as channel:
            metadata = (*TRACED, ("server-timing", "1"), ("authorization", f"Bearer {token}"))
            body = request("affine", X).SerializeToString() if message is None else message
            call = channel.unary_unary(f"/{protocol.PREDICTION}/Predict").future(body, timeout=20, metadata=metadata)
            assert call.code().name == code
        back = dict(call.trailing_metadata())
        assert {name: back[name] for name, _ in TRACED} == dict(TRACED)
        assert "batch" in load.stages(back["server-timing"])
    lines = [record.getMessage() for record in caplog.records if record.name == "cornucopia.serve"]
    ids = " ".join(f"{name}={value}" for name, value in TRACED)
    (line,) = (line for line in lines if line.startswith("GRPC Predict"))
    assert line.endswith(f" ms {ids}")
    assert f" {code} " in line
    (fields,) = (record.request for record in caplog.records if hasattr(record, "request"))
    assert (fields["id"], fields["traceparent"]) == tuple(value for _, value in TRACED)
    if isinstance(error, KeyError):
        assert f"Predict of affine failed {ids}" in lines


def test_metrics_are_what_prometheus_reads(tree):
    from prometheus_client.parser import text_string_to_metric_families

    with serving(tree, rest_api_port=-1) as one, Client(one.address, retries=0) as client:
        for _ in range(3):
            client.predict("affine", X)
        with pytest.raises(ServerError):
            client.predict("affine", {"z": 1.0})
        families = list(text_string_to_metric_families(get(one.rest_address, "/monitoring/prometheus/metrics")[2]))
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value for one in families for sample in one.samples
    }
    count = ":tensorflow:serving:request_count_total"  # so the parser calls what is there without _total
    assert samples[count, ("model_name", "affine"), ("status", "OK")] == 3
    assert samples[count, ("model_name", "affine"), ("status", "INVALID_ARGUMENT")] == 1
    labels = (("API", "Predict"), ("entrypoint", "GRPC"), ("model_name", "affine"))
    assert samples[":tensorflow:serving:request_latency_count", *labels] == 3
    assert samples[":tensorflow:serving:runtime_latency_count", ("API", "Predict"), ("model_name", "affine"),
                   ("runtime", "TF1")] == 3  # fmt: skip
    for stage in ("decode", "queue", "run", "encode"):
        key = (
            ":cornucopia:serving:stage_latency_count",
            ("API", "Predict"),
            ("model_name", "affine"),
            ("stage", stage),
        )
        assert samples[key] == 3


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A folder of one model, which classifies and regresses."""
    root, module = tmp_path_factory.mktemp("judges"), serving_models.Judge()
    signatures = {"serving_default": module.classify, "classify": module.classify, "regress": module.regress}
    serving_models.save(module, root / "judge" / "1", signatures)
    return root


def of_examples():
    """Name of a call that takes Examples -> a request to the judge."""
    found = {"Classify": protocol.ClassificationRequest(), "Regress": protocol.RegressionRequest(),
             "MultiInference": protocol.MultiInferenceRequest()}  # fmt: skip
    found["MultiInference"].tasks.add(method_name="tensorflow/serving/classify").model_spec.name = "judge"
    for name in ("Classify", "Regress"):
        found[name].model_spec.name = "judge"
    found["Regress"].model_spec.signature_name = "regress"
    for message in found.values():
        message.input.example_list.examples.add().features.feature["x"].float_list.value.append(2.0)
    return found


def test_every_stage_of_every_call_takes_time(judge):
    with serving(judge, rest_api_port=-1) as one, grpc.insecure_channel(one.address) as channel:
        for name, message in of_examples().items():
            assert channel.unary_unary(f"/{protocol.PREDICTION}/{name}")(message.SerializeToString(), timeout=20)
        text = get(one.rest_address, "/monitoring/prometheus/metrics")[2]
    sums = re.findall(r'stage_latency_sum{model_name="judge",API="(\w+)",stage="(\w+)"} (.*)', text)
    assert len(sums) == 12
    assert min(float(microseconds) for _, _, microseconds in sums) > 0, sums
    took = dict(re.findall(r'request_latency_sum{model_name="judge",API="(\w+)",entrypoint="GRPC"} (.*)', text))
    for name, seconds in took.items():  # which is no more than there was
        assert sum(float(value) for api, _, value in sums if api == name) < float(seconds)


def test_a_server_that_ends_ends_a_profile_that_is_taken(tree):
    from tensorflow.python.profiler import profiler_v2

    request = protocol.ProfileRequest(emit_xspace=True)
    request.opts.duration_ms = 60_000
    with serving(tree) as one, grpc.insecure_channel(one.address) as channel:
        call = channel.unary_unary("/tensorflow.ProfilerService/Profile")
        profile = call.future(request.SerializeToString(), timeout=50)
        until(lambda: profiler_v2._profiler)
        one.stop(grace=40.0)
        assert protocol.ProfileResponse.FromString(profile.result()).HasField("xspace")


def test_requests_for_what_is_not_there_are_counted_without_growing_the_metrics(tree):
    with serving(tree, rest_api_port=-1) as one, Client(one.address, retries=0) as client:
        for name, version in (("affine", 9), ("a", None), ("b", None)):
            with pytest.raises(ServerError, match="NOT_FOUND"):
                client.predict(name, X, signature="serving_default", version=version)
            asked = f"/v1/models/{name}" + (f"/versions/{version}" if version else "")
            assert get(one.rest_address, asked)[0] == 404
        assert get(one.rest_address, "/v1/models/affine")[0] == 200
        assert get(one.rest_address, "/v1/nothing")[0] == 400
        text = get(one.rest_address, "/monitoring/prometheus/metrics")[2]
    counts = dict(re.findall(r":request_count{(.*?)} (\d+)\n", text))
    assert counts == {
        'model_name="affine",status="NOT_FOUND"': "2", 'model_name="affine",status="OK"': "1",
        'model_name="",status="NOT_FOUND"': "4", 'model_name="",status="INVALID_ARGUMENT"': "1",
    }  # fmt: skip
    # What was only refused took no time.
    assert re.findall(r"_sum{(.*?)}", text) == ['model_name="affine",API="",entrypoint="REST"']


def test_every_flag_is_told_in_the_help(cornucopia):
    told = cornucopia("serve", "--help").stdout
    for name in flags.Flags.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in told


# Warm-up records of every kind.


def warm_up_log(kind):
    """A record, as TensorFlow Serving reads it; of a kind that it refuses too."""
    log = protocol.PredictionLog()
    request = getattr(log, f"{kind}_log").request
    if kind == "predict":
        example = tf.train.Example().SerializeToString()
        request.inputs["inputs"].CopyFrom(tensors.to_proto(np.array([example], object)))
    elif kind in ("classify", "regress", "multi_inference"):
        request.input.example_list.examples.add()
        for name in ("classify", "regress") if kind == "multi_inference" else ():
            task = request.tasks.add(method_name=f"tensorflow/serving/{name}")
            task.model_spec.name, task.model_spec.signature_name = "judge", name
        if kind != "multi_inference":
            request.model_spec.signature_name = kind
    elif kind == "predict_streamed":
        request.add()
    else:
        request.feed.add(name="x")
    return log


def warmed(judge, root, logs, **changes):
    """A server of that model with these warm-up records."""
    shutil.copytree(judge / "judge" / "1", root / "judge" / "1")
    (root / "judge" / "1" / "assets.extra").mkdir()
    with tf.io.TFRecordWriter(str(root / "judge" / "1" / "assets.extra" / "tf_serving_warmup_requests")) as writer:
        for log in logs:
            writer.write(log.SerializeToString())
    return serving(root, rest_api_port=-1, **changes)


@pytest.mark.parametrize("times", [0, 1, 3])
@pytest.mark.parametrize("kind", ["predict", "classify", "regress", "multi_inference"])
def test_warm_up_records_are_run(judge, tmp_path, monkeypatch, kind, times):
    asked = []
    for name in ("predict", "classify", "regress", "infer"):
        run = getattr(inference.Inference, name)
        monkeypatch.setattr(
            inference.Inference, name, lambda *given, run=run, name=name: asked.append(name) or run(*given)
        )
    with warmed(judge, tmp_path, [warm_up_log(kind)] * 2, num_request_iterations_for_warmup=times) as one:
        text = get(one.rest_address, "/monitoring/prometheus/metrics")[2]
    assert asked == ["infer" if kind == "multi_inference" else kind] * 2 * max(1, times)
    assert ':model_warmup_latency_count{model_path="judge",status="OK"} 1' in text


@pytest.mark.parametrize("kind", ["predict_streamed", "session_run"])
def test_warm_up_records_that_no_server_runs(judge, tmp_path, kind):
    text = f"warm-up request 1 fails: Unsupported log_type for warmup: {kind}_log"
    with pytest.raises(ValueError, match=f"due to error: UNIMPLEMENTED: .*{text}"):
        warmed(judge, tmp_path, [warm_up_log("classify"), warm_up_log(kind)])


@pytest.mark.parametrize("count", [1000, 1001])
def test_as_many_warm_up_records_as_tensorflow_serving_takes(judge, tmp_path, count):
    logs = [protocol.PredictionLog()] * count  # empty ones do nothing
    if count == 1000:
        with warmed(judge, tmp_path, logs) as one, Client(one.address) as client:
            assert client.regress("judge", [{"x": 2.0}], signature="regress") == [4.0]
        return
    with pytest.raises(ValueError, match=r"INVALID_ARGUMENT: Number of warmup records exceeds the maximum \(1000\) at"):
        warmed(judge, tmp_path, logs)


def test_a_warm_up_record_of_examples_that_is_refused_fails_the_version(judge, tmp_path):
    log = warm_up_log("regress")
    log.regress_log.request.model_spec.signature_name = "none"
    text = "INVALID_ARGUMENT: .*warm-up request 0 fails: No signature was found with the name: none"
    with pytest.raises(ValueError, match=text):
        warmed(judge, tmp_path, [log])


# Flags whose effect no other test shows.

# Of tensorflow_serving/model_servers/main.cc, in its order.
UPSTREAM = """
    port grpc_socket_path rest_api_port rest_api_num_threads rest_api_timeout_in_ms rest_api_enable_cors_support
    enable_batching allow_version_labels_for_unavailable_models batching_parameters_file
    enable_per_model_batching_parameters model_config_file model_config_file_poll_wait_seconds model_name
    model_base_path num_load_threads num_unload_threads max_num_load_retries load_retry_interval_micros
    file_system_poll_wait_seconds flush_filesystem_caches tensorflow_session_parallelism
    tensorflow_session_config_file tensorflow_intra_op_parallelism tensorflow_inter_op_parallelism
    use_alts_credentials ssl_config_file platform_config_file per_process_gpu_memory_fraction saved_model_tags
    grpc_channel_arguments grpc_max_threads enable_model_warmup num_request_iterations_for_warmup version
    monitoring_config_file remove_unused_fields_from_bundle_metagraph prefer_tflite_model num_tflite_pools
    num_tflite_interpreters_per_pool enable_signature_method_name_check xla_cpu_compilation_enabled
    xla_gpu_compilation_enabled enable_profiler thread_pool_factory_config_file mixed_precision
    skip_initialize_tpu enable_grpc_healthcheck_service enable_serialization_as_tensor_content
"""


@pytest.mark.parametrize("name", UPSTREAM.split())
def test_every_flag_of_tensorflow_serving_is_taken(name):
    if name in flags.INERT:
        found, warnings = parse([f"--{name}=1"])
        assert (found, warnings) == (Flags(), [f"--{name} has no effect: {flags.INERT[name]}"])
        return
    kind = type(getattr(Flags(), name))
    # A value that contradicts no other flag, and that the flag does not have without it.
    beside = ["--enable_batching=true"] if name == "batching_parameters_file" else []
    given = "7" if kind in (int, float) else str(not getattr(Flags(), name)).lower() if kind is bool else "x"
    found, warnings = parse([f"--{name}={given}", *beside])
    assert warnings == []
    assert getattr(found, name) == (given == "true" if kind is bool else kind(given))


def test_no_flag_is_inert_that_tensorflow_serving_does_not_have():
    assert set(flags.INERT) <= set(UPSTREAM.split())


def test_channel_arguments(tree):
    """A limit in bytes that gRPC itself keeps, beside an argument that is text."""
    arguments = "grpc.max_receive_message_length=1000,grpc.primary_user_agent=me"
    with serving(tree, grpc_channel_arguments=arguments) as one, Client(one.address, retries=0) as client:
        assert client.predict("affine", X)["y"].shape == (1, 2)
        with pytest.raises(ServerError, match=r"RESOURCE_EXHAUSTED: .*larger than max \(\d+ vs. 1000\)"):
            client.predict("affine", {"x": np.ones((500, 2), np.float32)})


def test_saved_model_tags(tree, tmp_path):
    version = tmp_path / "affine" / "1"
    shutil.copytree(tree / "affine" / "1", version)
    saved = protocol.SavedModel.FromString((version / "saved_model.pb").read_bytes())
    saved.meta_graphs[0].meta_info_def.tags[:] = ["serve", "gpu"]
    (version / "saved_model.pb").write_bytes(saved.SerializeToString())
    with serving(tmp_path, saved_model_tags="gpu,serve") as one, Client(one.address) as client:
        assert client.predict("affine", X)["y"].tolist() == [[3.0, 3.0]]
    for tags in ("serve", "gpu", "serve,gpu,tpu"):
        shown = " ".join(sorted(tags.split(",")))
        with pytest.raises(ValueError, match=f"NOT_FOUND: .*matching supplied tags: {{ {shown} }}"):
            serving(tmp_path, saved_model_tags=tags)


@pytest.mark.parametrize(("own", "rows"), [(True, 2), (False, 1000)])
def test_batching_parameters_of_a_version(tree, tmp_path, own, rows):
    """Each version's own hold for it where they are allowed, and what it has none of is the server's."""
    for name in ("affine", "other"):
        shutil.copytree(tree / "affine", tmp_path / name)
    (tmp_path / "affine" / "1" / "batching_params.pbtxt").write_text("max_batch_size { value: 2 }")
    changes = {"enable_batching": True, "enable_per_model_batching_parameters": own}
    with serving(tmp_path, **changes) as one, Client(one.address, retries=0) as client:
        for name, most in (("affine", rows), ("other", 1000)):
            assert client.predict(name, {"x": np.ones((2, 2), np.float32)})["y"].shape == (2, 2)
            text = f"Task size {most + 1} is larger than maximum input batch size {most}"
            with pytest.raises(ServerError, match=text):
                client.predict(name, {"x": np.ones((most + 1, 2), np.float32)})


@pytest.mark.parametrize("over_rest", [False, True])
@pytest.mark.parametrize("most", [1, 3])
def test_so_many_threads_answer(tree, monkeypatch, most, over_rest):
    monkeypatch.setattr(grpc_transport.Pool, "LOOK", 1.0)  # so that none is looked at while its message comes
    with serving(tree, grpc_max_threads=most, rest_api_num_threads=most, rest_api_port=-1) as one:
        lock, now, seen, go = threading.Lock(), [0], [], threading.Event()
        predict = one.core.inference.predict

        def slow(*arguments):
            with lock:
                now[0] += 1
                seen.append(now[0])
            with arguments[4].waiting():  # gives its place to another, as far as there may be more
                go.wait(20)
            with lock:
                now[0] -= 1
            return predict(*arguments)

        monkeypatch.setattr(one.core.inference, "predict", slow)
        with Client(f"http://{one.rest_address}" if over_rest else one.address, retries=0) as client:
            asking = [threading.Thread(target=client.predict, args=("affine", X)) for _ in range(5)]
            for thread in asking:
                thread.start()
            until(lambda: len(seen) == most)
            with grpc.insecure_channel(one.address) as channel:  # who watches over it waits for none of these
                checked = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
            assert checked.status == health_pb2.HealthCheckResponse.SERVING
            monkeypatch.setattr(grpc_transport.Pool, "LOOK", 0.02)  # how long the calls take adds no more
            time.sleep(1.3)  # in which a further thread would take the next call
            assert max(seen) == most
            go.set()
            for thread in asking:
                thread.join()
        assert len(seen) == 5
        assert max(seen) == most
