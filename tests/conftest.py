"""Every test runs on a machine without GPUs, without the network, and writes only below its own folder."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def until(condition, seconds=20.0):
    """What a condition gives as soon as that is something; an error where it is nothing for so long."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)
    return found


def pytest_configure(config):
    import tensorflow as tf

    # Two logical devices test what needs many, in the one process in which TensorFlow is set up but once.
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    # A shell's background jobs ignore Ctrl-C, and so would what tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _float32():
    """A test that sets a precision leaves it to no other."""
    import keras

    yield
    keras.mixed_precision.set_global_policy("float32")


@pytest.fixture
def cornucopia(tmp_path):
    """Run the command as a user does, in its own process, in a folder of its own."""

    def run(*words, expect=0, env=None, timeout=300):
        done = subprocess.run(
            [Path(sys.executable).with_name("cornucopia"), *words], cwd=tmp_path, capture_output=True, text=True,
            timeout=timeout, env={**os.environ, **(env or {})},
        )  # fmt: skip
        assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def serving(tmp_path):
    """`cornucopia serve` on a free port in the test's folder, for as long as the block lasts; gives its address."""

    @contextlib.contextmanager
    def serve():
        command = [Path(sys.executable).with_name("cornucopia"), "serve", "--port=-1"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:
            try:
                seen = ""
                while "gRPC on" not in seen:
                    assert process.poll() is None, seen
                    seen += process.stdout.readline()
                yield re.search(r"gRPC on (\S+);", seen)[1]
            finally:
                process.send_signal(signal.SIGTERM)
        assert process.returncode == 0

    return serve


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder of models to serve: one, `affine`, in one version."""
    import serving_models

    root = tmp_path_factory.mktemp("models")
    serving_models.save(serving_models.Affine(), root / "affine" / "1")
    return root


@pytest.fixture
def python(tmp_path):
    """Run Python code in a process of its own that finds neither `apps` nor `shared`."""

    def run(code, *words, timeout=300):
        guard = (
            "import importlib.abc, sys\n"
            "class Nothing(importlib.abc.MetaPathFinder):\n"
            "    def find_spec(self, name, path, target=None):\n"
            "        if name.split('.')[0] in ('apps', 'shared'):\n"
            "            raise ImportError(f'{name} must not be needed here')\n"
            "sys.meta_path.insert(0, Nothing())\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", guard + code, *words], cwd=tmp_path, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def pictures(tmp_path):
    """Write a folder of small pictures, one sub-folder a class, that a network can tell apart; return its path."""
    from PIL import Image

    def make(names=("dark", "light", "striped"), count=20, size=12, mode="L", form="png"):
        random = np.random.default_rng(1)
        root = tmp_path / "pictures"
        for index, name in enumerate(names):
            (root / name).mkdir(parents=True)
            for number in range(count):
                level = [40, 200, 120][index % 3]
                pixels = random.normal(level, 20, (size, size, 3))
                if index % 3 == 2:
                    pixels[::2] += 100
                image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert(mode)
                image.save(root / name / f"{number}.{form}")
        return root

    return make
