"""What a process of tests/test_workers.py does: it trains a small network as `training.fit` does.

KIND is plain, normalised, custom, or limited: then the time of the second worker alone is up at once. Writes
FOLDER/result-INDEX.json.
"""

import json
from pathlib import Path

import numpy as np


def main(folder: Path, kind: str, strategy: str, service: str = "") -> None:
    import keras
    import tensorflow as tf

    if strategy == "mirrored":
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    if strategy == "unmended":
        from shared.training import workers

        workers.mend = lambda: None
        strategy = "multiworker"

    from shared import data, run, training

    name = "run"
    clip = 0.05 if kind == "custom" else 0.0
    hours = {"max_hours": 1e-9 if training.workers.index() else 1.0} if kind == "limited" else {}
    config = run.Config(batch=8, epochs=5, strategy=strategy, data_service=service, clip=clip, name=name,
                        runs=str(folder), saved_models=str(folder), **hours)  # fmt: skip
    config = training.begin("vision.classify", config)
    random = np.random.default_rng(1)
    inputs = random.normal(size=(83, 4)).astype(np.float32)
    targets = tf.one_hot((inputs.sum(-1) > 0).astype(int), 2).numpy()

    def read(indices, step):
        noise = tf.random.stateless_normal([8, 4], seed=tf.stack([1, tf.cast(step, tf.int32)]))
        return tf.gather(inputs, indices) + 0.1 * noise, tf.gather(targets, indices)

    whole = data.in_order(inputs, targets, batch=41)  # of 83, the last batch has one
    splits = data.Splits(
        stream=data.stream(83, batch=8, seed=1, read=read), steps=250 if kind == "limited" else 10, train=whole,
        validation=whole, test=whole, preprocess=lambda x: x, names=("no", "yes"), request={"x": inputs[:2]}, about={},
    )  # fmt: skip

    class Custom(keras.Model):
        """A train_step of its own, as some tasks have."""

        def train_step(self, batch):
            x, y = batch
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True), training=True)
            self.optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)
            self._loss_tracker.update_state(loss * tf.distribute.get_strategy().num_replicas_in_sync)
            return {"loss": self._loss_tracker.result()}

    with training.strategy(config.strategy).scope():
        x = keras.Input([4])
        y = keras.layers.Dense(8, "tanh")(x)
        if kind == "normalised":
            y = keras.layers.BatchNormalization(synchronized=True)(y)
        model = (Custom if kind == "custom" else keras.Model)(x, keras.layers.Dense(2)(y))
        accuracy = keras.metrics.CategoricalAccuracy(name="accuracy")
        model.compile(
            keras.optimizers.Adam(training.cosine(config, splits, rate=0.02)),
            keras.losses.CategoricalCrossentropy(from_logits=True), metrics=[accuracy] if kind != "custom" else None,
        )  # fmt: skip
    history = {}

    class Curve(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            for key, value in logs.items():
                history.setdefault(key, []).append(float(value))

    training.fit(config, model, splits, callbacks=(Curve(),))
    evaluated = model.evaluate(splits.test, verbose=0, return_dict=True)
    predicted = model.predict(splits.test, verbose=0)
    result = {
        "history": history,
        "evaluated": {key: float(value) for key, value in evaluated.items()},
        "predicted": predicted.tolist(),
        "weights": [weight.tolist() for weight in model.get_weights()],
        "steps": int(keras.ops.convert_to_numpy(model.optimizer.iterations)),
    }
    (folder / f"result-{training.workers.index()}.json").write_text(json.dumps(result))
    training.workers.meet(training.strategy(config.strategy))
