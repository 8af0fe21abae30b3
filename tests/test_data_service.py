"""Batches that other hosts make: each example once an epoch, in order, and what is said when they cannot."""

import contextlib
import ctypes
import dataclasses
import importlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import until
from test_workers import close, together

from shared import command, data, data_service, run, training
from shared.training import service, workers

SERVERS = tf.data.experimental.service
COUNT, BATCH = 83, 8
STEPS = COUNT // BATCH


def read(indices, step):
    noise = tf.random.stateless_uniform([BATCH], seed=tf.stack([1, tf.cast(step, tf.int32)]))
    return {"index": indices}, noise


def splits(reading=read):
    empty = tf.data.Dataset.range(0)
    return data.Splits(
        stream=data.stream(COUNT, batch=BATCH, seed=1, read=reading), steps=STEPS, train=empty, validation=empty,
        test=empty, preprocess=None, names=(), request={}, about={},
    )  # fmt: skip


def end(server):
    """Stop a server and keep it for ever: in TensorFlow 2.21 a worker's destructor may wait for a thread of its own."""
    server._stop()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(server))


@contextlib.contextmanager
def servers(count=2):
    """A dispatcher and workers in this process; gives the address and the workers."""
    dispatcher = SERVERS.DispatchServer(SERVERS.DispatcherConfig(port=0))
    joined = [SERVERS.WorkerServer(SERVERS.WorkerConfig(dispatcher_address=dispatcher.target.removeprefix("grpc://"),
                                                        heartbeat_interval_ms=100)) for _ in range(count)]  # fmt: skip
    try:
        yield dispatcher.target, joined
    finally:
        for server in (*joined, dispatcher):
            end(server)


@contextlib.contextmanager
def command_of(folder, *flags):
    """`cornucopia data-service` in its own process; gives the process and the address that it prints."""
    words = [Path(sys.executable).with_name("cornucopia"), "data-service", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, cwd=folder, **pipes) as process:
        try:
            line = process.stdout.readline()
            yield process, re.search(r"--data-service=(grpc://\S+)$", line.strip())[1]
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (0, -signal.SIGKILL)


def reader(address, made=None):
    config = run.Config(name="run", data_service=address)
    return service.Reader(config, made or splits(), tf.distribute.get_strategy())


def same(some, others):
    for one, other in zip(some, others, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("step", [0, 7])
def test_two_workers_make_every_example_once_in_the_order_of_learning(step):
    with servers() as (address, joined):
        remote = reader(address).stream(step)
        assert remote.element_spec == splits().stream(step).element_spec
        batches = list(remote.take(3 * STEPS).as_numpy_iterator())
        assert [server._num_tasks() for server in joined] == [1, 1]
    same(batches, splits().stream(step).take(3 * STEPS).as_numpy_iterator())
    for epoch in range(1 if step else 0, 3):
        at = epoch * STEPS - step
        seen = np.concatenate([inputs["index"] for inputs, _ in batches[at : at + STEPS]])
        assert len(set(seen.tolist())) == len(seen) == STEPS * BATCH


def test_two_trainings_that_share_a_job_get_every_example_once(monkeypatch):
    parts = {}
    monkeypatch.setattr(workers, "many", lambda devices: True)
    monkeypatch.setattr(workers, "count", lambda: 2)
    monkeypatch.setattr(workers, "lot", lambda devices: 5)
    with servers() as (address, _):
        for index in range(2):
            monkeypatch.setattr(workers, "index", lambda index=index: index)
            parts[index] = reader(address).stream(0).take(STEPS)

        def consume(index):
            parts[index] = list(parts[index].as_numpy_iterator())

        threads = [threading.Thread(target=consume, args=[index]) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    for (first, _), (second, _), (whole, _) in zip(parts[0], parts[1], splits().stream(0), strict=False):
        np.testing.assert_array_equal([*first["index"], *second["index"]], whole["index"])
    seen = np.concatenate([inputs["index"] for part in parts.values() for inputs, _ in part])
    assert len(set(seen.tolist())) == len(seen) == STEPS * BATCH


@pytest.mark.parametrize("index", [None, 1])
def test_a_lost_step_is_made_here(index, monkeypatch, capsys):
    monkeypatch.setattr(service, "AHEAD", 3)
    one = reader("grpc://nowhere:1")
    whole = splits().stream(4).take(9)
    made = splits().stream(4, numbered=True).take(14).filter(lambda at, batch: (at != 6) & (at != 9))
    if index is not None:
        one._index, one._of = index, 2
        made = made.map(lambda at, batch: (at, tf.nest.map_structure(lambda part: part[4:], batch)))
        whole = whole.map(lambda *batch: tf.nest.map_structure(lambda part: part[4:], batch))
    found = one._in_order(made, 4)
    same([next(found) for _ in range(9)], whole)
    assert capsys.readouterr().out.count("was lost with its worker") == 2


def test_a_worker_joins_a_dispatcher_elsewhere(tmp_path):
    with servers(0) as (address, _):
        with command_of(tmp_path, f"--dispatcher={address.removeprefix('grpc://')}") as (_, printed):
            assert printed == address
            until(lambda: data_service.registered(address))
            same(reader(address).stream(0).take(20), splits().stream(0).take(20))
        with pytest.raises(ConnectionError, match=r"no worker of the data service at .* can be reached from here"):
            data_service.check(address)


def test_a_service_that_goes_is_told(monkeypatch):
    monkeypatch.setattr(service, "PATIENCE", 0.5)
    with servers() as (address, _):
        one = reader(address)
        batches = iter(one.stream(0))
        next(batches)
    with (
        pytest.raises(ConnectionError, match=r"no data service answers at .*go on with --resume --name=run"),
        one.telling(),
    ):
        for _ in batches:
            pass


@pytest.mark.parametrize("task", command.tasks())
def test_which_tasks_streams_can_be_sent(task, tmp_path):
    module = importlib.import_module(f"apps.{task}")
    config = dataclasses.replace(module.SMOKE, name="run", runs=str(tmp_path))
    config.folder.mkdir()
    made = module.load(config)
    with servers() as (address, _):
        if task == "rl.ppo":
            with pytest.raises(ValueError, match="makes its examples as it learns"):
                reader(address, made)
        else:
            remote = reader(address, made).stream(1).take(2)
            assert remote.element_spec == made.stream(1).element_spec
            same(remote, made.stream(1).take(2))


def test_pictures_on_disk_cannot_be_sent(tmp_path):
    rows = data.gather(np.memmap(tmp_path / "rows", np.float32, "w+", shape=(COUNT, 2)))
    with servers() as (address, _), pytest.raises(ValueError, match=r"cannot be sent to a data service .*from memory"):
        reader(address, splits(lambda indices, step: (rows(indices), indices))).stream(0)


def test_addresses(tmp_path):
    with pytest.raises(ValueError, match="give grpc://HOST:PORT"):
        data_service.check("localhost:5050")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(ConnectionError, match=f"no data service answers at grpc://127.0.0.1:{port}"):
        data_service.check(f"grpc://127.0.0.1:{port}")
    assert time.monotonic() - begun < data_service.WAIT + 1
    config = run.Config(name="a", data_service=f"grpc://127.0.0.1:{port}", runs=str(tmp_path / "runs"))
    with pytest.raises(ConnectionError, match="no data service answers"):
        training.begin("task", config)
    assert not config.folder.exists()
    with servers(0) as (address, _):
        with pytest.raises(ConnectionError, match="has no workers; start some"):
            data_service.check(address)
        target = address.removeprefix("grpc://")
        far = SERVERS.WorkerServer(SERVERS.WorkerConfig(dispatcher_address=target, worker_address="nowhere.invalid:1"))
        with pytest.raises(ConnectionError, match=r"can be reached from here \(nowhere.invalid:1\); start"):
            data_service.check(address)
        near = SERVERS.WorkerServer(SERVERS.WorkerConfig(dispatcher_address=target))
        data_service.check(address)
        end(near)
        end(far)


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on port {port}"):
            data_service._started(SERVERS.DispatchServer, SERVERS.DispatcherConfig(port=port))


def test_a_run_goes_on_without_the_service(tmp_path):
    folders = {"runs": str(tmp_path / "runs"), "saved_models": str(tmp_path / "saved_models")}
    with servers() as (address, _):
        training.begin("task", run.Config(name="a", data_service=address, **folders))
    assert training.begin("task", run.Config(name="a", resume=True, **folders)).folder.is_dir()


# As a user starts it.


def test_two_commands_train_and_serve(tmp_path, forked):
    with command_of(tmp_path, "--port=0", "--workers=2") as (process, address):
        said = forked("train", "vision.classify", "--size=8", "--width=8", "--batch=64", "--epochs=1", "--name=a",
                          f"--data-service={address}").stdout  # fmt: skip
        assert "8 answers over gRPC equal the model in memory" in said
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_two_devices_and_two_processes_learn_as_one(tmp_path):
    (one,) = together(tmp_path / "one", "plain", count=1, strategy="one")
    with command_of(tmp_path, "--port=0", "--workers=2") as (_, address):
        (mirrored,) = together(tmp_path / "mirrored", "plain", count=1, strategy="mirrored", service=address)
        first, second = together(tmp_path / "workers", "plain", service=address)
    close(one, mirrored, within=1e-5)
    close(one, first, within=1e-5)
    assert first["weights"] == second["weights"]
