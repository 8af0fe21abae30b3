"""`cornucopia tune`: trials of a task with other values of the fields that its Config marks with a range.

Keras Tuner's oracles say what to try next. A trial is a run of the task as `cornucopia train` would make it, but for
measuring and exporting: what the search sees is validation, never the test part.
"""

import dataclasses
import json
import os
import threading
from collections.abc import Iterable, Mapping
from types import ModuleType

import keras
import keras_tuner
from keras_tuner.engine import base_tuner, trial
from keras_tuner.src import config as keras_tuner_config

from shared import launch, run, training
from shared.run import say

ORACLES = {
    "bayesian": keras_tuner.oracles.BayesianOptimizationOracle,
    "hyperband": keras_tuner.oracles.HyperbandOracle,
    "random": keras_tuner.oracles.RandomSearchOracle,
}


def tune(
    task_name: str,
    task: ModuleType,
    config: run.Config,
    *,
    fields: Mapping[str, run.Range | run.Choices],
    method: str,
    trials: int,
    workers: int,
    words: list[str],
) -> int:
    """Search in `RUNS/tune-NAME`, print the table of trials and write the best as `best.flags`; return the exit code.

    With many workers this process is Keras Tuner's chief, and each worker runs this command with the same words, told
    by Keras Tuner's environment variables which it is.

    Raises:
        FileNotFoundError: there is no search to go on with.
        ValueError: the search to go on with was another; or no trial came to a score.
    """
    keras_tuner_config.DEBUG = False  # a trial's traceback goes to its error.txt, not to the terminal
    config = dataclasses.replace(config, name=f"tune-{config.name}" if config.name else "")
    if "KERASTUNER_TUNER_ID" in os.environ:
        Tuner(task_name, task, config, oracle=oracle(method, fields, config=config, trials=trials)).search()
        return 0
    config = training.begin(f"tune-{task_name}", config)
    _remember(config, {"method": method, "fields": sorted(fields)})
    say("search", f"{trials} trials, {method}, over {', '.join(fields)}")
    name = config.name.removeprefix("tune-")
    again = f"cornucopia tune {task_name} --resume --name={name}, with the same flags"
    deciding = oracle(method, fields, config=config, trials=trials)
    if workers > 1:
        code = _share_out(task_name, task, config, oracle=deciding, workers=workers, words=[*words, f"--name={name}"])
        if code:
            say("stopped", f"go on with {again}")
            return code
    else:
        tuner = Tuner(task_name, task, config, oracle=deciding)
        tuner.take_up()
        try:
            tuner.search()
        except (KeyboardInterrupt, SystemExit):
            say("stopped", f"the search goes on with {again}")
            raise
    _report(task_name, config, deciding.trials.values(), fields=fields)
    return 0


def _remember(config: run.Config, search: dict) -> None:
    """Keep what a search is made of; one that goes on must be made of the same."""
    record = config.folder / "search.json"
    before = json.loads(record.read_text()) if record.exists() else search
    changed = [f"{key} was {before[key]}, is {search[key]}" for key in search if before[key] != search[key]]
    if changed:
        raise ValueError(f"the search in {config.folder} was another ({'; '.join(changed)}): give the same flags")
    record.write_text(json.dumps(search))


def oracle(
    method: str, fields: Mapping[str, run.Range | run.Choices], *, config: run.Config, trials: int
) -> keras_tuner.Oracle:
    """What decides on the next trial, by score, the higher the better; its first is the config as it is."""
    defaults = {name: getattr(config, name) for name in fields}

    class DefaultsFirst(ORACLES[method]):
        def _random_values(self):  # with which all three kinds begin
            return super()._random_values() if self.trials else dict(defaults)

    special = {"max_epochs": config.epochs, "hyperband_iterations": 0} if method == "hyperband" else {}  # 0: endless
    decides = DefaultsFirst(
        objective=keras_tuner.Objective("score", "max"),
        hyperparameters=space(fields, defaults),
        seed=config.seed + 1,  # 0 is any to Keras Tuner
        max_consecutive_failed_trials=None,  # one over the limit would leave the oracle locked for the other workers
        **special,
    )
    decides.max_trials = trials  # Hyperband takes it in no other way
    decides.verbose = 0
    return decides


def space(fields: Mapping[str, run.Range | run.Choices], defaults: Mapping) -> keras_tuner.HyperParameters:
    """The marked fields as Keras Tuner's hyperparameters."""
    parameters = keras_tuner.HyperParameters()
    for name, mark in fields.items():
        default = defaults[name]
        if isinstance(mark, run.Choices):
            parameters.Choice(name, list(mark.values), default=default)
            continue
        kind = parameters.Int if isinstance(default, int) else parameters.Float
        kind(name, mark.low, mark.high, mark.step, "log" if mark.log else "linear", default=default)
    return parameters


class Tuner(base_tuner.BaseTuner):
    """Runs trials; `trial_N` below the search's folder holds Keras Tuner's record of a trial and the run itself."""

    def __init__(self, task_name: str, task: ModuleType, config: run.Config, *, oracle: keras_tuner.Oracle):
        self.task_name, self.task, self.config = task_name, task, config
        super().__init__(oracle, directory=config.runs, project_name=config.name)

    def save(self):
        """Without the file of a tuner's own, by which Keras Tuner finds only searches of as many workers."""
        if isinstance(self.oracle, keras_tuner.Oracle):  # not that of a worker, which the chief has
            self.oracle.save()

    def take_up(self) -> None:
        """Go on with the search in the folder, if there is one; trials that had begun and not ended come first."""
        if (self.config.folder / "oracle.json").exists():
            self.oracle.reload()

    def run_trial(self, trial):
        keras.backend.clear_session()  # what the trial before left
        config = settled(self.config, trial)
        config = dataclasses.replace(config, resume=(config.folder / "config.json").exists())
        config = training.begin(self.task_name, config)
        run.train(self.task, config)
        return {"score": training.best_score(config.folder)}

    def on_trial_end(self, trial):
        if trial.message:
            note = settled(self.config, trial).folder / "error.txt"
            note.write_text(trial.message)
            say("failed", f"{trial.message.strip().splitlines()[-1]} ({note})")
        super().on_trial_end(trial)


def settled(config: run.Config, trial: trial.Trial) -> run.Config:
    """The config of a trial: its values, of floats four digits, which are easy to read and to type.

    Hyperband's longer trials begin anew, for a shorter one's learning rate has already fallen to its end.
    """
    found = dict(trial.hyperparameters.values)
    values = {"epochs": found.get("tuner/epochs", config.epochs)}
    for name, value in found.items():
        if not name.startswith("tuner/"):
            kind = type(getattr(config, name))
            values[name] = float(f"{value:.4g}") if kind is float else kind(value)
    return dataclasses.replace(config, **values, name=f"{config.name}/trial_{trial.trial_id}", resume=False)


def _share_out(
    task_name: str, task: ModuleType, config: run.Config, *, oracle: keras_tuner.Oracle, workers: int, words: list[str]
) -> int:
    """Answer workers, each a process of this command, which trial is next, until all have ended; return an exit code.

    The trials' outcomes are then in the oracle.
    """
    (port,) = launch.free_ports(1)
    chief = {"KERASTUNER_ORACLE_IP": "127.0.0.1", "KERASTUNER_ORACLE_PORT": str(port), "KERASTUNER_TUNER_ID": "chief"}
    os.environ.update(chief)
    tuner = Tuner(task_name, task, config, oracle=oracle)
    tuner.take_up()
    # In a thread, for the end of the last worker is noticed at once, but by Keras Tuner's server only after 20 s.
    threading.Thread(target=tuner.search, daemon=True).start()
    roles = [{**chief, "KERASTUNER_TUNER_ID": f"tuner{index}"} for index in range(workers)]
    title = f"{workers}, asking 127.0.0.1:{port}"
    try:
        return launch.together(["tune", task_name, *words], roles, folder=config.folder, title=title)
    finally:
        oracle.save()


def _report(
    task_name: str, config: run.Config, trials: Iterable[trial.Trial], *, fields: Mapping[str, run.Range | run.Choices]
) -> None:
    ranked = rank(trials)
    if ranked[0].status != "COMPLETED":
        raise ValueError(
            f"none of {len(ranked)} trials came to a score; why not is in {config.folder}/trial_*/error.txt"
        )
    say("score", "best epoch's validation accuracy or, where it has none, validation loss times -1")
    print("\n".join(table(config, ranked, fields=fields)))
    record = config.folder / "best.flags"
    record.write_text("".join(f"{flag}\n" for flag in flags(settled(config, ranked[0]))))
    say("best", f"cornucopia train {task_name} $(cat {record})")


def rank(trials: Iterable[trial.Trial]) -> list[trial.Trial]:
    """Best first, of equals the earlier, whose trial 0 has the defaults; those without a score last."""

    def place(one: trial.Trial) -> tuple[float, int]:
        return -one.score if one.status == "COMPLETED" else float("inf"), int(one.trial_id)

    return sorted(trials, key=place)


def table(config: run.Config, ranked: Iterable[trial.Trial], *, fields: Iterable[str]) -> list[str]:
    """Lines of a table of trials: number, score, epochs, values."""
    rows = [["trial", "score", "epochs", *fields, ""]]
    for one in ranked:
        score = f"{one.score:.4f}" if one.status == "COMPLETED" else one.status.lower()
        used = settled(config, one)
        values = [str(getattr(used, name)) for name in ("epochs", *fields)]
        rows.append([one.trial_id, score, *values, "" if int(one.trial_id) else "defaults"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def flags(config: run.Config) -> list[str]:
    """The flags by which a config differs from its class's defaults, but for the run's name."""
    found = []
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        if value != field.default and field.name not in ("name", "resume"):
            switch = f"--{flag}" if value else f"--no-{flag}"
            found.append(switch if isinstance(value, bool) else f"--{flag}={value}")
    return found
