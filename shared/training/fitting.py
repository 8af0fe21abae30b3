"""`fit` for every task: best epoch, early stop, exact resume, logs, learning curves, cost."""

import contextlib
import json
import math
import os
import shutil
import time
from pathlib import Path

import keras

from shared.data import Splits
from shared.run import Config, say, seconds_since_start
from shared.training.cost import InputClock
from shared.training.start import strategy


def cosine(
    config: Config, splits: Splits, *, rate: float, warm_up: float = 0.1
) -> keras.optimizers.schedules.CosineDecay:
    """A learning rate that rises to `rate` over the first share of all steps, then falls to zero along a cosine.

    Loshchilov & Hutter 2017 (SGDR), one period; the warm-up as in Goyal et al. 2017, section 2.2.
    """
    steps = config.epochs * splits.steps
    rising = max(1, round(warm_up * steps))
    return keras.optimizers.schedules.CosineDecay(
        rate / rising, decay_steps=max(1, steps - rising), warmup_target=rate, warmup_steps=rising
    )


def fit(
    config: Config, model: keras.Model, splits: Splits, *, callbacks: tuple[keras.callbacks.Callback, ...] = ()
) -> dict[str, float]:
    """Train a compiled model to its best epoch by validation loss or, where it has one, validation accuracy.

    Everything is written below `config.folder`. A run that was killed goes on where its last finished epoch ended, on
    the batches that came next, so that it ends with the weights of a run that was never interrupted.

    Returns:
        `train_seconds`, without validation, over all sittings; `examples_per_second` of it; `epochs` that were run;
        `best_epoch`, counted from 1; but for deterministic mode `input_wait`, the share of this sitting's training
        that was spent waiting for input.

    Raises:
        FloatingPointError: the loss is not finite any more.
    """
    keeper = _Keeper(config)
    keeper.set_model(model)
    with strategy(config.strategy).scope():
        model.optimizer.build(model.trainable_variables)
        keeper.restore()
    clock = InputClock()
    size = f"{model.count_params():,} parameters"
    say(
        "network", f"{model.name}: {size}, {splits.steps:,} steps of {config.batch} an epoch, {model.dtype_policy.name}"
    )
    if keeper.epoch < config.epochs and not keeper.stopped:
        batches = splits.stream(keeper.steps_done)
        model.fit(
            batches if config.deterministic else clock.watch(batches),  # no clock is allowed in deterministic mode
            steps_per_epoch=splits.steps,
            validation_data=splits.validation,
            initial_epoch=keeper.epoch,
            epochs=config.epochs,
            shuffle=False,
            verbose=0,
            callbacks=[
                keras.callbacks.TensorBoard(config.folder / "logs", write_graph=False),
                *callbacks,
                keeper,
            ],
        )
    with strategy(config.strategy).scope():
        keeper.take_best()
    plot_curves(keeper.history, config.folder / "learning_curve.png")
    cost = {
        "train_seconds": keeper.seconds,
        "examples_per_second": config.batch * keeper.steps_done / max(keeper.seconds, 1e-9),
        "epochs": keeper.epoch,
        "best_epoch": keeper.best_epoch + 1,
    }
    if keeper.seconds_here and not config.deterministic:
        cost["input_wait"] = clock.seconds / keeper.seconds_here
    return cost


class _Keeper(keras.callbacks.Callback):
    """Keeps the last and the best weights and the history on disk, times and reports epochs, stops in time.

    `checkpoint-N/` stands for N finished epochs. It is written under another name and then renamed, and older ones go
    only after that, so that there is a whole one at any moment from the first epoch's end.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.epoch = 0  # finished ones
        self.best_epoch = 0
        self.best = [-math.inf]
        self.history: dict[str, list[float]] = {}
        self.seconds = 0.0  # of training, over all sittings
        self.seconds_here = 0.0  # of this sitting
        self.steps_done = 0
        self.stopped = False
        self._since = None
        self._begun = False

    def restore(self) -> None:
        """Take up the newest whole checkpoint of the run, if there is one; one that is damaged is named and left."""
        for folder in sorted(self.config.folder.glob("checkpoint-*"), key=_number, reverse=True):
            try:
                state = json.loads((folder / "state.json").read_text())
                self.model.load_weights(folder / "last.weights.h5")
            except (OSError, ValueError, KeyError) as error:
                say("resume", f"{folder} is damaged ({error}); trying the one before")
                continue
            for variable, value in zip(self._seeds(), state.pop("seeds"), strict=True):
                variable.assign(value)
            for key, value in state.items():
                setattr(self, key, value)
            say("resume", f"{self.epoch} of {self.config.epochs} epochs are done, best so far {self.best_epoch + 1}")
            return
        if self.config.resume:
            say("resume", "no epoch was finished; starting anew")

    def take_best(self) -> None:
        """Put the best epoch's weights into the model."""
        folder = self.config.folder / f"checkpoint-{self.epoch}"
        if self.epoch and self.best_epoch != self.epoch - 1:
            self.model.load_weights(folder / "best.weights.h5")

    def _seeds(self) -> list[keras.Variable]:
        """Where the model's random layers (dropout) are in their sequence: Keras does not save it with the weights."""
        return [variable for variable in self.model.variables if variable.path.endswith("seed_generator_state")]

    def on_epoch_begin(self, epoch, logs=None):
        self._since = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self._last = batch
        if not self._begun:
            self._begun = True
            say("", f"first step done {seconds_since_start():.1f} s after the command was given")
        if logs and not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"the loss became {logs['loss']} in epoch {self.epoch + 1}; lower the learning rate, or use "
                f"--precision=float32; the last finished epoch is in {self.config.folder}"
            )

    def on_test_begin(self, logs=None):
        self._stop_clock()  # validation between epochs is not training time

    def on_epoch_end(self, epoch, logs=None):
        self._stop_clock()
        logs = {key: float(value) for key, value in logs.items()}
        steps = self._last + 1
        self.steps_done += steps
        self.epoch = epoch + 1
        for key, value in logs.items():
            self.history.setdefault(key, []).append(value)
        score = [logs.get("val_accuracy", -logs["val_loss"]), -logs["val_loss"]]  # the loss decides between equals
        better = score >= self.best  # of equals the later, which has learned more
        if better:
            self.best, self.best_epoch = score, epoch
        self.stopped = epoch - self.best_epoch >= self.config.patience
        self._save(better)
        shown = "  ".join(f"{key} {value:.4f}" for key, value in logs.items() if key != "learning_rate")
        rate = steps * self.config.batch / self._took
        say(f"{epoch + 1:>3}/{self.config.epochs}", f"{shown}  {rate:,.0f} examples/s{'  *' if better else ''}")
        if self.stopped:
            say("", f"no better epoch since {self.best_epoch + 1}: stopping early")
            self.model.stop_training = True

    def _stop_clock(self):
        if self._since is not None:
            self._took = time.perf_counter() - self._since
            self.seconds += self._took
            self.seconds_here += self._took
            self._since = None

    def _save(self, better: bool) -> None:
        names = ("epoch", "best_epoch", "best", "history", "seconds", "steps_done", "stopped")
        folder = self.config.folder / f"checkpoint-{self.epoch}"
        older = [path for path in self.config.folder.glob("checkpoint-*") if path != folder]
        draft = self.config.folder / f"draft-{os.getpid()}"
        try:
            draft.mkdir(exist_ok=True)
            self.model.save_weights(draft / "last.weights.h5")
            best = draft / "last.weights.h5" if better else max(older, key=_number) / "best.weights.h5"
            shutil.copy(best, draft / "best.weights.h5")
            state = {name: getattr(self, name) for name in names}
            state["seeds"] = [keras.ops.convert_to_numpy(variable).tolist() for variable in self._seeds()]
            (draft / "state.json").write_text(json.dumps(state))
            draft.rename(folder)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise OSError(
                f"cannot save epoch {self.epoch} to {folder}: {error}; make room, then go on with --resume "
                f"--name={self.config.name}"
            ) from error
        for path in older:
            with contextlib.suppress(OSError):
                shutil.rmtree(path)


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def plot_curves(history: dict[str, list[float]], path: Path) -> None:
    """Draw each metric over the epochs, training and validation together, as a PNG."""
    from matplotlib.figure import Figure

    metrics = [key for key in history if not key.startswith("val_") and key != "learning_rate"]
    figure = Figure(figsize=(5 * max(len(metrics), 1), 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, max(len(metrics), 1), squeeze=False)[0], metrics, strict=False):
        epochs = range(1, len(history[metric]) + 1)
        axes.plot(epochs, history[metric], label="training")
        if f"val_{metric}" in history:
            axes.plot(epochs, history[f"val_{metric}"], label="validation")
        axes.set(xlabel="epoch", ylabel=metric)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
