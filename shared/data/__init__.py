"""From raw data to batches: splits, public data sets by name, readers by format, the audit before training."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

ALIKE = 50  # batches that are sorted by length together


@dataclasses.dataclass(frozen=True)
class Splits:
    """Batches to learn from, and what a server needs to treat its input alike.

    `train`, `validation` and `test` hold each example once, in order, as it is. `stream` is how learning reads the
    training examples: `stream(step)` gives the endless shuffled and augmented batches from that step on, each a pure
    function of the seed and its step, so that a run that was killed goes on with the very batch that came next.
    """

    stream: Callable[[int], tf.data.Dataset]
    steps: int  # batches of the stream that make an epoch
    train: tf.data.Dataset
    validation: tf.data.Dataset
    test: tf.data.Dataset
    preprocess: Callable  # a batch of raw inputs -> a batch of model inputs
    names: tuple[str, ...]  # what the indices that a model puts out mean
    request: Mapping[str, np.ndarray]  # raw test input, as a client would send it
    about: Mapping[str, str]  # for the model card: data, protocol, licence, citation, checksum, published
    settled: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # config fields that `load` chose from the data


def stream(
    count: int,
    *,
    batch: int,
    seed: int,
    read: Callable[[tf.Tensor, tf.Tensor], tuple],
    lengths: np.ndarray | None = None,
) -> Callable[[int], tf.data.Dataset]:
    """Endless batches of `count` examples, in a new order every epoch, that can start at any step.

    Each epoch's order is made when its first step is asked for, so that other hosts can make a share of the steps alone
    (`shared/training/service.py`): with `numbered=True` a batch comes as (step [] int64, batch).

    Args:
        count: how many examples there are; ValueError where they do not fill one batch.
        batch: examples in a batch; what is left over at an epoch's end is dropped, another rest each time.
        seed: of the orders.
        read: indices [batch], step [] (both int64) -> (inputs, targets); randomness only from the step.
        lengths: of the examples, [count], where a batch costs as much as its longest: examples of like length then come
            together, out of `ALIKE` batches that the order of an epoch has in a row; the batches come in any order.
    """
    if not count:
        raise ValueError("there is no training example; give more data")
    if count < batch:
        raise ValueError(f"{count} training examples do not fill one batch of {batch}: use --batch={count}")
    steps = count // batch
    far = np.iinfo(np.int64).max

    def shuffled(epoch: tf.Tensor) -> tf.Tensor:
        shuffle = functools.partial(tf.random.experimental.stateless_shuffle, seed=[seed, epoch])
        order = shuffle(tf.range(count, dtype=tf.int64))[: steps * batch]
        if lengths is None:
            return order
        group = tf.range(steps * batch, dtype=tf.int64) // (ALIKE * batch)
        rank = group * (int(max(lengths)) + 1) + tf.gather(tf.constant(lengths, tf.int64), order)
        order = tf.gather(order, tf.argsort(rank, stable=True))
        return tf.reshape(shuffle(tf.reshape(order, [steps, batch])), [-1])

    def pick(kept: tuple[tf.Tensor, tf.Tensor], at: tf.Tensor) -> tuple:
        epoch, order = at // steps, kept[1]
        order = tf.cond(tf.equal(epoch, kept[0]), lambda: order, lambda: shuffled(epoch))
        return (epoch, order), (at, tf.slice(order, [at % steps * batch], [batch]))

    @functools.lru_cache(1)  # making them traces `read`, and who wants to know their shapes asks again
    def batches(step: int = 0, *, numbered: bool = False) -> tf.data.Dataset:
        nothing = (tf.constant(-1, tf.int64), tf.zeros([steps * batch], tf.int64))
        picked = tf.data.Dataset.range(step, far).scan(nothing, pick)
        examples = picked.map(
            lambda at, indices: (at, read(indices, at)) if numbered else read(indices, at),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        return examples.prefetch(4)

    return batches


def gather(array: np.ndarray) -> Callable[[tf.Tensor], tf.Tensor]:
    """A function from indices [batch] to rows of an array in memory, or of one on disk (`numpy.memmap`)."""
    if isinstance(array, np.memmap):
        rows = tf.TensorSpec([None, *array.shape[1:]], array.dtype)

        def from_disk(indices):
            found = tf.numpy_function(lambda at: np.asarray(array[at]), [indices], rows.dtype)
            return tf.ensure_shape(found, rows.shape)

        return from_disk
    table = tf.constant(array)
    return lambda indices: tf.gather(table, indices)


def in_order(*arrays: np.ndarray, batch: int) -> tf.data.Dataset:
    """Each example once, in order, in batches; the last may be smaller."""
    readers = [gather(array) for array in arrays]
    indices = tf.data.Dataset.range(len(arrays[0])).batch(batch)
    read = indices.map(lambda at: tuple(reader(at) for reader in readers), num_parallel_calls=tf.data.AUTOTUNE)
    return untuned(read.prefetch(2))


def untuned(batches: tf.data.Dataset) -> tf.data.Dataset:
    """The same batches, without TensorFlow's search for the best numbers of threads, as is all that is made of them.

    It sleeps for as long again as it has run, and in TensorFlow 2.21 the end of an iterator may wait until it wakes.
    `tf.data.AUTOTUNE` is then as many threads as there are processors, 16 at most.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return batches.with_options(options)
