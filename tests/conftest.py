"""Every test runs on a machine without GPUs, without the network, and writes only below its own folder."""

import contextlib
import gc
import http.client
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
import pytest

from shared import command

ROOT = Path(__file__).parent.parent
REAL = os.environ.get("TF_SERVING_ADDRESS", "")  # of a server that takes the tests of the contract, see serving_models
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
command.onednn()  # for what is trained here or in a fork and what in a process of its own to be alike


def until(condition, seconds=20.0):
    """What a condition gives as soon as that is something; an error where it is nothing for so long."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)
    return found


# Files by how long they take, for none of the long ones to be begun when all others are done.
LONG = ("write", "workers", "contract", "ppo", "faults", "nlp_classify", "retrieve", "tuning", "spot", "classify",
        "training", "data_service", "lifecycle", "install")  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


def pytest_configure(config):
    import tensorflow as tf

    # Two logical devices test what needs many, in the one process in which TensorFlow is set up but once.
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    tf.config.list_logical_devices()  # now TensorFlow is at work, and no test's --threads counts for those after it
    gc.freeze()  # as the command does what it imports
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

    def run(*words, expect=0, env=None):
        done = subprocess.run(
            [Path(sys.executable).with_name("cornucopia"), *words], cwd=tmp_path, capture_output=True, text=True,
            timeout=300, env={**os.environ, **(env or {})},
        )  # fmt: skip
        assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def forked(tmp_path, tmp_path_factory):
    """As `cornucopia`, in a process that begins with TensorFlow imported."""

    def run(*words, expect=0, env=None):
        out, err = (tmp_path_factory.mktemp("said") / name for name in ("out", "err"))
        code = forks.ended(forks.start(forks.cornucopia, *words, folder=tmp_path, out=out, err=err, env=env))
        done = subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())
        assert done.returncode == expect, f"exit code {code}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def mistaken(tmp_path, monkeypatch, capsys):
    """Run the command in this process, where it takes no 5 s to start, to end with exit code 2; its `out` and `err`."""

    def run(*words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["cornucopia", *words])
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == 2
        return capsys.readouterr()

    return run


@pytest.fixture
def serving(tmp_path, tmp_path_factory):
    """`cornucopia serve` on a free port in the test's folder, for as long as the block lasts; gives its address."""

    @contextlib.contextmanager
    def serve():
        out = tmp_path_factory.mktemp("said") / "out"
        process = forks.start(forks.cornucopia, "serve", "--port=-1", folder=tmp_path, out=out)

        def address():
            assert process.is_alive(), out.read_text()
            return re.search(r"gRPC on (\S+);", out.read_text())

        try:
            yield until(address, 240)[1]
        finally:
            process.terminate()
            code = forks.ended(process)
        assert code == 0, out.read_text()

    return serve


@contextlib.contextmanager
def started(cwd, *flags):
    """A server as a user starts it; the block ends when it does, or with what goes wrong in it."""
    command = [Path(sys.executable).with_name("cornucopia"), "serve", "--port=-1", *flags]
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def ready_line(process):
    """What a started server writes when it answers."""
    for line in process.stdout:
        if "Ctrl-C ends" in line:
            return line
    raise AssertionError(f"it ended: {process.stderr.read()}")


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


def word(name, random, rate=8_000):
    """A rising or a falling chirp, as a word."""
    import scipy.signal

    time = np.arange(round(rate * random.uniform(0.3, 0.6))) / rate
    low, high = random.uniform(300, 600), random.uniform(1_500, 2_500)
    first, last = (low, high) if name == "up" else (high, low)
    sound = scipy.signal.chirp(time, first, time[-1], last) * random.uniform(0.1, 0.9)
    return np.clip(sound + 0.01 * random.normal(size=len(time)), -1, 1)


@pytest.fixture
def words(tmp_path):
    """Write a folder of recordings, one sub-folder a word, that a network can tell apart; return its path."""
    from shared.data import sounds

    random = np.random.default_rng(1)
    for name in ("up", "down"):
        (tmp_path / "words" / name).mkdir(parents=True)
        for number in range(40):
            content = sounds.encode(word(name, random), 8_000)
            (tmp_path / "words" / name / f"{number}.wav").write_bytes(content)
    return tmp_path / "words"


WORDS = {"money": ["card", "bank", "payment", "transfer"], "food": ["soup", "bread", "apple", "dinner"]}


def tabled(folder):
    """Write a table of sentences about money and food; return its path."""
    random = np.random.default_rng(1)
    lines = ["text,label"]
    for number in range(60):
        label = ("money", "food")[number % 2]
        lines.append(f"the {random.choice(WORDS[label])} and my {random.choice(WORDS[label])} number {number},{label}")
    path = folder / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def table(tmp_path):
    return tabled(tmp_path)


# The contract's tests ask one server a module; with TF_SERVING_ADDRESS and TF_SERVING_REST one that is there already.


@pytest.fixture(scope="session")
def contract(tmp_path_factory):
    """A folder of the models that the contract is tested on, and their config."""
    import serving_models

    root = tmp_path_factory.mktemp("contract")
    serving_models.write(root)
    return root


@pytest.fixture(scope="module")
def addresses(request):
    """Where a server answers over gRPC and over REST."""
    if REAL:
        yield REAL, os.environ.get("TF_SERVING_REST", "")
        return
    from shared.serving.flags import Flags
    from shared.serving.server import Server

    config = request.getfixturevalue("contract") / "models.config"
    flags = Flags(model_config_file=str(config), port=-1, rest_api_port=-1, file_system_poll_wait_seconds=0,
                  max_num_load_retries=0, allow_version_labels_for_unavailable_models=True)  # fmt: skip
    with Server(flags) as server:
        yield server.address, server.rest_address


@pytest.fixture(scope="module")
def channel(addresses):
    import grpc

    with grpc.insecure_channel(addresses[0]) as channel:
        yield channel


@pytest.fixture(scope="module")
def prediction(channel):
    from tensorflow_serving.apis import prediction_service_pb2_grpc

    return prediction_service_pb2_grpc.PredictionServiceStub(channel)


@pytest.fixture(scope="module")
def service(channel):
    from tensorflow_serving.apis import model_service_pb2_grpc

    return model_service_pb2_grpc.ModelServiceStub(channel)


@pytest.fixture
def rest(addresses):
    """Ask over HTTP: (status, headers, body)."""
    if not addresses[1]:
        pytest.skip("TF_SERVING_REST does not say where the server of TF_SERVING_ADDRESS answers over REST")
    host, _, port = addresses[1].rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)

    def ask(method, path, body=None, **headers):
        if body is not None and not isinstance(body, bytes | str):
            body = json.dumps(body)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()

    yield ask
    connection.close()
