"""What a run costs: time, the share of it spent waiting for input, memory."""

import resource
import sys
from collections.abc import Mapping

import tensorflow as tf


class InputClock:
    """Measures how long training waits for its next batch.

    The request for a batch passes a clock, then the pipeline, then a second clock; both tick in the thread that
    asks. Where a strategy copies batches to its devices ahead of time, that copying thread is the one that asks.
    """

    def __init__(self):
        self._waited = tf.Variable(0.0, dtype=tf.float64, trainable=False)

    def watch(self, batches: tf.data.Dataset) -> tf.data.Dataset:
        asked = tf.data.Dataset.counter().map(lambda _: tf.timestamp())

        def arrive(since, batch):
            self._waited.assign_add(tf.timestamp() - since)
            return batch

        watched = tf.data.Dataset.zip(asked, batches).map(arrive)
        options = tf.data.Options()
        options.experimental_optimization.inject_prefetch = False  # it would wait in training's stead
        return watched.with_options(options)

    @property
    def seconds(self) -> float:
        return float(self._waited.numpy())


def peak_bytes() -> int:
    """The most memory that this process has held resident, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(cost: Mapping[str, float]) -> str:
    """One line on a run's cost, for people."""
    waited = f"{cost['input_wait']:.1%} of it waiting for input, " if "input_wait" in cost else ""
    return (
        f"{cost['train_seconds'] / 60:.1f} minutes of training, {cost['examples_per_second']:,.0f} examples/s, "
        f"{waited}peak memory {cost['peak_bytes'] / 2**30:.2f} GiB"
    )
