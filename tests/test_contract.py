"""Every task has the names of the contract, and its SMOKE config takes it from raw data to a served answer."""

import ast
import dataclasses
import importlib
import json
import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import scipy.io.wavfile
from conftest import ROOT
from PIL import Image

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


@pytest.mark.parametrize("flag", ["--batch=-1", "--batch=0", "--epochs=0", "--rate=nan", "--rate=-0.1", "--seed=-1"])
def test_numbers_that_no_training_can_use_are_refused_at_once(task, flag, mistaken):
    name = flag.split("=")[0]
    default = task.Config.__dataclass_fields__[name.strip("-")].default
    said = mistaken("train", task.__name__.removeprefix("apps."), flag).err
    least = int(name in ("--batch", "--epochs"))
    assert f"{flag}: expected {least} or more; the default is {default}" in re.sub(r"[\s│]+", " ", said)


def test_expectations_name_data_that_can_be_found(task):
    assert set(task.EXPECT) <= set(named.DATASETS) | set(gymnasium.registry) | {""}
    assert task.EXPECT


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A folder for what all tasks export."""
    return tmp_path_factory.mktemp("saved_models")


def trained(task, cornucopia, exports):
    """Train a task by its SMOKE config, as a user does; what was printed."""
    flags = [f"--saved-models={exports}"]
    for field in dataclasses.fields(task.SMOKE):
        value, flag = getattr(task.SMOKE, field.name), field.name.replace("_", "-")
        if value != field.default:
            switch = f"--{flag}" if value else f"--no-{flag}"
            flags.append(switch if isinstance(value, bool) else f"--{flag}={value}")
    return cornucopia("train", task.__name__.removeprefix("apps."), *flags).stdout


def test_smoke(task, cornucopia, exports):
    name = task.__name__.removeprefix("apps.")
    assert "over gRPC equal the model in memory" in trained(task, cornucopia, exports)
    version = exports / name / "1"
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
    assert np.isfinite(report["served"]["largest_difference"])


def export_all(cornucopia, exports):
    for name in TASKS:
        if not (exports / name / "1").is_dir():  # this test alone was asked for
            trained(importlib.import_module(f"apps.{name}"), cornucopia, exports)


def test_exports_answer_without_the_suite(cornucopia, exports, python):
    """The bare SavedModels answer their warm-up requests, and the networks open, in a process that has neither `apps`
    nor `shared`.
    """
    export_all(cornucopia, exports)
    told = python(
        "import sys, json, pathlib, tensorflow as tf, keras\n"
        "from tensorflow_serving.apis import prediction_log_pb2\n"
        "for version in map(pathlib.Path, sys.argv[1:]):\n"
        "    answer = tf.saved_model.load(str(version)).signatures['serving_default']\n"
        "    extra = version / 'assets.extra'\n"
        "    log = tf.data.TFRecordDataset(str(extra / 'tf_serving_warmup_requests'))\n"
        "    shapes = []\n"
        "    for record in log.as_numpy_iterator():\n"
        "        inputs = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request.inputs\n"
        "        outputs = answer(**{k: tf.constant(tf.make_ndarray(v)) for k, v in inputs.items()})\n"
        "        shapes.append([list(value.shape) for value in outputs.values()])\n"
        "    network = keras.saving.load_model(extra / 'model.keras')\n"
        "    print(json.dumps([version.parent.name, network.count_params(), shapes]))",
        *(str(exports / name / "1") for name in TASKS),
    )  # fmt: skip
    found = [json.loads(line) for line in told.splitlines() if line.startswith("[")]
    assert [name for name, _, _ in found] == TASKS
    for name, parameters, (one, many) in found:
        assert parameters > 0, name
        assert {shape[0] for shape in one} == {1}, name
        (count,) = {shape[0] for shape in many}
        assert count > 1, name


def test_one_server_answers_for_every_task(cornucopia, exports, serving, tmp_path):
    """As a user asks it: a server in a process of its own, and files that other programs wrote."""
    export_all(cornucopia, exports)
    (tmp_path / "saved_models").symlink_to(exports)
    time = np.arange(8000) / 16_000
    scipy.io.wavfile.write(tmp_path / "hum.wav", 16_000, np.int16(9000 * np.sin(2 * np.pi * 440 * time)))
    Image.fromarray(np.uint8(255 * np.eye(20))).save(tmp_path / "line.png")
    ranked = r"label +(\S.*)\nscore +([01]\.\d{4})\ntop 1 +\2  \1\n(top \d+ +[01]\.\d{4}  \S.*\n)+"
    number = r"-?\d+\.\d{4}"
    asked = {
        "vision.classify": (["--image=line.png"], ranked),
        "speech.spot": (["--audio=hum.wav"], ranked),
        "nlp.classify": (["--text=Solve a system of linear equations"], ranked),
        "recommendation.retrieve": (
            ["--user=7", "--history=1, 2, no such item"],
            rf"basis +history\ntop_items +(\d+ ){{9}}\d+\nunknown +1\n(top \d+ +{number}  \d+\n){{10}}",
        ),
        "rl.ppo": (["--observation=0,0,0.1,0.2"], rf"action +[01]\nprobabilities {number} {number}\nvalue +{number}\n"),
        "generative.write": (
            ["--prompt=The statement", "--max-tokens=20"],
            rf"text +(?s:.+)\nlog_probability {number}\ntokens +(?s:.+)\nunknown +0\n",
        ),
    }
    assert set(asked) == set(TASKS)
    with serving() as address:
        for name, (inputs, expected) in asked.items():
            answer = cornucopia("ask", name, *inputs, f"--address={address}").stdout
            assert re.fullmatch(expected, answer), f"{name}: {answer}"
