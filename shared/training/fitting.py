"""`fit` for every task: best epoch, early stop, exact resume, logs, learning curves, cost."""

import contextlib
import json
import math
import os
import shutil
import signal
import threading
import time
import zipfile
from pathlib import Path

import keras
import numpy as np

from shared.data import Splits, untuned
from shared.run import Config, say, seconds_since_start
from shared.training import diagnosis, service, workers
from shared.training.cost import InputClock, account
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
    config: Config,
    model: keras.Model,
    splits: Splits,
    *,
    callbacks: tuple[keras.callbacks.Callback, ...] = (),
    whole: bool = False,
) -> dict[str, float]:
    """Train a compiled model to its best epoch by validation loss or, where it has one, validation accuracy.

    Everything is written below `config.folder`. A run that was killed goes on from its last checkpoint, on the batches
    that came next, so that it ends with the weights of a run that was never interrupted. SIGTERM saves and ends the
    process with exit code 0; a second one ends it at once.

    Args:
        config: of the run.
        model: compiled.
        splits: what it learns from.
        callbacks: to Keras, besides those for all that is said here.
        whole: what an epoch does hangs on more than weights, so it goes on from its beginning, never from within it.

    Returns:
        `train_seconds`, without validation, over all sittings; `examples_per_second` of it; `epochs` that were run;
        `best_epoch`, counted from 1; what the run cost (`cost.account`); but for deterministic mode `input_wait`, the
        share of this sitting's training that was spent waiting for input.

    Raises:
        FloatingPointError: the loss is not finite any more; names the layer where that begins. Or validation's is not.
        SystemExit: SIGTERM came, and the run is saved.
        ConnectionError: the data service is gone.
    """
    devices = strategy(config.strategy)
    keeper = _Keeper(config, splits, whole=whole)
    keeper.set_model(model)
    if config.clip:
        getattr(model.optimizer, "inner_optimizer", model.optimizer).global_clipnorm = config.clip
    reader = service.Reader(config, splits, devices) if config.data_service else None
    with devices.scope():
        model.optimizer.build(model.trainable_variables)
        keeper.restore()
    clock = InputClock()
    size = f"{model.count_params():,} parameters"
    say(
        "network", f"{model.name}: {size}, {splits.steps:,} steps of {config.batch} an epoch, {model.dtype_policy.name}"
    )
    watched = not config.deterministic and not workers.many(devices)  # no clock is allowed in deterministic mode
    watchers = []
    with keeper.listening(), contextlib.ExitStack() as closing:
        if reader:
            closing.enter_context(reader.telling())
        if workers.chief():
            watchers.append(_Curves(config.folder / "logs", write_graph=False))
        if workers.chief() and type(model).train_step is keras.Model.train_step:
            watchers.append(diagnosis.Gradients(splits, str(config.folder / "logs" / "gradients"), say))
            watchers[-1].set_model(model)
            closing.callback(watchers[-1].close)
        if keeper.epoch and not keeper.step_in_epoch and keeper._too_long(0):
            say("", "the time or the money that was given is used up already")
            keeper.over = True
        while keeper.epoch < config.epochs and not keeper.stopped and not keeper.over:
            batches = untuned((reader or splits).stream(keeper.steps_done + keeper.step_in_epoch))
            if watched:
                batches = clock.watch(batches)
            model.fit(
                workers.shared_out(devices, batches, batch=config.batch, cut=bool(reader)),
                # What is left of an epoch that was broken off is an epoch of its own to Keras.
                steps_per_epoch=splits.steps - keeper.step_in_epoch,
                validation_data=splits.validation,
                initial_epoch=keeper.epoch,
                epochs=keeper.epoch + 1 if keeper.step_in_epoch else config.epochs,
                shuffle=False,
                verbose=0,
                callbacks=[
                    *watchers,
                    *callbacks,
                    keeper,
                ],
            )
    workers.meet(devices)  # the chief has written its last checkpoint
    with devices.scope():
        keeper.take_best()
    if workers.many(devices):
        say("digest", f"{workers.digest(model)} of the weights, the same in every worker's log")
    if workers.chief():
        plot_curves(keeper.history, config.folder / "learning_curve.png")
    cost = {
        "train_seconds": keeper.seconds,
        "examples_per_second": config.batch * keeper.steps_done / max(keeper.seconds, 1e-9),
        "epochs": keeper.epoch,
        "best_epoch": keeper.best_epoch + 1,
        **account(config, model, splits, seconds=keeper.seconds, steps=keeper.steps_done,
                  devices=devices.num_replicas_in_sync),
    }  # fmt: skip
    if keeper.seconds_here and watched:
        cost["input_wait"] = clock.seconds / keeper.seconds_here
    return cost


class _Curves(keras.callbacks.TensorBoard):
    """TensorBoard's curves by epoch: Keras also writes every step, which costs short ones 3 % of their time."""

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, None)


class _Keeper(keras.callbacks.Callback):
    """Keeps the last and the best weights and the history on disk, times and reports epochs, stops in time.

    `checkpoint-N` stands for N finished epochs, `checkpoint-N-at-S` for S steps of the next. Each is written under
    another name and then renamed, and of the older ones the newest stays, in case this one is damaged. `whole`: there
    are none within epochs.
    """

    def __init__(self, config: Config, splits: Splits, *, whole: bool = False):
        super().__init__()
        self.config, self.splits, self.whole = config, splits, whole
        self.epoch = 0  # finished ones
        self.step_in_epoch = 0  # steps of the epoch that was not finished
        self.best_epoch = 0
        self.best = [-math.inf]
        self.history: dict[str, list[float]] = {}
        self.seconds = 0.0  # of training, over all sittings
        self.seconds_here = 0.0  # of this sitting
        self.steps_done = 0  # of finished epochs
        self.stopped = False
        self.over = False  # the time or money that was given is used up
        self._since = None
        self._begun = False
        self._measured: list = []  # what the metrics of the broken-off epoch had counted
        self._saved_at = time.monotonic()
        self._terminated = False

    @contextlib.contextmanager
    def listening(self):
        """While this block lasts, SIGTERM saves at the next step; a second one ends the process at once."""

        def end(*_):
            if self._terminated:
                os._exit(128 + signal.SIGTERM)
            self._terminated = True

        if threading.current_thread() is not threading.main_thread() or workers.many(strategy(self.config.strategy)):
            yield  # among many workers none can stop alone: a second's notice is what the last checkpoint is for
            return
        before = signal.signal(signal.SIGTERM, end)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def restore(self) -> None:
        """Take up the newest whole checkpoint of the run, if there is one; one that is damaged is named and left."""
        for folder in sorted(self.config.folder.glob("checkpoint-*"), key=_place, reverse=True):
            if self.whole and _place(folder)[1]:  # of an earlier version of this program
                continue
            try:
                state = json.loads((folder / "state.json").read_text())
                if state["best_epoch"] != state["epoch"] - 1 and state["history"]:
                    self._read(folder / "best.npz")  # it will be asked for in the end
                self._put(self._read(folder / "last.npz"))
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                say("resume", f"{folder} is damaged ({error}); trying the one before")
                if workers.chief():  # put aside: nothing shall be taken from it
                    folder.rename(folder.with_name(f"damaged-{folder.name}-{os.getpid()}"))
                continue
            self._measured = state.pop("measured")
            for key, value in state.items():
                setattr(self, key, value)
            within = f" and {self.step_in_epoch} steps of the next" if self.step_in_epoch else ""
            say("resume", f"{self.epoch} of {self.config.epochs} epochs{within} are done, "
                          f"best so far {self.best_epoch + 1}")  # fmt: skip
            return
        if self.config.resume:
            say("resume", "nothing was saved; starting anew")

    def take_best(self) -> None:
        """Put the best epoch's weights into the model."""
        folder = self.config.folder / f"checkpoint-{self.epoch}"
        if self.epoch and self.best_epoch != self.epoch - 1:
            self._put(self._read(folder / "best.npz"))

    def _variables(self) -> list[keras.Variable]:
        """What the run goes on with: weights, the optimizer's state, and where random layers are in their sequence.

        Not what metrics have counted: they exist only from the first step on.
        """
        counted = {id(variable) for variable in self.model.metrics_variables}
        every = [*self.model.variables, *self.model.optimizer.variables]
        return [variable for variable in {id(one): one for one in every}.values() if id(variable) not in counted]

    def _read(self, path: Path) -> list[np.ndarray]:
        """The variables' values in a file, in their order. ValueError where they are of another network."""
        with path.open("rb") as raw, np.load(raw) as file:
            values = [file[name] for name in file.files]
        wanted = [tuple(variable.shape) for variable in self._variables()]
        if [value.shape for value in values] != wanted:
            raise ValueError(f"{path} holds another network, or its optimizer is another")
        return values

    def _put(self, values: list[np.ndarray]) -> None:
        for variable, value in zip(self._variables(), values, strict=True):
            variable.assign(value)

    def on_epoch_begin(self, epoch, logs=None):
        self._since = time.perf_counter()
        self._before = self.step_in_epoch

    def on_train_batch_end(self, batch, logs=None):
        self._last = batch
        if not self._begun:
            self._begun = True
            say("", f"first step done {seconds_since_start():.1f} s after the command was given")
        if self._measured:  # the metrics exist only now; what they count, sums, goes on where it was
            for variable, value in zip(self.model.metrics_variables, self._measured, strict=True):
                variable.assign_add(value)
            self._measured = []
        if logs and not math.isfinite(logs["loss"]):
            step = self.steps_done + self._before + batch
            raise FloatingPointError(
                f"the loss became {logs['loss']} in epoch {self.epoch + 1}, step {self._before + batch + 1}"
                f"{diagnosis.origin(self.model, self.splits.stream(step))}; {self._advice()}"
            )
        done = self._before + batch + 1
        if done < self.splits.steps:  # the end of an epoch saves by itself
            if self._terminated:
                if self.whole:
                    self._leave("what was saved is of whole epochs")
                self._save_within(done)
                self._leave()
            if not self.whole and self._due(done):
                self._save_within(done)
        if self._too_long(done):
            say("", "the time or the money that was given is used up: stopping")
            self.over = self.model.stop_training = True  # with more of it --resume goes on

    def _advice(self) -> str:
        return (
            f"lower the learning rate, use --clip=1 or --precision=float32; what was saved is in {self.config.folder}"
        )

    def _leave(self, told: str = "saved") -> None:
        say("stopped", f"by SIGTERM, {told}; go on with --resume --name={self.config.name}")
        raise SystemExit(0)

    def _too_long(self, done: int) -> bool:
        limit, devices = _most_seconds(self.config), strategy(self.config.strategy)
        if limit == math.inf or not workers.many(devices):
            return self._spent() > limit
        # All must stop at one step, and their clocks differ. An epoch may have fewer than a hundred.
        return (done % 100 == 0 or done == self.splits.steps) and workers.any_of(devices, self._spent() > limit)

    def _due(self, done: int) -> bool:
        every = self.config.checkpoint_every
        if every or workers.many(strategy(self.config.strategy)):  # where all must save at one step, clocks differ
            return done % (every or 1000) == 0
        return time.monotonic() - self._saved_at > 60

    def _spent(self) -> float:
        return self.seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def on_test_begin(self, logs=None):
        self._stop_clock()  # validation between epochs is not training time
        workers.average_moments(strategy(self.config.strategy), self.model)

    def on_epoch_end(self, epoch, logs=None):
        self._stop_clock()
        logs = {key: float(value) for key, value in logs.items()}
        steps = self._last + 1
        if not math.isfinite(logs["val_loss"]):
            told = f"the validation loss became {logs['val_loss']} in epoch {epoch + 1}; {self._advice()}"
            raise FloatingPointError(told)
        self.steps_done += self._before + steps
        self.step_in_epoch = 0
        self.epoch = epoch + 1
        for key, value in logs.items():
            self.history.setdefault(key, []).append(value)
        score = [logs.get("val_accuracy", -logs["val_loss"]), -logs["val_loss"]]  # the loss decides between equals
        better = score >= self.best  # of equals the later, which has learned more
        if better:
            self.best, self.best_epoch = score, epoch
        patient = epoch - self.best_epoch < self.config.patience
        self.stopped = not patient
        self._save(f"checkpoint-{self.epoch}", better=better)
        shown = "  ".join(f"{key} {value:.4f}" for key, value in logs.items() if key != "learning_rate")
        rate = steps * self.config.batch / self._took
        say(f"{epoch + 1:>3}/{self.config.epochs}", f"{shown}  {rate:,.0f} examples/s{'  *' if better else ''}")
        for warning in diagnosis.warnings(self.history, self.splits):
            say("warning", warning)
        if not patient:
            say("", f"no better epoch since {self.best_epoch + 1}: stopping early")
        self.model.stop_training = self.stopped or self.over
        if self._terminated:
            self._leave()

    def _stop_clock(self):
        if self._since is not None:
            self._took = time.perf_counter() - self._since
            self.seconds += self._took
            self.seconds_here += self._took
            self._since = None

    def _save_within(self, done: int) -> None:
        """Save in the middle of an epoch, with what its metrics have counted so far."""
        workers.average_moments(strategy(self.config.strategy), self.model)
        self.step_in_epoch = done
        kept, self.seconds = self.seconds, self._spent()
        measured = [keras.ops.convert_to_numpy(variable).tolist() for variable in self.model.metrics_variables]
        self._save(f"checkpoint-{self.epoch}-at-{done}", better=False, measured=measured)
        self.seconds, self.step_in_epoch = kept, 0

    def _save(self, name: str, *, better: bool, measured: list = ()) -> None:
        names = ("epoch", "step_in_epoch", "best_epoch", "best", "history", "seconds", "steps_done", "stopped")
        folder = self.config.folder / name
        older = sorted((path for path in self.config.folder.glob("checkpoint-*") if path != folder), key=_place)
        draft = self.config.folder / f"draft-{workers.index()}-{os.getpid()}"
        self._saved_at = time.monotonic()
        try:
            draft.mkdir(exist_ok=True)
            # By every worker: some variables all must read. Keras's own files take eight times as long to write.
            values = [keras.ops.convert_to_numpy(variable) for variable in self._variables()]
            if not workers.chief():
                shutil.rmtree(draft)
                return
            # NumPy's files know no bfloat16; a float32 holds each of its values.
            np.savez(draft / "last.npz", *(one.astype(np.float32) if one.dtype.kind == "V" else one for one in values))
            if better:
                shutil.copy(draft / "last.npz", draft / "best.npz")
            elif older and (older[-1] / "best.npz").exists():
                shutil.copy(older[-1] / "best.npz", draft / "best.npz")
            state = {name: getattr(self, name) for name in names}
            state["measured"] = list(measured)
            (draft / "state.json").write_text(json.dumps(state))
            draft.rename(folder)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise OSError(
                f"cannot save to {folder}: {error}; make room, then go on with --resume --name={self.config.name}"
            ) from error
        for path in older[:-1]:
            with contextlib.suppress(OSError):
                shutil.rmtree(path)


def _place(folder: Path) -> tuple[int, int]:
    """Epochs and steps that a checkpoint stands for."""
    epoch, _, step = folder.name.removeprefix("checkpoint-").partition("-at-")
    return int(epoch), int(step or 0)


def best_score(folder: Path) -> float:
    """Of the run in a folder: its best epoch's validation accuracy or, where it has none, validation loss times -1."""
    newest = max(folder.glob("checkpoint-*"), key=_place)
    return json.loads((newest / "state.json").read_text())["best"][0]


def _most_seconds(config: Config) -> float:
    """That training may take, by its time and by its price."""
    limits = [3600 * config.max_hours] if config.max_hours else []
    if config.max_cost:
        limits.append(3600 * config.max_cost / config.price_per_hour)
    return min(limits, default=math.inf)


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
