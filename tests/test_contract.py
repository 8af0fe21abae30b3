"""Every task has the names of the contract, and its SMOKE config takes it from raw data to a served answer."""

import ast
import dataclasses
import importlib
import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT

from shared import command, run
from shared.data import named

TASKS = command.tasks()


@pytest.fixture(params=TASKS)
def task(request):
    return importlib.import_module(f"apps.{request.param}")


def test_file_system_is_the_registry():
    assert "vision.classify" in TASKS
    assert len(TASKS) == len(list((ROOT / "apps").glob("*/[!_]*.py")))


def test_names_and_their_order(task):
    tree = ast.parse(Path(task.__file__).read_text())
    names = []
    for node in tree.body:
        names += [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        targets = node.targets if isinstance(node, ast.Assign) else []
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    assert set(run.CONTRACT) <= set(names)
    steps = [name for name in names if name in ("Config", "load", "build", "train", "measure", "Endpoint")]
    assert steps == ["Config", "load", "build", "train", "measure", "Endpoint"]


def test_config(task):
    assert issubclass(task.Config, run.Config)
    assert isinstance(task.SMOKE, task.Config)
    head = command.head(task.__name__.removeprefix("apps."))
    fields = [(field.name, field.default) for field in dataclasses.fields(task.Config)]
    assert [(field.name, field.default) for field in dataclasses.fields(head)] == fields


def test_expectations_name_data_that_can_be_found(task):
    assert set(task.EXPECT) <= set(named.DATASETS) | set(gymnasium.registry) | {""}
    assert task.EXPECT


@pytest.fixture
def smoke(task, cornucopia, tmp_path):
    name = task.__name__.removeprefix("apps.")
    flags = []
    for field in dataclasses.fields(task.SMOKE):
        value, flag = getattr(task.SMOKE, field.name), field.name.replace("_", "-")
        if value != field.default:
            switch = f"--{flag}" if value else f"--no-{flag}"
            flags.append(switch if isinstance(value, bool) else f"--{flag}={value}")
    done = cornucopia("train", name, *flags)
    return name, done.stdout, tmp_path / "saved_models" / name / "1"


def test_smoke(task, smoke, python):
    name, printed, version = smoke
    assert "over gRPC equal the model in memory" in printed
    extra = version / "assets.extra"
    report = json.loads((extra / "metrics.json").read_text())
    assert report["task"] == name
    for metric, value in report["test"].items():
        assert value["low"] <= value["value"] <= value["high"], metric
    assert set(report["baseline"]) & set(report["test"])
    assert {"train_seconds", "examples_per_second", "input_wait", "peak_bytes"} <= set(report["cost"])
    config = json.loads((extra / "config.json").read_text())["config"]
    assert task.Config(**config)  # enough to repeat the run
    assert name in (extra / "card.md").read_text()

    # The same answer from the bare SavedModel, in a process that has none of the suite.
    records = list(tf.data.TFRecordDataset(str(extra / "tf_serving_warmup_requests")).as_numpy_iterator())
    assert len(records) == 2
    served = python(
        "import sys, json, tensorflow as tf\n"
        "from tensorflow_serving.apis import prediction_log_pb2\n"
        "answer = tf.saved_model.load(sys.argv[1]).signatures['serving_default']\n"
        "for record in tf.data.TFRecordDataset(sys.argv[2]).as_numpy_iterator():\n"
        "    inputs = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request.inputs\n"
        "    outputs = answer(**{k: tf.constant(tf.make_ndarray(v)) for k, v in inputs.items()})\n"
        "print(json.dumps(sorted((k, list(v.shape)) for k, v in outputs.items())))\n"
        "import keras\n"
        "print(keras.saving.load_model(sys.argv[3]).count_params())",
        str(version), str(extra / "tf_serving_warmup_requests"), str(extra / "model.keras"),
    )  # fmt: skip
    outputs, parameters = served.strip().splitlines()
    assert all(shape[0] > 1 for _, shape in json.loads(outputs))
    assert int(parameters) > 0
    assert np.isfinite(report["served"]["largest_difference"])
