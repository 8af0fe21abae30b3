"""What a run costs: time, the share of it spent waiting for input, memory."""

import functools
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping

import keras
import tensorflow as tf

from shared.data import Splits
from shared.run import Config


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


def account(
    config: Config, model: keras.Model, splits: Splits, *, seconds: float, steps: int, devices: int
) -> dict[str, float]:
    """What training took: devices' time, arithmetic, energy, money.

    Returns:
        `device_seconds`; `examples`; `flops_per_example` of a forward pass, counted in the graph where Keras can trace
        one; `flops_per_second`, of training: three times that, for the backward pass costs about two (Kaplan et al.
        2020, section 2.1); `peak_flops_per_second` of this machine, measured by a product of matrices, and the
        `share_of_peak`; `kilowatt_hours` at the assumed watts; `price`, where the hour has one.
    """
    hours = seconds / 3600
    found = {"device_seconds": seconds * devices, "examples": float(config.batch * steps),
             "watts_assumed": config.watts, "kilowatt_hours": config.watts * hours / 1000}  # fmt: skip
    if config.price_per_hour:
        found["price"] = config.price_per_hour * hours
    flops = forward_flops(model, splits)
    if flops and seconds:
        found["flops_per_example"] = flops
        found["flops_per_second"] = 3 * flops * config.batch * steps / seconds
        found["peak_flops_per_second"] = peak_flops()
        found["share_of_peak"] = found["flops_per_second"] / found["peak_flops_per_second"]
    return found


def forward_flops(model: keras.Model, splits: Splits) -> float:
    """Floating-point operations of a forward pass, an example, as TensorFlow's profiler counts a graph; 0: unknown."""
    batch = splits.stream(0).element_spec
    if not isinstance(batch, tuple):  # not inputs and targets: the task learns in a way of its own
        return 0.0
    inputs = batch[0]
    one = tf.nest.map_structure(lambda spec: tf.TensorSpec([1, *spec.shape[1:]], spec.dtype), inputs)
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("ERROR")  # the profiler of graphs calls what TensorFlow 2 would rather have left behind
    try:
        graph = tf.function(lambda given: model(given, training=False)).get_concrete_function(one).graph
        options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
        options["output"] = "none"
        return float(tf.compat.v1.profiler.profile(graph, options=options).total_float_ops)
    except (TypeError, ValueError, AttributeError, tf.errors.OpError):  # a model that is called in another way
        return 0.0
    finally:
        logger.setLevel(level)


@functools.cache
def peak_flops(size: int = 1024) -> float:
    """Floating-point operations a second of float32 products of matrices: the best of five.

    There are as many at once as operations fit side by side, where one may not take all processors.
    """
    every = os.cpu_count()
    count = max(1, every // (tf.config.threading.get_intra_op_parallelism_threads() or every))
    factors = [tf.random.stateless_normal([size, size], [1, seed]) for seed in range(count)]
    multiply = tf.function(lambda factors: [tf.linalg.matmul(one, one) for one in factors])
    best = min(_seconds(lambda: [product.numpy() for product in multiply(factors)]) for _ in range(6))
    return count * 2 * size**3 / best


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def peak_bytes() -> int:
    """The most memory that this process has held resident, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(cost: Mapping[str, float]) -> str:
    """One line on a run's cost, for people."""
    waited = f"{cost['input_wait']:.1%} of it waiting for input, " if "input_wait" in cost else ""
    spent = ""
    if "flops_per_second" in cost:
        spent += (f", {cost['flops_per_second'] / 1e9:.1f} GFLOP/s ({cost['share_of_peak']:.0%} of the "
                  f"{cost['peak_flops_per_second'] / 1e9:.0f} measured here)")  # fmt: skip
    if "kilowatt_hours" in cost:
        spent += f", {1000 * cost['kilowatt_hours']:.1f} Wh at {cost['watts_assumed']:g} W assumed"
    if "price" in cost:
        spent += f", price {cost['price']:.2f}"
    return (
        f"{cost['train_seconds'] / 60:.1f} minutes of training, {cost['examples_per_second']:,.0f} examples/s, "
        f"{waited}peak memory {cost['peak_bytes'] / 2**30:.2f} GiB{spent}"
    )
