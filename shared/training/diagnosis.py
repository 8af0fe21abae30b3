"""What goes wrong while a network learns, said early and in words that help."""

import math
import time
from collections.abc import Callable, Iterator, Mapping

import keras
import numpy as np
import tensorflow as tf

from shared.data import Splits


def origin(model: keras.Model, batches: tf.data.Dataset) -> str:
    """Where a loss that is not finite begins: input, weights, or the first layer whose output is not finite.

    `batches` begins with the batch that it happened on. Weights are as the last update left them.
    """
    if not isinstance(batches.element_spec, tuple):
        return ""
    inputs, targets = next(iter(batches))[:2]
    for kind, tensors in (("input", inputs), ("target", targets)):
        if not all(_finite(tensor) for tensor in tf.nest.flatten(tensors)):
            return f": an {kind} of that batch is not finite" if kind == "input" else ": a target of it is not finite"
    try:
        layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
        outputs = keras.Model(model.inputs, [layer.output for layer in layers])(inputs, training=False)
    except (AttributeError, ValueError):  # no graph of layers to look into
        layers, outputs = [], []
    for layer, output in zip(layers, outputs if isinstance(outputs, list) else [outputs], strict=False):
        if not all(_finite(weight.value) for weight in layer.weights):
            return f": the weights of layer {layer.name} are not finite"
        if not all(_finite(tensor) for tensor in tf.nest.flatten(output)):
            return f": the output of layer {layer.name} is not finite"
    for variable in model.trainable_variables:
        if not _finite(variable.value):
            return f": {variable.path} is not finite"
    return ""


def _finite(tensor) -> bool:
    tensor = tf.convert_to_tensor(tensor)
    return not tensor.dtype.is_floating or bool(tf.reduce_all(tf.math.is_finite(tensor)))


def warnings(history: Mapping[str, list[float]], splits: Splits) -> Iterator[str]:
    """What the curves of a run say that a person should know, once, in the epoch where it shows."""
    loss, validation = history.get("loss", []), history.get("val_loss", [])
    classes = len(splits.names)
    if len(loss) == 1 and classes > 1 and "accuracy" in history:
        guessing = np.log(classes)
        # Penalties and smoothed targets raise a loss, also of a network that has learned.
        if loss[0] >= guessing and history["accuracy"][0] < 1 / classes + 0.1:
            yield (f"after an epoch the loss, {loss[0]:.3f}, is no better than guessing one of {classes} classes "
                   f"({guessing:.3f}): look at the labels, or change the learning rate")  # fmt: skip
    rising = [later > earlier for earlier, later in zip(validation[-4:], validation[-3:], strict=False)]
    falling = [later < earlier for earlier, later in zip(loss[-4:], loss[-3:], strict=False)]
    earlier = len(validation) > 4 and validation[-4] > validation[-5]
    if len(validation) >= 4 and all(rising) and all(falling) and not earlier:
        yield ("validation loss has risen for three epochs while training loss fell: the network learns its examples "
               "by heart; more data, augmentation or dropout help")  # fmt: skip


class Gradients(keras.callbacks.Callback):
    """Watches the gradient of every tenth step, by layer: its norm goes to TensorBoard; what goes wrong is said once.

    That is a gradient under 1e-7 for 100 steps on end, and one a hundred times what is usual for its layer. One that is
    not finite while the loss is ends the run. After epochs that double, from a minute on, it also looks for layers with
    ReLU most of whose units are zero for every example of a batch. It sees what the optimizer is given, on the first of
    many devices: what that found in its part of the batch.
    """

    VANISHED, STEPS, EXPLODED, PATIENCE = 1e-7, 100, 100.0, 60.0
    # Steps between two looks. With one at each step of 25 ms `fit` cost 4.8 % over Keras's own, so it costs 2.0 %.
    EVERY = 10

    def __init__(self, splits: Splits, log_folder: str, say: Callable[[str, str], None]):
        super().__init__()
        self._splits, self._say = splits, say
        self._writer = tf.summary.create_file_writer(log_folder)
        self._begun, self._next = time.monotonic(), 1
        self._said: set[str] = set()

    def set_model(self, model):
        """Have the optimizer show its gradients, from before the training step is traced."""
        super().set_model(model)
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        if "apply" in vars(optimizer):  # `fit` was called before
            return
        apply, variables = optimizer.apply, model.trainable_variables
        self.names = list(dict.fromkeys(variable.path.rpartition("/")[0] or variable.path for variable in variables))
        of_layer = {id(variable): self.names.index(variable.path.rpartition("/")[0] or variable.path)
                    for variable in variables}  # fmt: skip
        # A layer's norm now and as it usually is, steps on end under VANISHED, steps seen, and whether it ever leapt.
        self._seen = [tf.Variable(tf.zeros(len(self.names)), trainable=False) for _ in range(5)]
        now, usual, quiet, seen, leapt = self._seen

        def note(norms):
            leaps = (seen >= self.STEPS) & (norms > self.EXPLODED * usual)
            leapt.assign(tf.maximum(leapt, tf.cast(leaps, tf.float32)))
            usual.assign(tf.where(seen > 0, 0.9 * usual + 0.1 * norms, norms))
            quiet.assign(tf.where(norms < self.VANISHED, quiet + self.EVERY, 0))
            seen.assign_add(tf.fill([len(self.names)], float(self.EVERY)))
            now.assign(norms)

        def watched(grads, trainable_variables=None):
            if tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group):
                return apply(grads, trainable_variables)
            given = list(trainable_variables or variables)
            pairs = [(grad, of_layer[id(variable)]) for grad, variable in zip(grads, given, strict=True)
                     if grad is not None and id(variable) in of_layer]  # fmt: skip

            def look():
                # Of a table of vectors, the rows that the batch touched.
                parts = [tf.cast(getattr(grad, "values", grad), tf.float32) for grad, _ in pairs]
                squares = [tf.reduce_sum(tf.square(part)) for part in parts]
                note(tf.sqrt(tf.math.unsorted_segment_sum(squares, [layer for _, layer in pairs], len(self.names))))
                return True

            tf.cond(tf.equal(tf.cast(optimizer.iterations.value, tf.int32) % self.EVERY, 0), look, lambda: False)
            return apply(grads, trainable_variables)

        optimizer.apply = watched

    def close(self) -> None:
        """Leave the optimizer as it was."""
        vars(getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)).pop("apply", None)
        self._writer.close()

    def on_train_batch_end(self, batch, logs=None):
        if batch % self.EVERY:
            return
        norms = self._seen[0].numpy()
        if not np.isfinite(norms).all() and math.isfinite((logs or {}).get("loss", 0.0)):
            # What is not finite flows back from where it began to the first layer.
            name = self.names[np.flatnonzero(~np.isfinite(norms))[-1]]
            raise FloatingPointError(
                f"the gradient of {name} became infinite or not a number by step {batch + 1} of an epoch, while the "
                "loss was finite: lower the learning rate, or use --precision=float32"
            )
        if batch % self.STEPS == 0:
            self._warn()

    def _warn(self) -> None:
        _, _, quiet, _, leapt = (variable.numpy() for variable in self._seen)
        for found, text in (
            (quiet >= self.STEPS, f"has vanished: its norm was under {self.VANISHED:g} for {self.STEPS} steps"),
            (leapt > 0, "was a hundred times what is usual; --clip=1 holds it"),
        ):
            names = [name for name in np.array(self.names)[found] if f"{name} {text}" not in self._said]
            if names:
                self._say("warning", f"the gradient of {', '.join(names[:3])} {text}")
            self._said.update(f"{name} {text}" for name in names)

    def on_epoch_end(self, epoch, logs=None):
        self._warn()
        with self._writer.as_default(step=epoch):
            for name, value in zip(self.names, self._seen[1].numpy(), strict=True):
                tf.summary.scalar(f"gradient/{name}", value)
        self._writer.flush()
        early = time.monotonic() - self._begun < self.PATIENCE
        if early or epoch + 1 < self._next:
            return
        self._next = 2 * (epoch + 1)
        batch = next(iter(self._splits.stream(epoch * self._splits.steps)))
        for name in dead(self.model, batch[0]):
            self._say("warning", f"most units of {name} are zero for every example of a batch: a lower learning rate "
                                 "keeps ReLUs alive")  # fmt: skip


def dead(model: keras.Model, inputs) -> list[str]:
    """Layers with ReLU of which more than half of the units give zero for all of a batch."""
    layers = [layer for layer in getattr(model, "layers", [])
              if getattr(getattr(layer, "activation", None), "__name__", "") == "relu"
              or isinstance(layer, keras.layers.ReLU)]  # fmt: skip
    try:
        outputs = keras.Model(model.inputs, [layer.output for layer in layers])(inputs, training=False)
    except (AttributeError, ValueError):
        return []
    outputs = outputs if isinstance(outputs, list) else [outputs]
    shares = [float(tf.reduce_mean(tf.cast(tf.reduce_all(output <= 0, axis=range(len(output.shape) - 1)), tf.float32)))
              for output in outputs]  # fmt: skip
    return [layer.name for layer, share in zip(layers, shares, strict=True) if share > 0.5]
