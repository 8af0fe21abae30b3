"""What the suite's fit costs over Keras's own, and what two processes or devices make of the same two cores.

python -m benchmarks.training

Prints the figures and writes them to benchmarks/training.json. Ratios are of measurements made in turn.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shared import command

RESULTS = Path(__file__).parent / "training.json"
EPOCHS, STEPS, BATCH, WIDTH = 3, 200, 64, 16


def setting(folder: Path, name: str, strategy: str = "one"):
    """vision.classify's network on made-up pictures: config and splits."""
    import numpy as np
    import tensorflow as tf

    from apps.vision import classify
    from shared import data, training

    config = classify.Config(epochs=EPOCHS, batch=BATCH, width=WIDTH, patience=100, runs=str(folder), name=name,
                             saved_models=str(folder), strategy=strategy)  # fmt: skip
    config = training.begin("vision.classify", config)
    random = np.random.default_rng(1)
    pictures = random.integers(0, 255, (STEPS * BATCH, 28, 28, 1)).astype(np.float32)
    targets = tf.one_hot(random.integers(0, 10, len(pictures)), 10).numpy()
    rows, wanted = data.gather(pictures), data.gather(targets)
    part = data.in_order(pictures[:256], targets[:256], batch=128)
    splits = data.Splits(
        stream=data.stream(len(pictures), batch=BATCH, seed=1, read=lambda at, step: (rows(at), wanted(at))),
        steps=STEPS, train=part, validation=part, test=part, preprocess=lambda x: x, names=tuple("0123456789"),
        request={}, about={},
    )  # fmt: skip
    return config, splits


def timed():
    """A callback that knows the seconds from the first step's end to the last epoch's end."""
    import keras

    class Clock(keras.callbacks.Callback):
        first = last = 0.0

        def on_train_batch_end(self, batch, logs=None):
            self.first = self.first or time.perf_counter()

        def on_epoch_end(self, epoch, logs=None):
            self.last = time.perf_counter()

    return Clock()


def overhead(rounds: int = 5) -> dict:
    """Seconds of the same training with the suite's fit and with `keras.Model.fit`."""
    import keras

    from apps.vision import classify
    from shared import training

    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            seconds = []
            for ours in (False, True):
                config, splits = setting(Path(folder), f"{number}-{ours}")
                model, clock = classify.build(config, splits), timed()
                if ours:
                    training.fit(config, model, splits, callbacks=(clock,))
                else:
                    model.fit(splits.stream(0), steps_per_epoch=STEPS, epochs=EPOCHS, verbose=0, shuffle=False,
                              validation_data=splits.validation, callbacks=[clock])  # fmt: skip
                seconds.append(clock.last - clock.first)
                keras.backend.clear_session()
            pairs.append(seconds)
    bare, suite = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(ours / theirs for theirs, ours in pairs)
    print(f"fit: {suite:.2f} s, keras.Model.fit {bare:.2f} s, median of the pairs' ratios {ratio:.3f} (asked 1.03)")
    return {"suite": suite, "bare": bare, "ratio": ratio, "bar": 1.03, "pairs": pairs}


def worker(folder: str, strategy: str) -> None:
    """One process of `scaling`: trains, and where there are several measures an all-reduce of the gradient alone."""
    import tensorflow as tf

    if strategy == "mirrored":
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    from apps.vision import classify
    from shared import training

    config, splits = setting(Path(folder), strategy, strategy)
    devices = training.strategy(config.strategy)
    with devices.scope():
        model = classify.build(config, splits)
    clock = timed()
    training.fit(config, model, splits, callbacks=(clock,))
    step = (clock.last - clock.first) / (EPOCHS * STEPS - 1)
    size = sum(variable.value.shape.num_elements() for variable in model.trainable_variables)
    reduce = 0.0
    if devices.num_replicas_in_sync > 1:

        @tf.function
        def once():
            def mine():
                return tf.distribute.get_replica_context().all_reduce("SUM", tf.ones([size]))

            return devices.experimental_local_results(devices.run(mine))[0]

        times = []
        for _ in range(30):
            begun = time.perf_counter()
            once().numpy()
            times.append(time.perf_counter() - begun)
        reduce = statistics.median(times[5:])
    if training.workers.chief():
        print(json.dumps({"step": step, "reduce": reduce, "bytes": 4 * size}), flush=True)
    training.workers.meet(devices)


def scaling(rounds: int = 3) -> dict:
    """Seconds a step of the same batch: one process, two logical devices, two processes; on the same cores."""
    from shared.launch import free_ports

    found = {"one": [], "mirrored": [], "multiworker": []}
    for _ in range(rounds):
        for strategy, results in found.items():
            with tempfile.TemporaryDirectory() as folder:
                addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
                processes = []
                for index in range(2 if strategy == "multiworker" else 1):
                    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
                    if strategy == "multiworker":
                        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
                        environment["TF_CONFIG"] = json.dumps(task)
                    words = [sys.executable, "-m", "benchmarks.training", "--worker", folder, strategy]
                    processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                                      text=True, env=environment))  # fmt: skip
                said = [process.communicate()[0] for process in processes]
                results.append(json.loads(said[0].strip().splitlines()[-1]))
    one = statistics.median(result["step"] for result in found["one"])
    summary = {"bytes": found["one"][0]["bytes"]}
    for strategy, results in found.items():
        step = statistics.median(result["step"] for result in results)
        reduce = statistics.median(result["reduce"] for result in results)
        summary[strategy] = {"step": step, "of_one": one / step, "reduce_share": reduce / step}
        print(f"{strategy:<12} {1000 * step:7.1f} ms a step, {one / step:.2f} times as fast as one; an all-reduce of "
              f"the gradient takes {reduce / step:.0%} of a step", flush=True)  # fmt: skip
    return summary


def main() -> None:
    command.onednn()  # as `cornucopia train` does
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
        return
    RESULTS.write_text(json.dumps({"overhead": overhead(), "scaling": scaling()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
