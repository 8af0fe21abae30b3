"""A run that is killed, told to end, or finds its disk damaged goes on as if nothing had happened."""

import dataclasses
import json
import os
import shutil
import signal

import forks
import keras
import numpy as np
import pytest
import tensorflow as tf
from test_training import history, make_config, make_model, make_splits

from shared import training
from shared.training import diagnosis, fitting
from shared.training.cost import forward_flops

LONG = (
    "vision.classify",
    "--size=8",
    "--width=8",
    "--batch=16",
    "--epochs=3",
    "--deterministic",
    "--checkpoint-every=5",
)


class KilledError(Exception):
    pass


def killed_at(monkeypatch, step):
    """Break off after a step of the whole run, as a kill would."""

    class Keeper(fitting._Keeper):
        def on_train_batch_end(self, batch, logs=None):
            super().on_train_batch_end(batch, logs)
            if self.steps_done + self._before + batch + 1 == step:
                raise KilledError

    monkeypatch.setattr(fitting, "_Keeper", Keeper)


@pytest.mark.parametrize("step", [3, 8, 13, 22])  # of 8 an epoch
def test_killed_within_an_epoch_equals_uninterrupted(tmp_path, monkeypatch, step):
    splits = make_splits()
    whole = make_config(tmp_path, name="whole")
    expected = make_model(whole, splits, dropout=0.3)
    training.fit(whole, expected, splits)
    broken = make_config(tmp_path, name="broken", checkpoint_every=2)
    with monkeypatch.context() as patch:
        killed_at(patch, step)
        with pytest.raises(KilledError):
            training.fit(broken, make_model(broken, splits, dropout=0.3), splits)
    newest = max(broken.folder.glob("checkpoint-*"), key=fitting._place)
    epoch, within = fitting._place(newest)
    assert step - (8 * epoch + within) <= 2  # no more than so many steps are lost
    again = dataclasses.replace(broken, resume=True, seed=7)
    resumed = make_model(again, splits, dropout=0.3)
    training.fit(again, resumed, splits)
    for want, have in zip(expected.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(want, have)
    for metric, curve in history(whole).items():
        np.testing.assert_allclose(history(again)[metric], curve, rtol=1e-6, err_msg=metric)


def signalled(tmp_path, number, *flags, epoch):
    """Train until a signal after seven steps of an epoch; the exit code, and what was said."""
    words = ("train", *LONG, "--name=broken", *flags)
    process = forks.start(
        forks.signalled, number, "broken", epoch, 7, *words, folder=tmp_path, out=tmp_path / f"log-{epoch}"
    )
    return forks.ended(process), (tmp_path / f"log-{epoch}").read_text()


def learned(tmp_path, version):
    """What a version reaches on the test, and its weights."""
    extra = tmp_path / "saved_models" / "vision.classify" / str(version) / "assets.extra"
    report = json.loads((extra / "metrics.json").read_text())
    return report["test"], keras.saving.load_model(extra / "model.keras").get_weights()


def test_same_seed_same_run_to_the_bit_and_killed_or_ended_is_no_different(forked, tmp_path):
    forked("train", *LONG, "--name=whole")
    code, said = signalled(tmp_path, signal.SIGKILL, epoch=0)
    assert code == -signal.SIGKILL, said
    code, said = signalled(tmp_path, signal.SIGTERM, "--resume", epoch=1)
    assert code == 0, said
    assert "0 of 3 epochs and 5 steps of the next are done" in said
    assert "by SIGTERM, saved; go on with --resume --name=broken" in said
    done = forked("train", *LONG, "--name=broken", "--resume")
    assert "steps of the next are done" in done.stdout
    (metrics, weights), (metrics_again, weights_again) = learned(tmp_path, 1), learned(tmp_path, 2)
    assert metrics == metrics_again
    for want, have in zip(weights, weights_again, strict=True):
        np.testing.assert_array_equal(want, have)


def test_what_weights_alone_do_not_tell_is_saved_between_epochs_only(tmp_path, capsys):
    config = make_config(tmp_path, checkpoint_every=1)
    keeper = fitting._Keeper(config, make_splits(), whole=True)
    keeper.set_model(make_model(config, make_splits()))
    keeper.on_epoch_begin(0)
    keeper.on_train_batch_end(0, {"loss": 1.0})
    keeper._terminated = True
    with pytest.raises(SystemExit) as ended:
        keeper.on_train_batch_end(1, {"loss": 1.0})
    assert ended.value.code == 0
    assert "by SIGTERM, what was saved is of whole epochs; go on with --resume" in capsys.readouterr().out
    assert not list(config.folder.glob("checkpoint-*"))


def test_a_second_sigterm_ends_at_once(tmp_path):
    config, splits = make_config(tmp_path), make_splits()
    keeper = fitting._Keeper(config, splits)
    child = os.fork()
    if not child:
        with keeper.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            assert keeper._terminated
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("damage", ["cut", "emptied", "without its state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, capsys, damage):
    config, splits = make_config(tmp_path), make_splits()
    expected = make_model(config, splits)
    training.fit(config, expected, splits)
    newest = config.folder / "checkpoint-4"
    weights_ = newest / "last.npz"
    if damage == "cut":
        weights_.write_bytes(weights_.read_bytes()[: weights_.stat().st_size // 2])
    elif damage == "emptied":
        weights_.write_bytes(b"")
    else:
        (newest / "state.json").unlink()
    again = dataclasses.replace(config, resume=True)
    resumed = make_model(again, splits)
    training.fit(again, resumed, splits)
    printed = capsys.readouterr().out
    assert "checkpoint-4 is damaged" in printed
    assert "3 of 4 epochs are done" in printed
    for want, have in zip(expected.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(want, have)


def test_training_ends_when_its_time_or_money_is_used_up(tmp_path, capsys):
    splits = make_splits()
    for limit in ({"max_hours": 1e-7}, {"max_cost": 1e-7, "price_per_hour": 1.0}):
        config = make_config(tmp_path, name="-".join(limit), epochs=50, **limit)
        cost = training.fit(config, make_model(config, splits), splits)
        assert cost["epochs"] < 50
        assert "is used up: stopping" in capsys.readouterr().out
    assert cost["price"] == pytest.approx(cost["train_seconds"] / 3600)
    again = dataclasses.replace(config, resume=True)
    assert training.fit(again, make_model(again, splits), splits)["epochs"] == cost["epochs"]
    assert "is used up already" in capsys.readouterr().out
    more = dataclasses.replace(config, resume=True, max_cost=0.0, epochs=4)
    assert training.fit(more, make_model(more, splits), splits)["epochs"] == 4


def test_what_a_run_cost(tmp_path):
    config, splits = make_config(tmp_path, watts=100.0), make_splits()
    cost = training.fit(config, make_model(config, splits), splits)
    assert cost["examples"] == 4 * 64
    assert cost["device_seconds"] == cost["train_seconds"]
    # Two dense layers, 4 to 8 to 2: products and sums, biases; what else counts is small.
    assert 2 * (4 * 8 + 8 * 2) <= cost["flops_per_example"] <= 2 * (4 * 8 + 8 * 2) + 60
    assert cost["flops_per_second"] == pytest.approx(3 * cost["flops_per_example"] * 256 / cost["train_seconds"])
    assert 0 < cost["share_of_peak"] < 1
    assert cost["kilowatt_hours"] == pytest.approx(0.1 * cost["train_seconds"] / 3600)


def test_streams_that_are_not_inputs_and_targets_cost_nothing_known():
    splits = dataclasses.replace(make_splits(), stream=lambda step: tf.data.Dataset.range(step, 100))
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)])
    assert forward_flops(model, splits) == 0
    assert diagnosis.origin(model, splits.stream(0)) == ""


def test_gradients_are_clipped_to_their_norm(tmp_path):
    config, splits = make_config(tmp_path, clip=1e-3, epochs=1), make_splits()
    moved = {}
    for clip in (0.0, 1e-3):
        keras.utils.set_random_seed(1)
        model = make_model(config, splits)
        model.compile(keras.optimizers.SGD(1.0), keras.losses.CategoricalCrossentropy(from_logits=True))
        before = model.get_weights()
        one = dataclasses.replace(splits, steps=1)
        training.fit(make_config(tmp_path, name=f"clip-{clip}", epochs=1, clip=clip), model, one)
        moves = [after - first for first, after in zip(before, model.get_weights(), strict=True)]
        moved[clip] = np.sqrt(sum((move**2).sum() for move in moves))
    assert moved[0.0] > 0.05
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-3)


# What is said when it goes wrong.


def test_origin_of_a_loss_that_is_not_finite():
    splits = make_splits()
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3, name="first"), keras.layers.Lambda(
        lambda x: x / 0.0, name="divided"), keras.layers.Dense(2, name="last")])  # fmt: skip
    assert diagnosis.origin(model, splits.stream(0)) == ": the output of layer divided is not finite"
    model.get_layer("first").bias.assign([0.0, np.nan, 0.0])
    assert diagnosis.origin(model, splits.stream(0)) == ": the weights of layer first are not finite"
    bad = splits.stream(0).map(lambda x, y: (x * np.inf, y))
    assert diagnosis.origin(model, bad) == ": an input of that batch is not finite"
    bad = splits.stream(0).map(lambda x, y: (x, y * np.nan))
    assert diagnosis.origin(model, bad) == ": a target of it is not finite"


def test_warnings_of_the_curves():
    splits = dataclasses.replace(make_splits(), names=("a", "b", "c", "d"))
    said = list(diagnosis.warnings({"loss": [1.5], "val_loss": [1.4], "accuracy": [0.2]}, splits))
    assert said == ["after an epoch the loss, 1.500, is no better than guessing one of 4 classes (1.386): look at the "
                    "labels, or change the learning rate"]  # fmt: skip
    assert not list(diagnosis.warnings({"loss": [1.2], "val_loss": [1.4], "accuracy": [0.2]}, splits))
    assert not list(diagnosis.warnings({"loss": [1.5], "val_loss": [1.4], "accuracy": [0.4]}, splits))
    falling, rising = [1.0, 0.9, 0.8, 0.7], [1.0, 1.1, 1.2, 1.3]
    (said,) = diagnosis.warnings({"loss": falling, "val_loss": rising}, splits)
    assert said.startswith("validation loss has risen for three epochs")
    assert not list(diagnosis.warnings({"loss": falling, "val_loss": [1.0, 1.1, 1.0, 1.3]}, splits))
    assert not list(diagnosis.warnings({"loss": [1.1, *falling], "val_loss": [0.9, *rising]}, splits))  # said before


def watched(tmp_path, model, factors):
    """What is said of a model while it trains for a hundred steps with a loss of each factor in turn."""
    said, splits = [], make_splits()
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    with model.distribute_strategy.scope():
        factor = tf.Variable(1.0)
        model.compile(keras.optimizers.SGD(0.0), lambda wanted, given: factor * loss(wanted, given))
        model.optimizer.build(model.trainable_variables)
    watcher = diagnosis.Gradients(splits, str(tmp_path / "logs"), lambda label, text: said.append(text))
    watcher.PATIENCE = 0.0
    for epoch, value in enumerate(factors):
        factor.assign(value)
        model.fit(splits.stream(0), steps_per_epoch=100, initial_epoch=epoch, epochs=epoch + 1, verbose=0,
                  shuffle=False, callbacks=[watcher])  # fmt: skip
    watcher.close()
    assert "apply" not in vars(model.optimizer)
    return said


def small():
    return keras.Sequential([keras.Input([4]), keras.layers.Dense(8, "relu", name="hidden"), keras.layers.Dense(2)])


def test_gradients_are_watched_and_found_well(tmp_path):
    model = small()
    assert watched(tmp_path, model, [1.0, 1.0]) == []
    (events,) = (tmp_path / "logs").glob("events.*")
    told = [event for event in tf.compat.v1.train.summary_iterator(str(events)) if event.summary.value]
    assert [(event.step, event.summary.value[0].tag) for event in told] == [
        (epoch, f"gradient/{layer.path}") for epoch in range(2) for layer in model.layers
    ]
    # The usual norm of the first hundred steps, that of the weights which never move.
    with tf.GradientTape() as tape:
        inputs, targets = next(iter(make_splits().stream(0)))
        loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, model(inputs)))
    once = tf.linalg.global_norm(tape.gradient(loss, [weight.value for weight in model.layers[-1].weights]))
    assert tf.make_ndarray(told[1].summary.value[0].tensor) == pytest.approx(float(once), rel=0.5)


DEVICES = pytest.mark.parametrize("strategy", ["one", "mirrored"])


@DEVICES
def test_gradients_that_vanish(tmp_path, strategy):
    with training.strategy(strategy).scope():
        model = small()
    said = watched(tmp_path, model, [1.0, 1e-9, 1e-9])
    assert len(said) == 1, said
    assert "has vanished: its norm was under 1e-07 for 100 steps" in said[0]
    assert "hidden" in said[0]


def test_gradients_that_explode(tmp_path):
    (said,) = watched(tmp_path, small(), [1.0, 1e4])
    assert "was a hundred times what is usual; --clip=1 holds it" in said


def test_units_that_died(tmp_path):
    model = small()
    model.get_layer("hidden").bias.assign(tf.fill([8], -1e6))
    said = watched(tmp_path, model, [1.0])
    assert any("most units of hidden are zero" in text for text in said)


@DEVICES
@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path, precision, strategy):
    """The loss stays finite; a loss scale leaves such a step out and goes on."""

    @tf.custom_gradient
    def steep(x):
        return x, lambda given: given / 0.0

    with training.strategy(strategy).scope():
        inputs = keras.Input([4])
        hidden = keras.layers.Dense(3, name="first")(inputs)
        hidden = keras.layers.Lambda(steep, output_shape=(3,))(hidden)
        model = keras.Model(inputs, keras.layers.Dense(2, name="last")(hidden))
        optimizer = keras.optimizers.SGD(0.1)
        if precision == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        model.compile(optimizer, keras.losses.CategoricalCrossentropy(from_logits=True))
    config, splits = make_config(tmp_path, epochs=1, strategy=strategy), make_splits()
    if precision == "mixed_float16":
        assert training.fit(config, model, splits)["epochs"] == 1
        assert all(np.isfinite(weights).all() for weights in model.get_weights())
        return
    with pytest.raises(FloatingPointError, match=r"the gradient of first became infinite .* by step 1 "):
        training.fit(config, model, splits)


def test_a_run_whose_data_are_refused_leaves_nothing(mistaken, tmp_path):
    mistaken("train", "vision.classify", "--data=nowhere")
    assert not list((tmp_path / "runs").iterdir())  # so that --resume finds the run before it


def test_a_full_disk_is_told_before_training(mistaken, tmp_path):
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    (tmp_path / "saved_models").write_text("in the way")
    said = mistaken("train", "vision.classify")
    assert "cannot write to saved_models" in said.err
    assert said.out == ""


def test_state_of_a_run_is_json_that_others_can_read(tmp_path):
    config, splits = make_config(tmp_path), make_splits()
    training.fit(config, make_model(config, splits), splits)
    state = json.loads((config.folder / "checkpoint-4" / "state.json").read_text())
    assert (state["epoch"], state["step_in_epoch"], state["steps_done"]) == (4, 0, 32)


@pytest.mark.parametrize("step", [8, 32])  # the last of an epoch, the last of all
def test_sigterm_at_the_end_of_an_epoch(tmp_path, monkeypatch, step):
    splits = make_splits()
    config = make_config(tmp_path)

    class Keeper(fitting._Keeper):
        def on_train_batch_end(self, batch, logs=None):
            if self.steps_done + self._before + batch + 1 == step:
                os.kill(os.getpid(), signal.SIGTERM)
            super().on_train_batch_end(batch, logs)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "_Keeper", Keeper)
        with pytest.raises(SystemExit) as end:
            training.fit(config, make_model(config, splits), splits)
    assert end.value.code == 0
    again = dataclasses.replace(config, resume=True)
    assert training.fit(again, make_model(again, splits), splits)["epochs"] == 4


def test_nothing_is_taken_from_a_damaged_checkpoint(tmp_path):
    """The best weights of a run are not copied from one that could not be read."""
    splits = make_splits()
    config = make_config(tmp_path, checkpoint_every=3, epochs=3)
    training.fit(config, make_model(config, splits), splits)
    newest = config.folder / "checkpoint-3"
    state = json.loads((newest / "state.json").read_text())
    (newest / "best.npz").write_bytes(b"")
    (newest / "state.json").write_text(json.dumps({**state, "best_epoch": 0}))
    more = dataclasses.replace(config, resume=True, epochs=4)
    assert training.fit(more, make_model(more, splits), splits)["epochs"] == 4
    assert list(config.folder.glob("damaged-checkpoint-3-*"))
    assert (config.folder / "checkpoint-4" / "best.npz").stat().st_size
