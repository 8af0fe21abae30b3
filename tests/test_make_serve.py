"""make serve: which server it starts, and the list of models that it starts it on."""

import concurrent.futures
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import serving_models
from conftest import ROOT
from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from shared import export
from shared.run import Config
from shared.serving.client import Client
from shared.serving.flags import Flags
from shared.serving.server import Server


def script(path, says):
    """A program that says its name and its arguments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "{says} $*"\n')
    path.chmod(0o755)


STARTS = {
    True: "tensorflow_model_server --port=8500 --rest_api_port=8501 "
          "--model_config_file=saved_models/models.config --x=1",
    False: "cornucopia serve --port=8500 --rest_api_port=8501 --x=1",
}  # fmt: skip


@pytest.mark.parametrize("there", [True, False])
def test_the_server_that_is_there_is_started(tmp_path, there):
    """In a tree of its own that is set up: with stand-ins for both servers, and no Python to set it up with."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    script(tmp_path / ".venv" / "bin" / "cornucopia", "cornucopia")
    (tmp_path / ".venv" / ".ready").touch()  # after what it is made of, and so not made again
    path = tmp_path / "path"
    path.mkdir()
    if there:
        script(path / "tensorflow_model_server", "tensorflow_model_server")
    command = [shutil.which("make"), "--no-print-directory", "serve", "PYTHON=/nowhere/python", "options=--x=1"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": str(path)}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    told = f"starting tensorflow_model_server, found at {path / 'tensorflow_model_server'}" if there else (
        "starting cornucopia serve; tensorflow_model_server is not on the PATH")  # fmt: skip
    assert done.stdout.splitlines() == [told, STARTS[there]]


REPORT = {
    "task": "a.task", "protocol": "none", "folds": 0, "test": {}, "baseline": {},
    "cost": {"epochs": 1, "best_epoch": 1, "train_seconds": 1.0, "examples_per_second": 1.0, "peak_bytes": 1},
}  # fmt: skip


def published(root, task, scale):
    """Publish a version of a model that multiplies by a number; its folder."""
    endpoint = serving_models.Affine(scale)
    candidate = export.write(endpoint, Config(saved_models=str(root)), task, {"x": np.ones((3, 2), np.float32)})
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    about = {"protocol": "none"}
    return export.publish(candidate, model=model, task=SimpleNamespace(__doc__="A task."), report=REPORT, about=about)


def listed(root):
    """Name -> base path in `models.config`, as TensorFlow Serving's own message reads it."""
    found = text_format.Parse((root / "models.config").read_text(), model_server_config_pb2.ModelServerConfig())
    assert {one.model_platform for one in found.model_config_list.config} == {"tensorflow"}
    return {one.name: one.base_path for one in found.model_config_list.config}


def test_what_is_published_is_listed_and_served_from_the_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = Path("saved_models")  # as a user gives it; TensorFlow Serving wants base paths that are absolute
    assert published(root, "vision.one", 2.0).name == "1"
    assert listed(root) == {"vision.one": str(tmp_path / root / "vision.one")}
    assert published(root, "nlp.other", 3.0).name == "1"
    assert published(root, "vision.one", 4.0).name == "2"
    (root / "empty").mkdir()
    export.list_models(root)
    assert listed(root) == {name: str(tmp_path / root / name) for name in ("nlp.other", "vision.one")}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # runs that end at once
        list(pool.map(lambda _: export.list_models(root), range(100)))
    assert sorted(path.name for path in root.iterdir()) == ["empty", "models.config", "nlp.other", "vision.one"]
    flags = Flags(model_config_file=str(root / "models.config"), port=-1, max_num_load_retries=0)
    with Server(flags) as server, Client(server.address) as client:
        answers = {name: float(client.predict(name, {"x": np.ones((1, 2), np.float32)})["y"][0, 0])
                   for name in listed(root)}  # fmt: skip
    assert answers == {"nlp.other": 4.0, "vision.one": 5.0}
