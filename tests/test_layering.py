"""`apps` imports `shared`, `shared` imports libraries; never sideways, never up."""

import ast
import gc
import os
import platform
import subprocess
import sys

import pytest
from conftest import ROOT

from shared import command, run

FILES = sorted([*ROOT.glob("apps/**/*.py"), *ROOT.glob("shared/**/*.py")])


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    tops = {name.split(".")[0] for name in imported(path)}
    assert "apps" not in tops
    if path.is_relative_to(ROOT / "shared"):
        # These silently choose a Keras version, or are only some tasks' extras.
        assert not tops & {"keras_hub", "keras_nlp", "keras_cv", "tf_keras", "tensorflow_recommenders"}
        assert "tf.keras" not in path.read_text()


@pytest.mark.parametrize("task", command.tasks())
def test_command_answers_without_tensorflow(task):
    code = (
        f"import sys; sys.argv = ['cornucopia', 'train', '{task}', '--help']\n"
        "from shared import command\n"
        "try: command.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert command.tasks()\n"
        "assert 'tensorflow' not in sys.modules and 'keras' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "folder for exported versions" in done.stdout
    assert ("side of the square that the network sees" in done.stdout) == (task == "vision.classify")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN is set for x86 processors alone")
@pytest.mark.parametrize("given", [None, "0"])
def test_onednn_is_asked_for_before_tensorflow_is_imported_unless_the_user_says_otherwise(given):
    code = (
        "import os, sys; from shared import command; command.onednn()\n"
        "print(os.environ['TF_ENABLE_ONEDNN_OPTS'], 'tensorflow' in sys.modules)"
    )
    env = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    env |= {"TF_ENABLE_ONEDNN_OPTS": given} if given else {}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, check=True)
    assert done.stdout.split() == [given or "1", "False"]


@pytest.mark.parametrize("name", ["train", "launch", "tune", "evaluate", "ask", "load", "explain"])
def test_help_of_a_command_that_takes_a_task_names_the_tasks(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cornucopia", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert f"usage: cornucopia {name} TASK [flags]" in said
    assert ", ".join(command.tasks()) in said


@pytest.mark.parametrize(
    ("ours", "theirs", "headline", "said"),
    [
        (0.5, 0.9, "accuracy", "warning    accuracy 0.5000 is worse than the baseline's 0.9000\n"),
        (0.9, 0.9, "accuracy", ""),
        (2.0, 1.5, "loss", "warning    loss 2.0000 is worse than the baseline's 1.5000\n"),
        (1.0, 1.5, "loss", ""),
    ],
)
def test_a_version_worse_than_its_baseline_is_told(ours, theirs, headline, said, capsys):
    run._warn({"headline": headline, "test": {headline: {"value": ours}}, "baseline": {headline: {"value": theirs}}})
    assert capsys.readouterr().out == said


def test_a_server_does_not_wait_for_keras_and_can_import_it_later():
    code = (
        "import sys; from shared import command\n"
        "with command._without_keras(): command._load_tensorflow()\n"
        "from shared import data_service\n"
        "from shared.serving import server\n"
        "print(sorted({'keras', 'matplotlib', 'sklearn', 'tensorflow'} & set(sys.modules)))\n"
        "import tensorflow as tf; print(tf.keras.layers.Layer.__name__)\n"
        "import keras; print(int(keras.ops.sum(keras.ops.ones(3))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines() == ["['tensorflow']", "Layer", "3"]


def test_what_is_imported_is_left_out_of_every_collection():
    before = gc.get_freeze_count()
    with command._lasting():
        assert not gc.isenabled()
        kept = [[] for _ in range(1_000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)
