"""How close `cornucopia serve` comes to what Python's gRPC and TensorFlow bear.

python -m benchmarks.serving [--quick]

Prints the figures and writes them to benchmarks/serving.json. Server and client share the processors, each
ratio is of two measurements in turn, the median of several rounds: absolute numbers are the machine's.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import psutil

from shared.serving import load
from shared.serving.client import Client, request

RESULTS = Path(__file__).parent / "serving.json"
SERVER = """
import grpc
from concurrent import futures
class Server(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(answer)
server = grpc.server(futures.ThreadPoolExecutor(8))
server.add_generic_rpc_handlers((Server(),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(f"gRPC on 127.0.0.1:{port};", flush=True)
server.wait_for_termination()
"""
ECHO = f"""
def answer(data, context):
    return data
{SERVER}"""
NETWORK = f"""
import sys
from pathlib import Path
import numpy as np
from shared.serving.servable import Servable
servable = Servable("cnn", 1, Path(sys.argv[1]))
bound = [servable.bind("serving_default", dict(x=np.zeros((rows, 32, 32, 1), np.float32))) for rows in (1, 32)]
def answer(data, context):
    return servable.run(*bound[len(data) > 10_000])[0].tobytes()
{SERVER}"""


def write_models(root: Path) -> None:
    """A product of matrices; and a convolutional network of 0.7 million parameters for pictures of 32 by 32."""
    import keras
    import tensorflow as tf
    from keras import layers

    from shared import export

    class Tiny(tf.Module):
        def __init__(self):
            super().__init__()
            self.weights = tf.Variable(tf.random.normal([4, 3], seed=1))

        @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="x")])
        def __call__(self, x):
            return {"y": tf.matmul(x, self.weights)}

    class Network(tf.Module):
        def __init__(self):
            super().__init__()
            x = picture = keras.Input([32, 32, 1])
            for filters in (32, 32, 0, 64, 64, 0, 128, 128, 128, 128, 128):
                pool = layers.MaxPooling2D() if not filters else None
                x = pool(x) if pool else layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
            self.model = keras.Model(picture, layers.Dense(10, activation="softmax")(layers.GlobalMaxPooling2D()(x)))

        @tf.function(input_signature=[tf.TensorSpec([None, 32, 32, 1], tf.float32, name="x")])
        def __call__(self, x):
            return {"y": self.model(x, training=False)}

    for name, module in (("tiny", Tiny()), ("cnn", Network())):
        export.save(module, root / name / "1", {"serving_default": module.__call__})


class Running:
    """A server in a process of its own, for as long as the block lasts."""

    def __init__(self, *command: str):
        self.begun = time.perf_counter()
        self.process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True,
                                        stderr=subprocess.DEVNULL)  # fmt: skip
        seen = ""
        while "gRPC on" not in seen:
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError(f"{command} ended: {seen}")
            seen += line
        self.ready = time.perf_counter() - self.begun
        self.address = re.search(r"gRPC on ([^;\s]+)", seen)[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)

    def resident(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss


def serving(root: Path, *flags: str) -> Running:
    return Running("-c", "from shared.command import main; main()", "serve", f"--models={root}", "--port=-1", *flags)


def rate(address: str, model: str, shape: tuple, *, clients: int, seconds: float) -> float:
    """Answered calls a second."""
    with load.calling(address, request(model, {"x": np.zeros(shape, np.float32)})) as call:
        call(False)
        result = load.run(call, concurrency=clients, seconds=seconds)
    if result.errors:
        raise RuntimeError(f"{model}: {result.errors}")
    return result.throughput


IN_PROCESS = """
import sys, threading, time
import numpy as np
from pathlib import Path
from shared.serving.servable import Servable
folder, threads, rows, seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
servable = Servable("cnn", 1, folder)
bound = servable.bind("serving_default", {"x": np.zeros((rows, 32, 32, 1), np.float32)})
servable.run(*bound)
counts, end = [0] * threads, time.perf_counter() + seconds
def work(index):
    while time.perf_counter() < end:
        servable.run(*bound)
        counts[index] += 1
workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
begun = time.perf_counter()
for worker in workers: worker.start()
for worker in workers: worker.join()
print(sum(counts) / (time.perf_counter() - begun))
"""


def in_process(root: Path, *, threads: int, rows: int, seconds: float) -> float:
    """Calls a second of the same session, in a process without a server."""
    words = [str(root / "cnn" / "1"), str(threads), str(rows), str(seconds)]
    done = subprocess.run([sys.executable, "-c", IN_PROCESS, *words], capture_output=True, text=True, check=True)
    return float(done.stdout)


def ratio(name: str, ours, theirs, *, rounds: int, bar: float | None = None, of: str = "") -> dict:
    """Measure two things in turn; the ratio is the median of the rounds' own, which share a moment of the machine.

    `bar` is what the ratio is asked to be, or, where it is `of` a unit, what ours is; None: nothing is asked.
    """
    pairs = [(theirs(), ours()) for _ in range(rounds)]
    floor, value = (statistics.median(column) for column in zip(*pairs, strict=True))
    shares = [b / a for a, b in pairs]
    found = {"ours": value, "beside": floor, "ratio": statistics.median(shares), "bar": bar,
             "rounds": [round(share, 3) for share in shares]}  # fmt: skip
    asked = "nothing asked" if bar is None else f"asked {bar:g}{of}"
    print(f"{name:<58} {value:9.1f} of {floor:9.1f}  {found['ratio']:5.2f}  ({asked})  {found['rounds']}", flush=True)
    return found


def throughput(root: Path, *, seconds: float, rounds: int) -> dict:
    """Calls a second against the bare echo, a bare server of the network, and the session in process."""
    found = {}
    one = (1, 32, 32, 1)
    with (
        Running("-c", ECHO) as echo,
        Running("-c", NETWORK, str(root / "cnn" / "1")) as bare,
        serving(root) as plain,
        serving(root, "--enable_batching") as batched,
    ):
        for clients in (1, 8):
            found[f"tiny model, {clients} clients, of a bare echo"] = ratio(
                f"tiny model, {clients} clients, of a bare echo's calls/s",
                lambda clients=clients: rate(plain.address, "tiny", (1, 4), clients=clients, seconds=seconds),
                lambda clients=clients: rate(echo.address, "tiny", (1, 4), clients=clients, seconds=seconds),
                bar=0.65, rounds=rounds,
            )  # fmt: skip
        for rows, clients, bar in ((1, 8, 0.7), (32, 1, 0.95), (32, 8, 0.95)):
            shape, case = (rows, 32, 32, 1), f"cnn, batch {rows}, {clients} clients"

            def ours(shape=shape, clients=clients) -> float:
                return rate(plain.address, "cnn", shape, clients=clients, seconds=seconds)

            found[f"{case}, of in process"] = ratio(
                f"{case}, of in-process calls/s",
                ours,
                lambda rows=rows, clients=clients: in_process(root, threads=clients, rows=rows, seconds=seconds),
                bar=bar, rounds=rounds,
            )  # fmt: skip
            found[f"{case}, of a bare server"] = ratio(
                f"{case}, of a bare server's calls/s",
                ours,
                lambda shape=shape, clients=clients: rate(
                    bare.address, "cnn", shape, clients=clients, seconds=seconds
                ),
                rounds=rounds,
            )  # fmt: skip
        found["cnn, batch 1, batching at 32 clients, of 8 without"] = ratio(
            "cnn, batch 1, batching at 32 clients, of 8 without",
            lambda: rate(batched.address, "cnn", one, clients=32, seconds=seconds),
            lambda: rate(plain.address, "cnn", one, clients=8, seconds=seconds),
            bar=1.2, rounds=rounds,
        )  # fmt: skip
    return found


def swap(root: Path, *, seconds: float) -> dict:
    """Requests at 200 a second while a version is replaced, and replaced again."""
    message = request("cnn", {"x": np.zeros((1, 32, 32, 1), np.float32)})
    with serving(root, "--file_system_poll_wait_seconds=0.5") as server, load.calling(server.address, message) as call:
        before = load.run(call, rate=200, seconds=seconds)
        states = []

        def publish() -> None:
            for number in (2, 3):
                time.sleep(seconds / 4)
                part = root / "cnn" / f".part-{number}"
                shutil.copytree(root / "cnn" / "1", part)
                part.rename(root / "cnn" / str(number))
            with Client(server.address) as client:
                until = time.monotonic() + seconds
                while client.status("cnn").get(3, ("",))[0] != "AVAILABLE" and time.monotonic() < until:
                    time.sleep(0.05)
                states.append(client.status("cnn"))

        publisher = threading.Thread(target=publish)
        publisher.start()
        during = load.run(call, rate=200, seconds=seconds)
        publisher.join()
    for number in (2, 3):
        shutil.rmtree(root / "cnn" / str(number))
    found = {"requests": len(during.latencies), "errors": sum(during.errors.values()) + sum(before.errors.values()),
             "p99_before": before.percentile(99), "p99_during": during.percentile(99),
             "ratio": during.percentile(99) / before.percentile(99), "states": str(states[0])}  # fmt: skip
    print(f"two swaps under 200 requests/s: {found['errors']} errors of {found['requests']}, p99 "
          f"{found['p99_during']:.2f} ms, before {found['p99_before']:.2f} ms: {found['ratio']:.2f} times (asked 5); "
          f"{found['states']}", flush=True)  # fmt: skip
    return found


def endurance(root: Path, *, requests: int) -> dict:
    """Resident memory after many requests of changing size, against that after the first 10,000."""
    random = np.random.default_rng(1)
    messages = [request("tiny", {"x": random.random((rows, 4), np.float32)}).SerializeToString()
                for rows in (1, 3, 17, 200)]  # fmt: skip
    with serving(root) as server, grpc.insecure_channel(server.address) as channel:
        predict = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")

        def ask(count: int) -> None:
            for index in range(count // 4):
                predict(messages[index % 4])

        def in_threads(count: int) -> None:
            workers = [threading.Thread(target=ask, args=(count,)) for _ in range(4)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

        in_threads(10_000)
        first = server.resident()
        in_threads(requests - 10_000)
        last = server.resident()
    found = {"requests": requests, "first": first, "last": last, "ratio": last / first}
    print(f"resident memory after {requests:,} requests {last / 2**20:.0f} MiB, after 10,000 {first / 2**20:.0f} MiB: "
          f"{found['ratio']:.3f} times (asked 1.1)", flush=True)  # fmt: skip
    return found


LOADING = """
import time, sys
begun = time.perf_counter()
import tensorflow as tf
tf.saved_model.load(sys.argv[1])
"""


def start(root: Path, *, rounds: int) -> dict:
    """From the command to an open port with one small model, against importing TensorFlow and loading the model."""
    alone = root.parent / "alone"
    alone.mkdir(exist_ok=True)
    if not (alone / "tiny").exists():
        (alone / "tiny").symlink_to(root / "tiny")

    def ours() -> float:
        with serving(alone) as server:
            return server.ready

    def theirs() -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", LOADING, str(root / "tiny" / "1")], check=True, capture_output=True)
        return time.perf_counter() - begun

    return ratio("start to ready, seconds, of import and load", ours, theirs, bar=1.5, rounds=rounds)


def imports(*, rounds: int) -> dict:
    """Seconds to import the client, which are asked to be few; beside them those of the stock package's stubs."""

    def seconds(code: str) -> float:
        timed = f"import time; begun = time.perf_counter(); {code}; print(time.perf_counter() - begun)"
        done = subprocess.run([sys.executable, "-c", timed], check=True, capture_output=True, text=True)
        return float(done.stdout.split()[-1])

    return ratio(
        "import of the client, seconds, beside the stock package's",
        lambda: seconds("import shared.serving.client"),
        lambda: seconds("from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc"),
        bar=0.3, of=" s", rounds=rounds,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of it, for a look; nothing is written")
    quick = parser.parse_args().quick
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    seconds, rounds = (1.0, 1) if quick else (4.0, 5)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "models"
        write = "import sys, pathlib; from benchmarks import serving; serving.write_models(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", write, str(root)], check=True, capture_output=True)
        found = {"processors": os.cpu_count(), "throughput": throughput(root, seconds=seconds, rounds=rounds)}
        found["start"] = start(root, rounds=rounds)
        found["imports"] = imports(rounds=rounds)
        found["swap"] = swap(root, seconds=8.0 if quick else 20.0)
        found["endurance"] = endurance(root, requests=20_000 if quick else 200_000)
    if not quick:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
