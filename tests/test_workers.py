"""Many processes train one model: the same losses as one, equal weights, and a clean end when one fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import numpy as np
import one_worker
import pytest

from shared.launch import free_ports
from shared.training import workers


def workers_of(function, *words, count, folder, logs):
    """Call a function in so many processes that know of each other; their exit codes."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
    processes = []
    for index in range(count):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        env = {"TF_CONFIG": json.dumps(task)} if count > 1 else {}
        processes.append(forks.start(function, *words, folder=folder, out=logs / f"worker-{index}.log", env=env))
    return [forks.ended(process) for process in processes]


def together(folder, kind, *, count=2, strategy="multiworker", service=""):
    """Train a small network in so many processes; their results, or the first's output where one failed."""
    folder.mkdir()
    if any(workers_of(one_worker.main, folder, kind, strategy, service, count=count, folder=folder, logs=folder)):
        return (folder / "worker-0.log").read_text()
    return [json.loads((folder / f"result-{index}.json").read_text()) for index in range(count)]


def close(one, other, *, within):
    for part in ("history", "evaluated"):
        for metric, curve in one[part].items():
            np.testing.assert_allclose(curve, other[part][metric], atol=within, err_msg=metric)
    np.testing.assert_allclose(one["predicted"], other["predicted"], atol=10 * within)


@pytest.mark.parametrize(("kind", "within"), [("normalised", 1e-4), ("custom", 1e-5)])  # plain: test_data_service.py
def test_one_device_two_devices_two_workers_learn_alike(tmp_path, kind, within):
    (one,) = together(tmp_path / "one", kind, count=1, strategy="one")
    (mirrored,) = together(tmp_path / "mirrored", kind, count=1, strategy="mirrored")
    first, second = together(tmp_path / "workers", kind)
    assert len(one["history"]["loss"]) == 5  # of 10 steps
    close(one, mirrored, within=within)
    close(one, first, within=within)
    assert first["weights"] == second["weights"]  # to the bit
    assert len(first["predicted"]) == 83
    assert first["predicted"] == second["predicted"]
    assert not list((tmp_path / "workers" / "run").glob("draft-*"))


def test_all_stop_at_one_step_when_the_time_of_one_is_up(tmp_path):
    first, second = together(tmp_path / "workers", "limited")
    assert first["steps"] == second["steps"] == 100  # of 5 epochs of 250
    assert len(first["history"]["val_loss"]) == len(second["history"]["val_loss"]) == 1
    assert first["weights"] == second["weights"]
    (kept,) = (tmp_path / "workers" / "run").glob("checkpoint-*")
    assert json.loads((kept / "state.json").read_text())["steps_done"] == 100


@pytest.mark.parametrize(("steps", "expected"), [(250, [100, 200, 250]), (10, [10]), (100, [100])])
def test_workers_ask_each_other_for_the_time_at_the_same_steps(monkeypatch, tmp_path, steps, expected):
    from types import SimpleNamespace

    from shared import run
    from shared.training import fitting

    asked = []
    monkeypatch.setattr(workers, "many", lambda strategy: True)
    monkeypatch.setattr(workers, "any_of", lambda strategy, flag: asked.append(flag))
    keeper = fitting._Keeper(run.Config(max_hours=1.0, runs=str(tmp_path)), SimpleNamespace(steps=steps))
    at = [done for done in range(1, steps + 1) if keeper._too_long(done) is None]
    assert at == expected
    assert asked == [False] * len(expected)


def test_keras_still_needs_the_mend(tmp_path):
    """When this fails, Keras has learned to fit over many workers: take the mend out of shared/training/workers.py."""
    said = together(tmp_path / "workers", "plain", strategy="unmended")
    assert isinstance(said, str), "fit works without the mend"
    assert "PerReplica" in said, said  # Keras takes what each device got for a tensor


def test_who_is_who(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert not workers.configured()
    assert workers.chief()
    cluster = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
    assert workers.configured()
    assert workers.index() == 1
    assert not workers.chief()
    cluster = {"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
    assert workers.index() == 1
    monkeypatch.delenv("TF_CONFIG")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert workers.configured()
    assert workers.index() == 2


def test_a_cluster_of_one_is_refused(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(ValueError, match=r"--strategy=multiworker needs TF_CONFIG, or Slurm"):
        workers.join()


def test_moving_statistics_become_those_of_all_devices():
    import keras
    import tensorflow as tf

    from shared import training

    devices = training.strategy("mirrored")
    with devices.scope():
        model = keras.Sequential([keras.Input([3]), keras.layers.BatchNormalization()])
    mean = model.layers[0].moving_mean

    def count():
        number = tf.distribute.get_replica_context().replica_id_in_sync_group
        mean.assign(tf.fill([3], tf.cast(number, tf.float32)))

    def kept():
        return [one.numpy().tolist() for one in devices.experimental_local_results(mean.value)]

    devices.run(count)
    assert kept() == [[0.0] * 3, [1.0] * 3]  # each has its own
    workers.average_moments(devices, model)
    assert kept() == [[0.5] * 3, [0.5] * 3]


def test_export_of_mirrored_variables(tmp_path):
    """A model whose variables lie on two devices is served as it answers in memory."""
    import keras
    import tensorflow as tf

    from shared import export, training
    from shared.serving import checking

    class Endpoint(tf.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="x")])
        def __call__(self, x):
            return {"y": self.model(x, training=False)}

    with training.strategy("mirrored").scope():
        endpoint = Endpoint(keras.Sequential([keras.Input([4]), keras.layers.Dense(3)]))
    export.save(endpoint, tmp_path / "1", {"serving_default": endpoint.__call__})
    found = checking.check(tmp_path / "1", endpoint, "m", {"x": np.ones((2, 4), np.float32)})
    assert found["answers"] == 2


# As a user starts it.

SMALL = ("vision.classify", "--size=8", "--width=8", "--batch=64", "--deterministic")


def launched(tmp_path, *flags):
    command = [Path(sys.executable).with_name("cornucopia"), "launch", "--workers=2", *flags]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("words", ["--workers 0 TASK", "TASK --workers=0 --data pictures", "--data=a TASK --workers 0"])
def test_flags_of_launch_may_stand_before_the_task_and_apart_from_their_values(mistaken, words):
    assert "--workers=0 trains nothing" in mistaken("launch", *words.replace("TASK", "vision.classify").split()).err


def assert_learned_alike_and_exported_once(folder, task, said):
    assert "over gRPC equal the model in memory" in said
    assert [path.name for path in (folder / "saved_models" / task).iterdir()] == ["1"]  # the chief's
    logs = [(folder / "runs" / "whole" / f"worker-{index}.log").read_text() for index in range(2)]
    first, second = (re.search(r"^digest +([0-9a-f]{16}) of the weights", log, re.MULTILINE)[1] for log in logs)
    assert first == second


def test_launch_trains_exports_and_a_killed_worker_stops_all(tmp_path):
    whole = ("train", *SMALL, "--epochs=3", "--name=whole", "--strategy=multiworker")
    (tmp_path / "runs" / "whole").mkdir(parents=True)
    codes = workers_of(forks.cornucopia, *whole, count=2, folder=tmp_path, logs=tmp_path / "runs" / "whole")
    said = (tmp_path / "runs" / "whole" / "worker-0.log").read_text()
    assert codes == [0, 0], said
    assert_learned_alike_and_exported_once(tmp_path, "vision.classify", said)
    log = tmp_path / "runs" / "killed" / "worker-1.log"
    with launched(tmp_path, *SMALL, "--epochs=3", "--name=killed") as killed:
        end = time.monotonic() + 120
        while not log.exists() or " 1/3 " not in log.read_text():
            assert time.monotonic() < end, log.read_text()
            assert killed.poll() is None
            time.sleep(0.05)
        (pid,) = children_with(killed.pid, "worker", index=1)
        os.kill(pid, signal.SIGKILL)
        said = killed.communicate(timeout=200)[0]
    assert killed.returncode == 1
    assert "ended with exit code" in said
    with launched(tmp_path, *SMALL, "--epochs=3", "--name=killed", "--resume") as resumed:
        said = resumed.communicate(timeout=200)[0]
    assert resumed.returncode == 0, said
    assert "of 3 epochs" in said
    assert "over gRPC equal the model in memory" in said
    assert "runs/killed\n" in log.read_text()  # what was told before stays
    assert "runs/killed (going on)" in log.read_text()

    import keras

    models = [keras.saving.load_model(tmp_path / "saved_models" / "vision.classify" / number / "assets.extra" /
                                      "model.keras") for number in ("1", "2")]  # fmt: skip
    for want, have in zip(*[model.get_weights() for model in models], strict=True):
        np.testing.assert_array_equal(want, have)


def children_with(pid, kind, *, index):
    import psutil

    found = []
    for child in psutil.Process(pid).children():
        task = json.loads(child.environ()["TF_CONFIG"])["task"]
        if task == {"type": kind, "index": index}:
            found.append(child.pid)
    return found


SMALLEST = {  # vision.classify stands above
    "speech.spot": ("--data=words", "--width=8", "--batch=16", "--sample-rate=4000", "--seconds=0.5", "--bins=16",
                    "--masks=0"),
    "nlp.classify": ("--data=table.csv", "--networks=1", "--width=8", "--filters=8", "--batch=16"),
    "recommendation.retrieve": ("--batch=64", "--length=20", "--width=16", "--layers=1"),
    "rl.ppo": ("--steps=512", "--width=8", "--batch=256", "--environments=4", "--passes=2", "--no-xla"),
    "generative.write": ("--data=lines.txt", "--batch=8", "--context=16", "--layers=1", "--heads=2", "--width=16"),
}  # fmt: skip


@pytest.mark.usefixtures("words", "table")
@pytest.mark.parametrize("task", SMALLEST)
def test_first_task_of_each_app_learns_in_two_processes(tmp_path, task):
    (tmp_path / "lines.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    words = ("train", task, *SMALLEST[task], "--epochs=1", "--name=whole", "--strategy=multiworker")
    logs = tmp_path / "runs" / "whole"
    logs.mkdir(parents=True)
    codes = workers_of(forks.cornucopia, *words, count=2, folder=tmp_path, logs=logs)
    said = (logs / "worker-0.log").read_text()
    assert codes == [0, 0], said
    assert_learned_alike_and_exported_once(tmp_path, task, said)
