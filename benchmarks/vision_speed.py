"""How fast vision.classify's network trains here, by precision, XLA, batch and width.

python -m benchmarks.vision_speed

Each row trains on one batch that is already there, so that only the network counts. All rows are measured in turn,
three times over, and the medians are compared with the first row's.
"""

import argparse
import dataclasses
import statistics
import time
from types import SimpleNamespace

import numpy as np

from shared import command

ROWS = [
    ("float32", {"precision": "float32"}, False),
    ("float32, XLA", {"precision": "float32"}, True),
    ("mixed_bfloat16", {"precision": "mixed_bfloat16"}, False),
    ("mixed_bfloat16, XLA", {"precision": "mixed_bfloat16"}, True),
    ("mixed_bfloat16, batch 64", {"precision": "mixed_bfloat16", "batch": 64}, False),
    ("mixed_bfloat16, batch 256", {"precision": "mixed_bfloat16", "batch": 256}, False),
    ("mixed_bfloat16, width 48", {"precision": "mixed_bfloat16", "width": 48}, False),
    ("mixed_bfloat16, width 96", {"precision": "mixed_bfloat16", "width": 96}, False),
]


def trainer(changes: dict, *, xla: bool):
    """A function that trains some steps and returns examples per second."""
    import keras
    import tensorflow as tf

    from apps.vision import classify

    config = dataclasses.replace(classify.Config(data="fashion-mnist"), **changes)
    keras.mixed_precision.set_global_policy(config.precision)
    random = np.random.default_rng(1)
    pictures = random.integers(0, 255, (config.batch, 28, 28, 1)).astype(np.float32)
    targets = tf.one_hot(random.integers(0, 10, config.batch), 10)
    batch = tf.data.Dataset.from_tensors((pictures, targets))
    model = classify.build(config, SimpleNamespace(train=batch, steps=429, names=tuple("0123456789")))
    model.jit_compile = xla
    batches = batch.repeat()
    model.fit(batches, steps_per_epoch=3, verbose=0, shuffle=False)

    def run() -> float:
        # Between the ends of the first and the last step: around `fit`, TensorFlow may take seconds to end a pipeline.
        ends = []
        clock = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter()))
        model.fit(batches, steps_per_epoch=1 + 1920 // config.batch, verbose=0, shuffle=False, callbacks=[clock])
        return (len(ends) - 1) * config.batch / (ends[-1] - ends[0])

    return model.count_params(), run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    command.onednn()  # as `cornucopia train` does
    trainers = {}
    for name, changes, xla in ROWS:
        trainers[name] = trainer(changes, xla=xla)
    speeds = {name: [] for name in trainers}
    for _ in range(repeats):
        for name, (_, run) in trainers.items():
            speeds[name].append(run())
    first = statistics.median(speeds["float32"])
    print(
        "| | parameters | examples/s | against float32 | seconds an epoch of 55,000 |\n| --- | --- | --- | --- | --- |"
    )
    for name, (parameters, _) in trainers.items():
        speed = statistics.median(speeds[name])
        print(f"| {name} | {parameters:,} | {speed:,.0f} | {speed / first:.2f} | {55_000 / speed:.0f} |")


if __name__ == "__main__":
    main()
