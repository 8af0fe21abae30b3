"""What goes wrong while a network learns, said early and in words that help."""

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
        if loss[0] >= guessing:
            yield (f"after an epoch the loss, {loss[0]:.3f}, is no better than guessing one of {classes} classes "
                   f"({guessing:.3f}): look at the labels, or change the learning rate")  # fmt: skip
    rising = [later > earlier for earlier, later in zip(validation[-4:], validation[-3:], strict=False)]
    falling = [later < earlier for earlier, later in zip(loss[-4:], loss[-3:], strict=False)]
    earlier = len(validation) > 4 and validation[-4] > validation[-5]
    if len(validation) >= 4 and all(rising) and all(falling) and not earlier:
        yield ("validation loss has risen for three epochs while training loss fell: the network learns its examples "
               "by heart; more data, augmentation or dropout help")  # fmt: skip


class Gradients(keras.callbacks.Callback):
    """Norms of gradients by layer, to TensorBoard, on a batch at epochs that double; warns of what goes wrong.

    That is a gradient under 1e-7, one a hundred times that of the look before, and a layer with ReLU most of whose
    units are zero for every example of the batch. It begins after a minute: the first look costs a second or two.
    """

    VANISHED, EXPLODED, PATIENCE = 1e-7, 100.0, 60.0

    def __init__(self, splits: Splits, log_folder: str, say: Callable[[str, str], None]):
        super().__init__()
        self._splits, self._say = splits, say
        self._writer = tf.summary.create_file_writer(log_folder)
        self._last: dict[str, float] = {}
        self._begun, self._next = time.monotonic(), 1

    def set_model(self, model):
        super().set_model(model)

        @tf.function(reduce_retracing=True)
        def norms(inputs, targets):
            with tf.GradientTape() as tape:
                # As when it is asked: a pass as in training would move what dropout and normalisation remember.
                loss = model.compute_loss(inputs, targets, model(inputs, training=False))
            gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
            zero = tf.constant(0.0)
            return [zero if one is None else tf.norm(tf.convert_to_tensor(one)) for one in gradients]

        self._norms = norms

    def on_epoch_end(self, epoch, logs=None):
        early = time.monotonic() - self._begun < self.PATIENCE
        if early or epoch + 1 < self._next:  # early epochs tell most
            return
        self._next = 2 * (epoch + 1)
        inputs, targets = next(iter(self._splits.stream(epoch * self._splits.steps)))[:2]
        parts: dict[str, list[float]] = {}
        for variable, norm in zip(self.model.trainable_variables, self._norms(inputs, targets), strict=True):
            parts.setdefault(variable.path.rpartition("/")[0], []).append(float(norm))
        found = {name: float(np.linalg.norm(norms)) for name, norms in parts.items()}
        with self._writer.as_default(step=epoch):
            for name, value in found.items():
                tf.summary.scalar(f"gradient/{name}", value)
        self._writer.flush()
        gone = [name for name, value in found.items() if value < self.VANISHED]
        if gone:
            self._say("warning", f"the gradient of {', '.join(gone[:3])} has vanished (norm under {self.VANISHED:g})")
        grown = [name for name, value in found.items() if value > self.EXPLODED * self._last.get(name, np.inf)]
        if grown:
            self._say("warning", f"the gradient of {', '.join(grown[:3])} has grown a hundredfold; --clip=1 holds it")
        self._last = found
        for name in dead(self.model, inputs):
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
