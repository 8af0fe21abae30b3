"""Many processes that train one model: who they are, how data is shared out, and what Keras needs mended for it.

`model.fit` fails under MultiWorkerMirroredStrategy (keras issue 20585) at two places of Keras 3.15's trainer for
TensorFlow; `mend` replaces them, how it shares out data, and when gradients are shortened. tests/test_workers.py fails
when Keras needs it no longer.
"""

import hashlib
import json
import os
import secrets

import tensorflow as tf


def configured() -> bool:
    """Whether TF_CONFIG or Slurm names more than one worker."""
    return count() > 1


def count() -> int:
    """How many workers TF_CONFIG or Slurm names; 1 where neither does."""
    if os.environ.get("TF_CONFIG"):
        return max(1, len(_cluster().get("worker", [])) + len(_cluster().get("chief", [])))
    return int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in os.environ else 1


def _cluster() -> dict:
    return json.loads(os.environ["TF_CONFIG"]).get("cluster", {})


def index() -> int:
    """Which worker this process is, counted from 0; 0 where there is but one."""
    if os.environ.get("TF_CONFIG"):
        task = json.loads(os.environ["TF_CONFIG"]).get("task", {})
        return int(task.get("index", 0)) + (len(_cluster().get("chief", [])) if task.get("type") == "worker" else 0)
    return int(os.environ.get("SLURM_PROCID", "0")) if configured() else 0


def chief() -> bool:
    """Whether this process writes what the workers have in common."""
    return index() == 0


def many(strategy: tf.distribute.Strategy) -> bool:
    """Whether a strategy spans processes."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def join() -> tf.distribute.Strategy:
    """The strategy over all workers' devices; made before TensorFlow does anything else, as its collectives demand."""
    if not configured():
        raise ValueError("--strategy=multiworker needs TF_CONFIG, or Slurm, to name more than one worker; "
                         "cornucopia launch --workers=2 TASK starts some here")  # fmt: skip
    if os.environ.get("TF_CONFIG"):
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    else:
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver()
    gpus = bool(tf.config.list_physical_devices("GPU"))
    implementation = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=implementation.NCCL if gpus else implementation.RING
    )
    mend()
    return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver, communication_options=options)


def mend() -> None:
    """Put right what Keras's trainer does where a strategy spans devices or processes."""
    from keras.src import tree
    from keras.src.backend.tensorflow import optimizer, trainer

    if getattr(trainer.reduce_per_replica, "mended", False):
        return
    keras_reduces, keras_builds = trainer.reduce_per_replica, trainer.TensorFlowTrainer._maybe_symbolic_build
    keras_clips, keras_adds = optimizer.TFOptimizer._clip_gradients, optimizer.TFOptimizer._all_reduce_sum_gradients

    def alone() -> bool:
        context = tf.distribute.get_replica_context()
        return context is None or context.num_replicas_in_sync == 1

    def clip_gradients(self, gradients):
        if alone():
            return keras_clips(self, gradients)
        # Keras shortens what each device found before it adds that up; what is to be short is the sum.
        return keras_clips(self, [gradient for gradient, _ in keras_adds(self, [(one, None) for one in gradients])])

    def all_reduce_sum_gradients(self, pairs):
        return keras_adds(self, pairs) if alone() else list(pairs)  # they were added up above

    def reduce_per_replica(values, strategy, reduction):
        if not many(strategy):
            return keras_reduces(values, strategy, reduction)
        if reduction == "concat":  # what this worker predicts is of its own data
            return tree.map_structure(lambda one: tf.concat(strategy.experimental_local_results(one), 0), values)
        # Metrics come without a dimension to take the mean over.
        return tree.map_structure(lambda one: strategy.reduce("MEAN", one, axis=None), values)

    def maybe_symbolic_build(self, iterator=None, data_batch=None):
        strategy = self._distribute_strategy
        if iterator is None or strategy is None:
            return keras_builds(self, iterator=iterator, data_batch=data_batch)
        for _, _, batches in iterator:
            # The mean over devices of a batch, which Keras asks for, is no batch, and fails where parts are uneven.
            data_batch = tree.map_structure(lambda one: strategy.experimental_local_results(one)[0], next(batches))
            break
        with strategy.scope():
            return self._symbolic_build(data_batch=data_batch)

    class EpochIterator(trainer.TFEpochIterator):
        def __init__(self, distribute_strategy=None, *arguments, **named):
            super().__init__(_Whole(distribute_strategy) if many(distribute_strategy) else distribute_strategy,
                             *arguments, **named)  # fmt: skip
            self._distribute_strategy = distribute_strategy

    reduce_per_replica.mended = True
    trainer.reduce_per_replica = reduce_per_replica
    trainer.TensorFlowTrainer._maybe_symbolic_build = maybe_symbolic_build
    trainer.TFEpochIterator = EpochIterator
    optimizer.TFOptimizer._clip_gradients = clip_gradients
    optimizer.TFOptimizer._all_reduce_sum_gradients = all_reduce_sum_gradients


class _Whole:
    """Distributes a dataset so that every worker sees all of it, its devices in parts.

    For validation and prediction. Keras would have each worker read another share, and of as many batches as there are
    in all: examples would be left out, and the answers to be predicted lie on many machines.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        self._strategy = strategy

    def experimental_distribute_dataset(self, batches: tf.data.Dataset):
        def mine(context: tf.distribute.InputContext) -> tf.data.Dataset:
            return in_parts(batches, first=0, count=context.num_replicas_in_sync // context.num_input_pipelines)

        return self._strategy.distribute_datasets_from_function(mine)


def in_parts(batches: tf.data.Dataset, *, first: int, count: int, of: int = 0) -> tf.data.Dataset:
    """Each batch as `count` batches, the parts from `first` on of `of` parts, all of them where that is 0."""
    of = of or count
    if of == 1:
        return batches

    def parts(*whole):
        if not isinstance(batches.element_spec, tuple):
            (whole,) = whole
        rows = tf.shape(tf.nest.flatten(whole)[0])[0]

        def part(at):
            at = tf.cast(at, tf.int32)
            begin, end = rows * at // of, rows * (at + 1) // of
            return tf.nest.map_structure(lambda one: one[begin:end], whole)

        return tf.data.Dataset.range(first, first + count).map(part)

    return batches.flat_map(parts)


def shared_out(strategy: tf.distribute.Strategy, batches: tf.data.Dataset, *, batch: int, cut: bool = False):
    """Training batches, of which each worker's devices get their part; as they are where there is one process.

    Every worker makes the whole batch, which is a pure function of the seed and the step, and keeps its part: so many
    workers see what one would. Where `cut` says so, what comes is this worker's part already.
    """
    if not many(strategy):
        return batches
    replicas = strategy.num_replicas_in_sync
    if batch % replicas:
        raise ValueError(f"a batch of {batch} cannot be shared by {replicas} devices alike: "
                         f"give --batch={batch // replicas * replicas or replicas}")  # fmt: skip

    def mine(context: tf.distribute.InputContext) -> tf.data.Dataset:
        local = replicas // context.num_input_pipelines
        if cut:
            parts = in_parts(batches, first=0, count=local)
        else:
            parts = in_parts(batches, first=context.input_pipeline_id * local, count=local, of=replicas)
        return parts.prefetch(2 * local)

    return strategy.distribute_datasets_from_function(mine)


def any_of(strategy: tf.distribute.Strategy, flag: bool) -> bool:
    """Whether any worker says so; all must ask at the same step."""
    return _summed(strategy, float(flag)) > 0


def lot(strategy: tf.distribute.Strategy) -> int:
    """A number by chance, whatever the seed, that all workers have in common; all must ask at the same step."""
    return int(_summed(strategy, float(secrets.randbelow(2**16) if chief() else 0)))  # float32 counts to 2**24


def _summed(strategy: tf.distribute.Strategy, value: float) -> float:
    given = tf.constant(value)
    one = strategy.run(lambda: tf.distribute.get_replica_context().all_reduce("SUM", given))
    return float(strategy.experimental_local_results(one)[0].numpy())


def meet(strategy: tf.distribute.Strategy) -> None:
    """Wait until every worker is here: one that leaves before the others have ended would break them off."""
    if many(strategy):
        any_of(strategy, True)


def digest(model) -> str:
    """Of a model's weights: workers that learned alike have the same; all must ask."""
    found = hashlib.sha256()
    for weight in model.get_weights():
        found.update(weight.tobytes())
    return found.hexdigest()[:16]


def average_moments(strategy: tf.distribute.Strategy, model) -> None:
    """Give batch normalisation's moving statistics, which each device keeps of its own parts, their mean over all."""
    moments = [variable for variable in model.variables if variable.path.endswith(("moving_mean", "moving_variance"))]
    if strategy.num_replicas_in_sync == 1 or not moments:
        return

    @tf.function
    def average():
        own = strategy.run(lambda: [tf.identity(variable.value) for variable in moments])
        for variable, values in zip(moments, own, strict=True):
            variable.assign(strategy.reduce("MEAN", values, axis=None))

    average()
