"""Versions come, go and are swapped while requests go on."""

import contextlib
import dataclasses
import gc
import http.client
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent import futures
from pathlib import Path

import forks
import numpy as np
import psutil
import pytest
import serving_models
from conftest import ready_line, started, until
from google.protobuf import text_format
from tensorflow_serving.apis import model_management_pb2, model_service_pb2_grpc

from shared.serving import protocol, servable
from shared.serving.client import Client, ServerError
from shared.serving.flags import Flags
from shared.serving.server import Server

X = np.ones((1, 2), np.float32)
FAST = {"port": -1, "file_system_poll_wait_seconds": 0.05, "max_num_load_retries": 0}


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Saved versions of a model, by the factor that tells them apart."""
    root = tmp_path_factory.mktemp("versions")
    for scale in (1, 2, 3):
        serving_models.save(serving_models.Affine(float(scale)), root / str(scale))
    return root


@pytest.fixture
def base(tmp_path, versions):
    """The base path of a model, with its first version."""
    publish(versions, tmp_path / "models" / "affine", 1)
    return tmp_path / "models" / "affine"


def publish(versions, base, number, scale=None):
    """As a publisher should: under a name that no server reads, then renamed."""
    base.mkdir(parents=True, exist_ok=True)
    part = base / f".part-{number}"
    shutil.copytree(versions / str(scale or number), part)
    part.rename(base / str(number))


def states(client, model="affine"):
    return {number: state for number, (state, _) in client.status(model).items()}


def answer(client, **choice):
    return float(client.predict("affine", {"x": X}, **choice)["y"][0, 0]) - 1


def test_swap_and_roll_back_without_a_failed_request(base, versions):
    with Server(Flags(models=str(base.parent), **FAST)) as server, Client(server.address, retries=0) as client:
        assert answer(client) == 1
        seen, failed, stop = set(), [], threading.Event()

        def ask():
            while not stop.is_set():
                try:
                    seen.add(answer(client))
                except ServerError as error:
                    failed.append(error)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        publish(versions, base, 2)
        until(lambda: states(client) == {2: "AVAILABLE", 1: "END"})
        publish(versions, base, 3)
        until(lambda: states(client) == {3: "AVAILABLE", 2: "END", 1: "END"})
        shutil.rmtree(base / "3")  # back to the one before
        until(lambda: states(client) == {3: "END", 2: "AVAILABLE", 1: "END"})
        stop.set()
        for thread in threads:
            thread.join()
        assert not failed
        assert seen == {1, 2, 3}
        assert answer(client) == 2


def test_bad_versions_displace_nothing(base, versions, caplog):
    with Server(Flags(models=str(base.parent), **FAST)) as server, Client(server.address, retries=0) as client:
        with caplog.at_level(logging.CRITICAL, "cornucopia.serve"):
            (base / "2").mkdir()  # nothing in it yet
            until(lambda: states(client).get(2) == "END")
            shutil.copytree(versions / "2", base / "3", ignore=shutil.ignore_patterns("variables*"))  # half copied
            until(lambda: states(client).get(3) == "END")
            (base / ".4").mkdir()  # a name that is none of a version, so that it comes whole
            (base / ".4" / "saved_model.pb").write_bytes(b"nonsense")
            (base / ".4").rename(base / "4")
            until(lambda: states(client).get(4) == "END")
        assert answer(client) == 1
        assert "parse" in client.status("affine")[4][1]
        publish(versions, base, 5, scale=2)  # a good one wins
        until(lambda: answer(client) == 2)
        with pytest.raises(ServerError, match=r"NOT_FOUND: Servable not found for request: Specific\(affine, 3\)"):
            answer(client, version=3)


def test_what_has_no_variables_needs_no_folder_of_them(tmp_path):
    serving_models.save(serving_models.Adder(), tmp_path / "adder" / "1")
    shutil.rmtree(tmp_path / "adder" / "1" / "variables")
    with Server(Flags(models=str(tmp_path), **FAST)) as server, Client(server.address) as client:
        assert client.predict("adder", {"a": [1.0], "b": 2.0})["sum"].tolist() == [3.0]


@pytest.mark.parametrize(("threads", "most"), [(0, 1), (3, 3)])
def test_so_many_versions_are_loaded_at_a_time(base, versions, monkeypatch, threads, most):
    for name in ("second", "third"):
        publish(versions, base.parent / name, 1)
    load, lock, state = Server._load, threading.Lock(), {"now": 0, "most": 0}
    together = threading.Barrier(most)  # of so many that must be loaded at a time, each waits for the others

    def watched(*arguments):
        with lock:
            state["now"] += 1
            state["most"] = max(state["most"], state["now"])
        together.wait(20)
        time.sleep(0.2)
        try:
            return load(*arguments)
        finally:
            with lock:
                state["now"] -= 1

    monkeypatch.setattr(Server, "_load", watched)
    with Server(Flags(models=str(base.parent), num_load_threads=threads, **FAST)) as server:
        assert len(server.core.models.served()) == 3
    assert state["most"] == most


def test_a_load_that_fails_holds_up_no_other(base, versions, caplog):
    flags = Flags(
        models=str(base.parent), port=-1, file_system_poll_wait_seconds=0.05, load_retry_interval_micros=10**9
    )
    with (
        Server(flags) as server,
        Client(server.address) as client,
        caplog.at_level(logging.CRITICAL, "cornucopia.serve"),
    ):
        (base / "2").mkdir()
        until(lambda: client.status("affine").get(2, ("", ""))[1])  # it is tried again in 1000 seconds
        publish(versions, base, 3)
        until(lambda: answer(client) == 3)


def test_a_failed_load_is_tried_again(base, versions, caplog):
    flags = Flags(models=str(base.parent), port=-1, file_system_poll_wait_seconds=0.05, max_num_load_retries=1000,
                  load_retry_interval_micros=50_000)  # fmt: skip
    with Server(flags) as server, Client(server.address) as client:
        with caplog.at_level(logging.CRITICAL, "cornucopia.serve"):
            (base / "2").mkdir()
            until(lambda: client.status("affine").get(2, ("", ""))[1])
            assert states(client)[2] == "LOADING"
            shutil.copytree(versions / "2", base / "2", dirs_exist_ok=True)
            until(lambda: states(client)[2] == "AVAILABLE")
        assert client.status("affine")[2] == ("AVAILABLE", "")


def test_a_request_in_flight_ends_on_its_version_which_then_goes(base, versions):
    with Server(Flags(models=str(base.parent), **FAST)) as server, Client(server.address) as client:
        held = server.core.models.find(protocol.ModelSpec(name="affine"))
        publish(versions, base, 2)
        until(lambda: states(client) == {2: "AVAILABLE", 1: "UNLOADING"})
        feeds, fetches, arrays = held.bind("serving_default", {"x": X})
        assert held.run(feeds, fetches, arrays)[0].tolist() == [[2.0, 2.0]]
        del held
        until(lambda: states(client)[1] == "END")


def test_long_runs_lend_their_place(versions, monkeypatch):
    monkeypatch.setattr(servable, "LONG", 0.0)  # now each is long
    version = servable.Servable("affine", 1, versions / "2")
    bound = version.bind("serving_default", {"x": X})
    expected, answers, lent = version.run(*bound)[0].tolist(), [], []

    @contextlib.contextmanager
    def waiting():
        lent.append(True)
        yield

    def ask():
        for _ in range(50):
            answers.append(version.answer(*bound, waiting)[0].tolist())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 200
    assert len(lent) >= 196  # all but the first, of which it was not known
    version.detach()()


def rested(folder: str) -> None:
    """Print the seconds of a processor that a version takes within one, after it had long runs in several threads."""
    servable.LONG = 0.0
    version = servable.Servable("affine", 1, Path(folder))
    bound = version.bind("serving_default", {"x": X})
    with futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: version.answer(*bound), range(2_000)))
    begun = time.process_time()
    time.sleep(1.0)
    print("took", time.process_time() - begun)


def test_a_version_that_answers_nobody_rests(versions, tmp_path):
    """One of TensorFlow's pools looks for work 12,000 times a second, for ever, once it had some."""
    out, err = tmp_path / "out", tmp_path / "err"
    process = forks.start(rested, str(versions / "2"), folder=tmp_path, out=out, err=err)
    assert forks.ended(process) == 0, err.read_text()
    assert float(out.read_text().rpartition("took ")[2]) < 0.05


def test_memory_comes_back(tmp_path):
    """Seven swaps of a version with 40 MB of weights leave, after the second, less than two versions behind."""
    import tensorflow as tf

    class Large(tf.Module):
        def __init__(self):
            super().__init__()
            self.weights = tf.Variable(tf.random.stateless_uniform([10_000_000], [1, 2]))

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
        def __call__(self, x):
            return {"y": x + self.weights[0]}

    base = tmp_path / "models" / "large"
    serving_models.save(Large(), base / "1")
    with Server(Flags(models=str(base.parent), **FAST)) as server, Client(server.address) as client:
        resident = []
        for number in range(2, 9):
            (base / str(number - 1)).rename(base / str(number))
            until(lambda number=number: states(client, "large").get(number) == "AVAILABLE"
                  and states(client, "large")[number - 1] == "END")  # fmt: skip
            gc.collect()
            resident.append(psutil.Process().memory_info().rss)
    assert resident[-1] - resident[1] < 80e6


POLICIES = {
    "": {3},
    "model_version_policy { latest { num_versions: 2 } }": {2, 3},
    "model_version_policy { all {} }": {1, 2, 3},
    "model_version_policy { specific { versions: 1 versions: 3 versions: 9 } }": {1, 3},
}


def config(base, policy="", name="affine"):
    return (f'model_config_list {{ config {{ name: "{name}" base_path: "{base}" model_platform: "tensorflow" {policy} '
            "} }")  # fmt: skip


@pytest.mark.parametrize(("policy", "expected"), POLICIES.items(), ids=["latest", "two", "all", "specific"])
def test_policies(base, versions, tmp_path, policy, expected):
    for number in (2, 3):
        publish(versions, base, number)
    (tmp_path / "config").write_text(config(base, policy))
    with Server(Flags(model_config_file=str(tmp_path / "config"), **FAST)) as server, Client(server.address) as client:
        until(lambda: set(states(client)) == expected and set(states(client).values()) == {"AVAILABLE"})
        assert answer(client) == max(expected)


def test_labels_and_reload(base, versions, tmp_path, caplog):
    publish(versions, base, 2)
    policy = "model_version_policy { all {} } "
    (tmp_path / "config").write_text(config(base, policy + 'version_labels { key: "stable" value: 1 }'))
    flags = {"model_config_file": str(tmp_path / "config"), "model_config_file_poll_wait_seconds": 1, **FAST}
    with pytest.raises(ValueError, match=r"Request to assign label to version 1 of model affine, which is not current"):
        Server(Flags(**flags))
    with (
        Server(Flags(**flags, allow_version_labels_for_unavailable_models=True)) as server,
        Client(server.address) as client,
    ):
        until(lambda: set(states(client).values()) == {"AVAILABLE"} and len(states(client)) == 2)
        assert answer(client, label="stable") == 1
        with pytest.raises(ServerError, match="INVALID_ARGUMENT: Unrecognized servable version label: new"):
            answer(client, label="new")
        moved = config(
            base, policy + 'version_labels { key: "stable" value: 2 } version_labels { key: "old" value: 1 }'
        )
        (tmp_path / "config").write_text(moved)
        until(lambda: answer(client, label="stable") == 2)
        assert answer(client, label="old") == 1
        (tmp_path / "config").write_text("nonsense {")  # is logged, and changes nothing
        until(lambda: "the new configuration is not taken: Error parsing" in caplog.text)
        assert answer(client, label="old") == 1


def test_a_logging_config_is_refused_as_tensorflow_serving_refuses_it(base, tmp_path):
    asked = config(base, "logging_config { sampling_config { sampling_rate: 0.5 } }")
    (tmp_path / "config").write_text(asked)
    with pytest.raises(ValueError, match=r"No request-logger-creator provided\. .*take it out and give --request_log"):
        Server(Flags(model_config_file=str(tmp_path / "config"), port=-1))
    with Server(Flags(models=str(base.parent), **FAST)) as server:
        with pytest.raises(ValueError, match="No request-logger-creator provided"):
            server.reconfigure(text_format.Parse(asked, protocol.ModelServerConfig(), descriptor_pool=protocol.pool))
        with Client(server.address) as client:
            assert answer(client) == 1


def test_reload_over_grpc(base, versions, tmp_path):
    publish(versions, tmp_path / "more" / "other", 3)
    with (
        Server(Flags(model_base_path=str(base), model_name="affine", **FAST)) as server,
        Client(server.address) as client,
    ):
        import grpc

        with grpc.insecure_channel(server.address) as channel:
            stub = model_service_pb2_grpc.ModelServiceStub(channel)

            def reload(*found, **labels):
                request = model_management_pb2.ReloadConfigRequest(
                    metric_names=["/tensorflow/serving/request_count"]
                )  # fmt: skip
                for name, path in found:
                    one = request.config.model_config_list.config.add(name=name, base_path=str(path))
                    one.model_platform = "tensorflow"
                    for label, number in labels.items():
                        one.version_labels[label] = number
                return stub.HandleReloadConfigRequest(request, timeout=20)

            def refused(*found, **labels):
                with pytest.raises(grpc.RpcError) as error:
                    reload(*found, **labels)
                return error.value.code().name, error.value.details()

            reply = reload(("affine", base), ("other", tmp_path / "more" / "other"))
            assert reply.metric[0].name == "/tensorflow/serving/request_count"
            assert float(client.predict("other", {"x": X})["y"][0, 0]) == 4  # it answers when the call has returned
            assert refused(("affine", base), ("affine", base)) == (
                "INVALID_ARGUMENT", "Illegal to list model affine multiple times in config list")  # fmt: skip
            assert refused(("affine", "relative"))[0] == "INVALID_ARGUMENT"
            assert refused(("affine", base), best=9) == (
                "FAILED_PRECONDITION", "Request to assign label to version 9 of model affine, which is not currently "
                "available for inference")  # fmt: skip
            assert answer(client) == 1  # nothing changed
            reload(("affine", base), best=1)
            publish(versions, base, 2)
            until(lambda: states(client) == {2: "AVAILABLE", 1: "END"})
            assert refused(("affine", base), best=1)[0] == "FAILED_PRECONDITION"  # it was there, but is no more
            reload(("affine", base), best=2)
            assert answer(client, label="best") == 2
            shutil.rmtree(base / "2")
            until(lambda: states(client).get(1) == "AVAILABLE")
            reload(("other", tmp_path / "more" / "other"))  # affine is gone
            until(lambda: states(client) == {2: "END", 1: "END"})
            with pytest.raises(ServerError, match="NOT_FOUND"):
                answer(client)


def test_a_vanished_base_path_changes_nothing_and_an_empty_one_unloads(base, caplog):
    with (
        Server(Flags(model_base_path=str(base), model_name="affine", **FAST)) as server,
        Client(server.address) as client,
    ):
        base.rename(base.parent / "away")
        until(lambda: caplog.text.count("the disk cannot be read") > 1)  # so the first time has had its effect
        assert answer(client) == 1
        (base.parent / "away").rename(base)
        shutil.rmtree(base / "1")
        until(lambda: states(client) == {1: "END"})


def names(server):
    return {name for name, served in server.core.models.served().items() if served}


@pytest.mark.parametrize("named", [True, False])
def test_new_models_of_a_tree_are_served(base, versions, monkeypatch, named):
    if not named:
        base.parent.rename(base.parent.with_name("saved_models"))
        monkeypatch.chdir(base.parents[1])
    with Server(Flags(models=str(base.parent) if named else "", **FAST)) as server:
        publish(versions, Path(server.flags.models or "saved_models") / "second", 2)
        until(lambda: names(server) == {"affine", "second"})


def test_a_tree_that_new_flags_name_is_followed_and_the_old_one_is_not(base, versions, tmp_path):
    other = tmp_path / "other"
    publish(versions, other / "second", 2)
    with Server(Flags(model_base_path=str(base), model_name="affine", **FAST)) as server:
        for tree, expected in ((base.parent, "affine"), (other, "second")):
            server.reload(dataclasses.replace(server.flags, model_base_path="", models=str(tree)))
            until(lambda expected=expected: names(server) == {expected})
        publish(versions, base.parent / "third", 3)
        publish(versions, other / "fourth", 3)
        until(lambda: names(server) == {"second", "fourth"})


def configuration(**bases):
    found = protocol.ModelServerConfig()
    for name, path in bases.items():
        found.model_config_list.config.add(name=name, base_path=str(path), model_platform="tensorflow")
    return found


def test_a_folder_that_is_gone_holds_up_no_other_model(base, versions, caplog):
    publish(versions, base.parent / "aaa", 1)
    with (
        Server(Flags(model_base_path=str(base), model_name="affine", **FAST)) as server,
        Client(server.address) as client,
        caplog.at_level(logging.CRITICAL, "cornucopia.serve"),
    ):
        server.core.models.configure(configuration(aaa=base.parent / "aaa", affine=base))
        shutil.rmtree(base.parent / "aaa")
        publish(versions, base, 2)
        until(lambda: answer(client) == 2)
        assert names(server) == {"aaa", "affine"}  # the other goes on with what it has


def test_a_configuration_that_was_refused_is_tried_again(base, versions, tmp_path, monkeypatch, caplog):
    """A label on a version that is still loading is refused, and taken once that version answers."""
    load, go = Server._load, threading.Event()

    def slow(self, name, number, folder):
        assert number == 1 or go.wait(20)
        return load(self, name, number, folder)

    monkeypatch.setattr(Server, "_load", slow)
    policy = "model_version_policy { all {} }"
    (tmp_path / "config").write_text(config(base, policy))
    flags = Flags(model_config_file=str(tmp_path / "config"), model_config_file_poll_wait_seconds=0.05, **FAST)
    with Server(flags) as server, Client(server.address, retries=0) as client:
        publish(versions, base, 2)
        (tmp_path / "config").write_text(config(base, policy + ' version_labels { key: "new" value: 2 }'))
        until(lambda: "the new configuration is not taken: Request to assign label to version 2" in caplog.text)
        go.set()
        until(lambda: server.core.models._models["affine"].labels == {"new": 2})
        assert answer(client, label="new") == 2


def test_a_tree_that_does_not_change_undoes_nothing(base, versions, tmp_path, monkeypatch):
    """What came over gRPC stays until the tree of models changes."""
    look, looks, go = Server._config, [], threading.Event()

    def watched(self, flags):
        if threading.current_thread().name == "config":
            go.wait(20)
            looks.append(flags)
        return look(self, flags)

    monkeypatch.setattr(Server, "_config", watched)
    publish(versions, tmp_path / "second", 2)
    with Server(Flags(models=str(base.parent), **FAST)) as server:
        server.core.models.configure(configuration(second=tmp_path / "second"))
        go.set()
        until(lambda: len(looks) > 1)  # so the first look has had its effect
        assert names(server) == {"second"}


def test_start_fails_with_what_is_wrong(base, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model is below"):
        Server(Flags(models=str(tmp_path / "none"), **FAST))
    (base / "1" / "saved_model.pb").write_bytes(b"nonsense")
    with pytest.raises(
        ValueError, match=r"Failed to start server. Error: 1 servable\(s\) did not become available: .*affine"
    ):
        Server(Flags(models=str(base.parent), **FAST))
    (tmp_path / "config").write_text("model_config_list {")
    with pytest.raises(ValueError, match=r"Error parsing text-format tensorflow.serving.ModelServerConfig"):
        Server(Flags(model_config_file=str(tmp_path / "config"), **FAST))


def told(process, text):
    """Return when a started server has written that to its log."""
    while text not in process.stderr.readline():
        assert process.poll() is None


def test_ports_open_when_models_answer_and_sigterm_drains(base, versions, tmp_path):
    waiting = tmp_path / "empty" / "late"
    waiting.mkdir(parents=True)
    with started(tmp_path, f"--model_base_path={waiting}", "--file_system_poll_wait_seconds=0.1") as process:
        told(process, "waiting for a version of default below")
        process.send_signal(signal.SIGHUP)  # heard when it answers
        os.set_blocking(process.stdout.fileno(), False)
        time.sleep(0.5)
        assert process.stdout.readline() == ""  # alive, and no port: nothing answers yet
        assert process.poll() is None
        publish(versions, waiting, 1)
        os.set_blocking(process.stdout.fileno(), True)
        address = re.search(r"gRPC on (\S+);", ready_line(process))[1]
        with Client(address, retries=0) as client:
            failed, answered, stop = [], [], threading.Event()

            def ask():
                while not stop.is_set():
                    try:
                        answered.append(client.predict("default", {"x": X}))
                    except ServerError as error:
                        failed.append(error)
                        return

            thread = threading.Thread(target=ask)
            thread.start()
            until(lambda: len(answered) > 50)
            process.send_signal(signal.SIGTERM)
            thread.join()
        # Refused at the door; gRPC cancels a call that comes in the moment in which it closes, and never began.
        assert {error.code.name for error in failed} <= {"UNAVAILABLE", "CANCELLED"}
        assert len(failed) == 1
    assert process.returncode == 0


def test_a_stopped_server_answers_what_is_in_flight_and_leaves_no_thread(base, monkeypatch):
    before, begun, go = set(threading.enumerate()), threading.Semaphore(0), threading.Event()
    with Server(Flags(models=str(base.parent), **FAST)) as server, Client(server.address, retries=0) as client:
        predict, answers = server.core.inference.predict, []

        def slow(*arguments):
            with arguments[4].waiting():  # so more threads are begun, which sleep afterwards
                begun.release()
                go.wait(20)
            return predict(*arguments)

        monkeypatch.setattr(server.core.inference, "predict", slow)
        asking = [threading.Thread(target=lambda: answers.append(answer(client))) for _ in range(4)]
        for thread in asking:
            thread.start()
        for _ in asking:
            assert begun.acquire(timeout=20)
        stopping = threading.Thread(target=server.stop, args=(20,))
        stopping.start()
        until(lambda: server._stopping.is_set())
        go.set()
        for thread in (*asking, stopping):
            thread.join()
        assert answers == [1] * 4
        until(lambda: not [thread for thread in set(threading.enumerate()) - before if thread.name == "answer"])


ASKED = b"GET /v1/models/affine HTTP/1.1\r\nHost: x\r\n\r\n"


@contextlib.contextmanager
def connected(server, **options):
    host, _, port = server.rest_address.rpartition(":")
    with socket.socket() as connection:
        for name, value in options.items():
            connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        connection.settimeout(20)
        connection.connect((host, int(port)))
        yield connection


def rest_of(connection):
    """All that comes until the server hangs up."""
    data = b""
    while part := connection.recv(65536):
        data += part
    return data


@pytest.fixture
def over_rest(base, monkeypatch):
    """A server, a semaphore that tells of each request that begins, and an event that lets all of them go on."""
    begun, go = threading.Semaphore(0), threading.Event()
    with Server(Flags(models=str(base.parent), rest_api_port=-1, **FAST)) as server:

        def slow(*_):
            begun.release()
            go.wait(20)
            return 200, "text/plain", bytes(10**7)

        monkeypatch.setattr(server._rest, "_answer", slow)
        yield server, begun, go


def stopped(server):
    """A thread that stops a server, which has begun to."""
    thread = threading.Thread(target=server.stop, args=(20,))
    thread.start()
    until(lambda: not server._rest._listening.is_serving())
    return thread


@pytest.mark.parametrize("when", ["while it is made", "while it is written"])
def test_a_stopped_server_writes_its_answers_to_their_end(over_rest, when):
    server, begun, go = over_rest
    with connected(server, SO_RCVBUF=65536) as slow:
        slow.sendall(ASKED)
        assert begun.acquire(timeout=20)
        read = b""
        if when == "while it is written":
            go.set()
            read = slow.recv(1000)
        stopping = stopped(server)
        go.set()
        time.sleep(0.6)  # far less than the server's 20 seconds
        head, _, body = (read + rest_of(slow)).partition(b"\r\n\r\n")
        assert len(body) == 10**7
        assert (b"Connection: close" in head) == (when == "while it is made")
    stopping.join(5)
    assert not stopping.is_alive()


def test_a_stopped_server_closes_idle_connections_and_answers_what_has_begun_to_come(over_rest):
    server, begun, go = over_rest
    with connected(server) as idle, connected(server) as new, connected(server) as half, connected(server) as gone:
        idle.sendall(ASKED)
        go.set()
        with http.client.HTTPResponse(idle) as answer:
            answer.begin()
            assert len(answer.read()) == 10**7
        assert begun.acquire(timeout=20)
        go.clear()
        gone.sendall(ASKED)
        assert begun.acquire(timeout=20)
        half.sendall(ASKED[:20])
        stopping = stopped(server)
        assert idle.recv(1) == new.recv(1) == b""
        gone.close()  # who does not wait for an answer is not waited for
        half.sendall(ASKED[20:])
        go.set()
        head, _, body = rest_of(half).partition(b"\r\n\r\n")
        assert b"Connection: close" in head
        assert len(body) == 10**7
    stopping.join(5)
    assert not stopping.is_alive()


def test_a_stopped_server_answers_every_request_that_it_began(base, monkeypatch):
    begun, came, answered, ends = [], [], [], []
    with Server(Flags(models=str(base.parent), rest_api_port=-1, **FAST)) as server:
        answers = server._rest._answer

        def slow(*arguments):
            begun.append(server._rest._listening.is_serving())
            time.sleep(random.uniform(0.0, 0.03))  # so that at most times some request is being answered
            return answers(*arguments)

        monkeypatch.setattr(server._rest, "_answer", slow)

        def ask():
            with contextlib.closing(http.client.HTTPConnection(server.rest_address, timeout=20)) as connection:
                connection.connect()
                came.append(1)
                connection.auto_open = False  # one connection, and no other after its end
                try:
                    while True:
                        connection.request("GET", "/v1/models/affine")
                        connection.getresponse().read()
                        answered.append(1)
                except (ConnectionError, http.client.NotConnected) as error:
                    ends.append(error)

        asking = [threading.Thread(target=ask) for _ in range(8)]
        for thread in asking:
            thread.start()
        until(lambda: len(answered) > 50 and len(came) == 8)
        begins = time.monotonic()
        server.stop(8)
        assert time.monotonic() - begins < 4
        for thread in asking:
            thread.join()
    assert len(ends) == 8
    assert len(answered) == len(begun)
    assert begun.count(False) <= 8  # as each client was told that its connection ends


def test_sigterm_while_it_waits_ends_it(tmp_path):
    (tmp_path / "late").mkdir()
    with started(tmp_path, f"--model_base_path={tmp_path / 'late'}") as process:
        told(process, "waiting for a version of default below")
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 0


def test_sigterm_while_it_loads_ends_it(tmp_path):
    """The load reads a pipe into which nobody writes, and so never ends."""
    pipe = tmp_path / "slow" / "1" / "saved_model.pb"
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)

    def read():
        with contextlib.suppress(OSError):  # as long as nobody reads
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)

    with started(tmp_path, f"--model_base_path={pipe.parents[1]}") as process:
        end = until(read, seconds=240)  # it imports TensorFlow before
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        finally:
            os.close(end)
    assert process.returncode == 0


def test_a_reload_is_not_awaited(base, versions, tmp_path):
    """SIGHUP takes up a model that does not come, then its correction, then SIGTERM: none waits for it."""
    late = tmp_path / "late"
    late.mkdir()

    def configure(*found):
        blocks = [f'config {{ name: "{name}" base_path: "{path}" model_platform: "tensorflow" }}'
                  for name, path in found]  # fmt: skip
        (tmp_path / "config").write_text(f"model_config_list {{ {' '.join(blocks)} }}")

    configure(("affine", base))
    with started(tmp_path, f"--model_config_file={tmp_path / 'config'}", "--file_system_poll_wait_seconds=0.1",
                 "--rest_api_port=-1") as process:  # fmt: skip
        address, rest = re.search(r"gRPC on (\S+); REST on (http://\S+);", ready_line(process)).groups()

        def ready():
            try:
                with urllib.request.urlopen(f"{rest}/readyz", timeout=10) as reply:
                    return reply.status == 200
            except urllib.error.HTTPError as error:
                error.close()
                return False

        with Client(address, retries=0) as client:
            assert ready()
            configure(("affine", base), ("late", late))
            process.send_signal(signal.SIGHUP)
            told(process, "flags are read again")
            assert not ready()  # the new model is awaited by nobody, and told to be missing
            assert answer(client) == 1
            (tmp_path / "config").write_text("nonsense {")
            process.send_signal(signal.SIGHUP)
            told(process, "the new flags are not taken: Error parsing text-format tensorflow.serving.ModelServerConfig")
            configure(("affine", base), ("second", base))  # takes effect although the other never came
            process.send_signal(signal.SIGHUP)
            told(process, "flags are read again")
            until(ready)
            assert float(client.predict("second", {"x": X})["y"][0, 0]) == 2
            configure(("affine", base), ("late", late))
            process.send_signal(signal.SIGHUP)
            told(process, "flags are read again")
            publish(versions, late, 3)  # and where it comes after all it answers
            until(ready)
            assert float(client.predict("late", {"x": X})["y"][0, 0]) == 4
            process.send_signal(signal.SIGTERM)
        process.wait(20)
    assert process.returncode == 0


def test_exit_code_of_a_failed_start(tmp_path):
    with started(tmp_path, f"--models={tmp_path}") as process:
        said = process.stderr.read()
    assert process.returncode == 255
    assert "no model is below" in said


def test_a_version_that_comes_back_while_it_is_still_in_use(base, versions):
    with (
        Server(Flags(model_base_path=str(base), model_name="affine", **FAST)) as server,
        Client(server.address) as client,
    ):
        held = server.core.models.find(protocol.ModelSpec(name="affine"))
        base.joinpath("1").rename(base / "away")
        until(lambda: states(client) == {1: "UNLOADING"})
        (base / "away").rename(base / "1")
        until(lambda: states(client) == {1: "AVAILABLE"})
        assert answer(client) == 1
        assert server.core.models.find(protocol.ModelSpec(name="affine")) is not held


def test_numbers_beyond_int64_are_no_versions(base, versions):
    shutil.copytree(versions / "2", base / "20261201123456123456")
    with Server(Flags(models=str(base.parent), **FAST)) as server, Client(server.address) as client:
        assert states(client) == {1: "AVAILABLE"}


def test_a_refused_configuration_changes_nothing(base, versions, tmp_path):
    with (
        Server(Flags(model_base_path=str(base), model_name="affine", **FAST)) as server,
        Client(server.address) as client,
    ):
        new = protocol.ModelServerConfig()
        new.model_config_list.config.add(name="affine", base_path="/elsewhere", model_platform="tensorflow")
        new.model_config_list.config.add(name="second", base_path="/x", model_platform="other")
        with pytest.raises(ValueError, match="requests unsupported platform other"):
            server.reconfigure(new)
        publish(versions, base, 2)
        until(lambda: answer(client) == 2)  # it still looks where it looked


def test_an_empty_configuration_unloads_nothing_and_an_empty_list_all(base, tmp_path, caplog):
    """Who writes a file without renaming it leaves it empty for a moment."""
    path = tmp_path / "config"
    path.write_text("")
    flags = Flags(model_config_file=str(path), model_config_file_poll_wait_seconds=0.05, **FAST)
    with Server(flags) as server, Client(server.address, retries=0) as client:
        path.write_text(config(base))  # from nothing to a list is no change of kind
        until(lambda: server.core.models.served().get("affine"))
        path.write_text("")
        until(lambda: "not taken: Cannot transition to requested config. It is only legal to" in caplog.text)
        assert answer(client) == 1
        path.write_text("model_config_list {}")
        until(lambda: not server.core.models.served())
        with pytest.raises(ServerError, match=r"NOT_FOUND: Servable not found for request: Latest\(affine\)"):
            answer(client)


@pytest.mark.parametrize("batching", [False, True])
def test_a_refused_request_does_not_keep_its_version(base, versions, batching):
    flags = Flags(models=str(base.parent), rest_api_port=-1, enable_batching=batching, **FAST)
    with Server(flags) as server, Client(server.address, retries=0) as client:
        gc.disable()
        try:
            for address in (server.address, f"http://{server.rest_address}"):
                with Client(address, retries=0) as other, pytest.raises(ServerError):
                    other.predict("affine", {"x": np.ones((1, 2, 3), np.float32)[..., 0:0]}, signature="none")
                with Client(address, retries=0) as other, pytest.raises(ServerError):
                    other.predict("affine", {"z": X})
            publish(versions, base, 2)
            until(lambda: states(client) == {2: "AVAILABLE", 1: "END"})
        finally:
            gc.enable()


def test_of_two_names_of_one_version_the_last_counts(base, versions, caplog):
    shutil.copytree(versions / "2", base / "001")  # before "1" in the order of names
    with Server(Flags(models=str(base.parent), **FAST)) as server, Client(server.address) as client:
        assert states(client) == {1: "AVAILABLE"}
        assert answer(client, version=1) == 1
    assert f"{base / '001'} and {base / '1'} are one version; the second counts" in caplog.text


def labelled(base, **labels):
    """A configuration of all versions of a model with these labels."""
    found = "".join(f' version_labels {{ key: "{label}" value: {number} }}' for label, number in labels.items())
    return config(base, "model_version_policy { all {} }" + found)


def test_labels_of_versions_that_are_not_there(base, versions, tmp_path, caplog):
    """Where it is allowed a new label waits for its version; one in use moves only to a version that answers."""
    publish(versions, base, 2)
    path = tmp_path / "config"
    path.write_text(labelled(base, stable=1, next=3))
    flags = Flags(model_config_file=str(path), model_config_file_poll_wait_seconds=0.05, rest_api_port=-1,
                  allow_version_labels_for_unavailable_models=True, **FAST)  # fmt: skip
    with (
        Server(flags) as server,
        Client(server.address, retries=0) as client,
        Client(f"http://{server.rest_address}", retries=0) as rest,
    ):
        until(lambda: set(server.core.models.served()["affine"]) == {1, 2})
        for one in (client, rest):
            assert answer(one, label="stable") == 1
            with pytest.raises(ServerError, match=r"NOT_FOUND: Servable not found for request: Specific\(affine, 3\)"):
                answer(one, label="next")
        path.write_text(labelled(base, stable=4, next=3))
        until(lambda: "not taken: Request to assign label to version 4 of model affine, which is not" in caplog.text)
        assert answer(rest, label="stable") == 1
        publish(versions, base, 3)
        until(lambda: 3 in server.core.models.served()["affine"])
        path.write_text(labelled(base, stable=3, next=5))  # `next` is in use too, so nothing is taken
        until(lambda: "not taken: Request to assign label to version 5 of model affine" in caplog.text)
        path.write_text(labelled(base, stable=3, later=5))
        until(lambda: answer(client, label="stable") == 3)
        assert answer(rest, label="stable") == 3
        with pytest.raises(ServerError, match=r"Specific\(affine, 5\)"):
            answer(rest, label="later")
        with pytest.raises(ServerError, match="INVALID_ARGUMENT: Unrecognized servable version label: next"):
            answer(rest, label="next")


def test_a_label_whose_version_went_does_not_hold_up_other_flags(base, versions, tmp_path, caplog):
    publish(versions, base, 2)
    path = tmp_path / "config"
    path.write_text(labelled(base, stable=2))
    flags = Flags(model_config_file=str(path), allow_version_labels_for_unavailable_models=False, **FAST)
    with pytest.raises(ValueError, match="Failed to start server"):
        Server(flags)  # no version answers yet
    path.write_text(config(base, "model_version_policy { all {} }"))
    with Server(flags) as server:
        until(lambda: set(server.core.models.served()["affine"]) == {1, 2})
        path.write_text(labelled(base, stable=2))
        server.reload(server.flags)
        assert server.core.models._models["affine"].labels == {"stable": 2}
        shutil.rmtree(base / "2")
        until(lambda: set(server.core.models.served()["affine"]) == {1})
        server.reload(dataclasses.replace(server.flags, access_log=True))
        assert server.core.access is not None
        assert "not taken again: Request to assign label to version 2 of model affine, which is not" in caplog.text


def spoil_graph(folder):
    (folder / "saved_model.pb").write_bytes(b"nonsense")


def spoil_warm_up(folder):
    import tensorflow as tf

    (folder / "assets.extra").mkdir()
    log = protocol.PredictionLog()
    log.predict_log.request.model_spec.signature_name = "none"
    with tf.io.TFRecordWriter(str(folder / "assets.extra" / "tf_serving_warmup_requests")) as writer:
        writer.write(log.SerializeToString())


FAILED = {
    "nothing": (None, 5, "NOT_FOUND", "Could not find SavedModel .pb or .pbtxt at supplied export directory path: "),
    "graph": (spoil_graph, 15, "DATA_LOSS", "as binary proto"),
    "warm-up": (spoil_warm_up, 9, "FAILED_PRECONDITION", 'Serving signature key "none" not found.'),
}


@pytest.mark.parametrize(("spoil", "code", "name", "text"), FAILED.values(), ids=FAILED.keys())
def test_the_status_of_a_failed_load_says_why_until_it_comes_back(base, versions, caplog, spoil, code, name, text):
    bad = base / "2"
    flags = Flags(models=str(base.parent), rest_api_port=-1, **FAST)
    with (
        Server(flags) as server,
        Client(server.address, retries=0) as client,
        caplog.at_level(logging.CRITICAL, "cornucopia.serve"),
    ):

        def status(number):
            (one,) = server.core.models.status(specific(number)).model_version_status
            return one.state, one.status.error_code

        def specific(number):
            spec = protocol.ModelSpec(name="affine")
            spec.version.value = number
            return spec

        if spoil:
            part = base / ".part"
            shutil.copytree(versions / "2", part)
            spoil(part)
            part.rename(bad)
        else:
            bad.mkdir()
        until(lambda: states(client).get(2) == "END")
        assert status(2) == (50, code)
        assert status(1) == (30, 0)
        with urllib.request.urlopen(f"http://{server.rest_address}/v1/models/affine/versions/2", timeout=10) as reply:
            (found,) = json.loads(reply.read())["model_version_status"]
        assert (found["state"], found["status"]["error_code"]) == ("END", name)
        assert text in found["status"]["error_message"]
        # It has left, and what comes back under its number is tried.
        shutil.rmtree(bad)
        publish(versions, base, 3)
        until(lambda: answer(client) == 3)
        assert states(client)[2] == "END"
        publish(versions, base, 2)
        (base / "3").rename(base / ".away")
        until(lambda: answer(client) == 2)
        assert status(2) == (30, 0)


def test_examples_are_counted(tmp_path):
    from prometheus_client.parser import text_string_to_metric_families

    judge = serving_models.Judge()
    serving_models.save(judge, tmp_path / "judge" / "1", {"serving_default": judge.classify, "regress": judge.regress})
    with Server(Flags(models=str(tmp_path), rest_api_port=-1, **FAST)) as server:
        for address in (server.address, f"http://{server.rest_address}"):
            with Client(address) as client:
                client.classify("judge", [{"x": 1.0}, {"x": 2.0}, {"x": 3.0}])
                client.regress("judge", [{"x": 1.0}], signature="regress")
        url = f"http://{server.rest_address}/monitoring/prometheus/metrics"
        with urllib.request.urlopen(url, timeout=10) as reply:
            text = reply.read().decode()
    samples = {(one.name, one.labels.get("le")): one.value
               for family in text_string_to_metric_families(text) for one in family.samples
               if one.labels.get("model") == "judge"}  # fmt: skip
    name = ":tensorflow:serving:request_example_count"
    assert samples[f"{name}s_count", None] == 4  # requests, by how many examples they had
    assert samples[f"{name}s_sum", None] == samples[f"{name}_total", None] == 8
    assert [samples[f"{name}s_bucket", limit] for limit in ("1", "2", "4")] == [2, 2, 4]
