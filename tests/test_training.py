"""Learning: same seed same result, killed and resumed equals uninterrupted, one device equals two."""

import dataclasses
import json
import os
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from shared import data, run, training
from shared.training.cost import InputClock


def make_splits(*, batch=8):
    random = np.random.default_rng(1)
    inputs = random.normal(size=(64, 4)).astype(np.float32)
    targets = tf.one_hot((inputs.sum(-1) > 0).astype(int), 2).numpy()

    def read(indices, step):
        noise = tf.random.stateless_normal([batch, 4], seed=tf.stack([1, tf.cast(step, tf.int32)]))
        return tf.gather(inputs, indices) + 0.1 * noise, tf.gather(targets, indices)

    whole = data.in_order(inputs, targets, batch=32)
    return data.Splits(
        stream=data.stream(64, batch=batch, seed=1, read=read), steps=64 // batch, train=whole, validation=whole,
        test=whole, preprocess=lambda x: x, names=("no", "yes"), request={"x": inputs[:2]}, about={},
    )  # fmt: skip


def make_model(config, splits, *, dropout=0.0, rate=0.1):
    keras.utils.set_random_seed(config.seed)
    with training.strategy(config.strategy).scope():
        model = keras.Sequential(
            [keras.Input([4]), keras.layers.Dense(8, "tanh"), keras.layers.Dropout(dropout), keras.layers.Dense(2)]
        )
        model.compile(
            keras.optimizers.Adam(training.cosine(config, splits, rate=rate)),
            keras.losses.CategoricalCrossentropy(from_logits=True),
            metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")],
        )
    return model


def make_config(folder, **changes):
    config = run.Config(batch=8, epochs=4, name="a", runs=str(folder))
    config = dataclasses.replace(config, **changes)
    config.folder.mkdir(parents=True, exist_ok=True)
    return config


def history(config):
    newest = max(config.folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((newest / "state.json").read_text())["history"]


def test_fit_learns_and_leaves_what_it_promises(tmp_path, capsys):
    config, splits = make_config(tmp_path), make_splits()
    model = make_model(config, splits)
    cost = training.fit(config, model, splits)
    assert model.evaluate(splits.test, verbose=0, return_dict=True)["accuracy"] > 0.9
    assert cost["epochs"] == 4
    assert 0 < cost["input_wait"] < 1
    assert cost["examples_per_second"] * cost["train_seconds"] == pytest.approx(4 * 64)
    assert (config.folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((config.folder / "logs").rglob("events.*"))
    assert sorted(path.name for path in config.folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert "first step done" in capsys.readouterr().out


def test_cosine_schedule_by_hand(tmp_path):
    config, splits = make_config(tmp_path, epochs=5), make_splits()  # 40 steps, of which 4 rise
    rate = training.cosine(config, splits, rate=1.0)
    assert float(rate(4)) == pytest.approx(1.0)
    assert float(rate(2)) == pytest.approx((0.25 + 1.0) / 2)
    assert float(rate(22)) == pytest.approx(0.5)
    assert float(rate(40)) == pytest.approx(0.0, abs=1e-6)


def test_best_epoch_is_kept_and_training_stops_early(tmp_path):
    config, splits = make_config(tmp_path, epochs=30, patience=3), make_splits()
    model = make_model(config, splits, rate=3.0)  # far too high: it gets worse again
    cost = training.fit(config, model, splits)
    curve = history(config)["val_accuracy"]
    assert cost["epochs"] < 30
    assert cost["best_epoch"] == cost["epochs"] - 3
    best = model.evaluate(splits.validation, verbose=0, return_dict=True)["accuracy"]
    assert best == pytest.approx(max(curve))


def test_non_finite_loss_stops_with_advice(tmp_path):
    config, splits = make_config(tmp_path), make_splits()
    model = make_model(config, splits)
    model.layers[0].kernel.assign(tf.fill([4, 8], np.nan))
    with pytest.raises(
        FloatingPointError,
        match=r"nan in epoch 1, step 1: the weights of layer dense\w* are not finite; lower the learning rate",
    ):
        training.fit(config, model, splits)


def test_a_validation_loss_that_is_not_finite_ends_the_run(tmp_path):
    config, splits = make_config(tmp_path), make_splits()
    inputs, targets = next(iter(splits.validation))
    bad = data.in_order(np.full_like(inputs, np.nan), targets.numpy(), batch=32)
    with pytest.raises(FloatingPointError, match="the validation loss became nan in epoch 1; lower the learning rate"):
        training.fit(config, make_model(config, splits), dataclasses.replace(splits, validation=bad))
    assert not list(config.folder.glob("checkpoint-*"))


def stop_after(monkeypatch, epochs):
    """Break off as a kill would, between the end of one epoch and the start of the next."""

    class KilledError(Exception):
        pass

    from shared.training import fitting as module

    class Keeper(module._Keeper):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == epochs:
                raise KilledError
            super().on_epoch_begin(epoch, logs)

    monkeypatch.setattr(module, "_Keeper", Keeper)
    return KilledError


def whole_and_resumed(monkeypatch, splits, model_of, whole, broken, again):
    """Two models: one that learned in one go, and one whose run was broken off after two epochs and went on."""
    expected = model_of(whole)
    training.fit(whole, expected, splits)
    with monkeypatch.context() as patch:
        killed = stop_after(patch, 2)
        with pytest.raises(killed):
            training.fit(broken, model_of(broken), splits)
    resumed = model_of(again)
    assert training.fit(again, resumed, splits)["epochs"] == 4
    return expected, resumed


@pytest.mark.parametrize("steps_per_execution", [1, 3])  # 3 does not divide the 8 steps of an epoch
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, steps_per_execution):
    splits = make_splits()

    def model_of(config):
        model = make_model(config, splits, dropout=0.3)
        model.steps_per_execution = steps_per_execution
        return model

    whole, broken = (make_config(tmp_path, name=name) for name in ("whole", "broken"))
    again = dataclasses.replace(broken, resume=True, seed=7)  # the fresh weights' seed must not matter
    expected, resumed = whole_and_resumed(monkeypatch, splits, model_of, whole, broken, again)
    for want, have in zip(expected.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(want, have)
    assert history(whole) == history(again)


def test_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, capsys):
    config, splits = make_config(tmp_path), make_splits()
    training.fit(config, make_model(config, splits), splits)
    newer = config.folder / "checkpoint-5"
    newer.mkdir()
    (newer / "state.json").write_text('{"epoch"')
    training.fit(dataclasses.replace(config, resume=True), make_model(config, splits), splits)
    printed = capsys.readouterr().out
    assert "checkpoint-5 is damaged" in printed
    assert "4 of 4 epochs are done" in printed


def test_full_disk_names_the_way_on(tmp_path, monkeypatch):
    config, splits = make_config(tmp_path), make_splits()
    model = make_model(config, splits)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"No space left on device; make room, then go on with --resume --name=a"):
        training.fit(config, model, splits)
    assert not list(config.folder.glob("draft-*"))


def test_one_device_equals_two(tmp_path):
    splits = make_splits()
    assert len(tf.config.list_logical_devices("CPU")) == 2
    curves = {}
    for strategy in ("one", "mirrored"):
        config = make_config(tmp_path, name=strategy, strategy=strategy)
        assert training.strategy(strategy).num_replicas_in_sync == {"one": 1, "mirrored": 2}[strategy]
        training.fit(config, make_model(config, splits), splits)
        curves[strategy] = history(config)
    for metric, curve in curves["one"].items():
        np.testing.assert_allclose(curve, curves["mirrored"][metric], atol=1e-5, err_msg=metric)


def test_layers_with_lora_go_on_learning_after_a_resume(tmp_path, monkeypatch):
    splits = make_splits()

    def model_of(config):
        keras.utils.set_random_seed(1)  # what LoRA leaves alone comes from a preset, the same each time
        model = make_model(config, splits)
        next(layer for layer in model.layers if isinstance(layer, keras.layers.Dense)).enable_lora(2)
        return model

    whole, broken = (make_config(tmp_path, name=name) for name in ("whole", "broken"))
    again = dataclasses.replace(broken, resume=True)
    expected, resumed = whole_and_resumed(monkeypatch, splits, model_of, whole, broken, again)
    assert any("lora" in weight.path for weight in resumed.weights)
    for want, have in zip(expected.weights, resumed.weights, strict=True):
        np.testing.assert_array_equal(want.numpy(), have.numpy(), err_msg=want.path)
    assert history(whole) == history(again)


def test_resumed_on_two_devices(tmp_path, monkeypatch):
    """Broken off on two devices and gone on with there equals a run on one that nothing broke off."""
    splits = make_splits()
    whole = make_config(tmp_path, name="whole", strategy="one")
    broken = make_config(tmp_path, name="broken", strategy="mirrored")
    again = dataclasses.replace(broken, resume=True)
    expected, resumed = whole_and_resumed(
        monkeypatch, splits, lambda config: make_model(config, splits), whole, broken, again
    )
    for want, have in zip(expected.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_allclose(want, have, atol=1e-5)


def test_input_clock_measures_what_training_waits():
    def produce(number):
        tf.py_function(lambda: time.sleep(0.05), [], [])
        return number

    slow, fast = InputClock(), InputClock()
    begun = time.monotonic()
    for _ in slow.watch(tf.data.Dataset.range(10).map(produce)):
        pass
    passed = time.monotonic() - begun
    first = 0.0
    for _ in fast.watch(tf.data.Dataset.range(10).map(produce).prefetch(2)):
        first = first or fast.seconds
        time.sleep(0.1)  # training that takes longer than its input
    assert 0.5 <= slow.seconds <= passed  # however slow the machine, each wait once
    assert first >= 0.05
    assert fast.seconds - first < slow.seconds / 4  # for the first batch only


def test_input_clock_leaves_batches_alone():
    clock = InputClock()
    watched = clock.watch(tf.data.Dataset.range(5))
    assert list(watched.as_numpy_iterator()) == [0, 1, 2, 3, 4]
    assert clock.seconds > 0


def test_no_thread_that_sleeps_holds_up_the_end(tmp_path, monkeypatch):
    """With TensorFlow's search for numbers of threads, the end of one `fit` in four stood still for seconds."""
    read = []

    def fit(model, batches, *, validation_data, **others):
        read.extend([batches, validation_data])
        return keras_fit(model, batches, validation_data=validation_data, **others)

    keras_fit = keras.Model.fit
    monkeypatch.setattr(keras.Model, "fit", fit)
    config, splits = make_config(tmp_path, epochs=1), make_splits()
    training.fit(config, make_model(config, splits), splits)
    assert [batches.options().autotune.enabled for batches in read] == [False, False]


# The start of a run.


def begin(tmp_path, **changes):
    config = run.Config(runs=str(tmp_path / "runs"), saved_models=str(tmp_path / "saved"), **changes)
    return training.begin("vision.classify", config)


def test_runs_get_names_of_their_own(tmp_path):
    first, second = begin(tmp_path), begin(tmp_path)
    os.utime(first.folder / "config.json", (1, 1))  # an earlier one than its clock may tell apart
    assert first.name != second.name
    assert first.name.startswith("vision.classify-")
    assert begin(tmp_path, resume=True).name == second.name
    with pytest.raises(ValueError, match=r"holds a run already: add --resume"):
        begin(tmp_path, name=first.name)


def test_resume_needs_a_run_with_the_same_settings(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run of vision\.classify is in"):
        begin(tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match=r"there is no run in .*nothing"):
        begin(tmp_path, resume=True, name="nothing")
    begin(tmp_path, name="mine", epochs=3)
    with pytest.raises(ValueError, match=r"other settings .epochs was 3, is 4"):
        begin(tmp_path, name="mine", epochs=4, resume=True)


def test_unwritable_folder_is_told_before_any_work(tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"cannot write to .*runs.*; make room or name another folder"):
        begin(tmp_path, name="x")
