"""What every task lets you change, and the order in which every task runs.

A task is a module below `apps` with the names in `CONTRACT`; `run` is the one place where their order stands. A task
may also have `folds(config) -> Folds | None`: where there are any, what they have in common is the result;
`explain(model, text)`, which `cornucopia explain` shows; and `load_other(config, names) -> data.Splits`, other data to
measure a saved model on, where `load` would take the classes `names` from the data.
TensorFlow is imported inside `run`, so that `--help` and a mistyped flag are answered at once.
"""

import dataclasses
import hashlib
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

SUMMED = ("train_seconds", "device_seconds", "examples", "kilowatt_hours", "price")  # over the folds
CONTRACT = ("Config", "load", "build", "train", "measure", "Endpoint", "SMOKE", "EXPECT", "baseline")


@dataclasses.dataclass(frozen=True)
class Range:
    """Marks a field of a Config for `cornucopia tune`: `rate: Annotated[float, run.Range(1e-4, 1e-2, log=True)]`."""

    low: float
    high: float  # can be drawn, as `low` can
    log: bool = False  # draw its logarithm evenly, not itself
    step: int | None = None  # between values of an int; None: 1


@dataclasses.dataclass(frozen=True)
class Choices:
    """Marks a field of a Config for `cornucopia tune`, to try these values."""

    values: tuple


def marks(config: type) -> dict[str, Range | Choices]:
    """The fields of a Config that are marked for tuning."""
    return {field.name: mark for field in dataclasses.fields(config)
            for mark in getattr(field.type, "__metadata__", ()) if isinstance(mark, Range | Choices)}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """What can be changed in every task; a task's own Config adds its fields."""

    # Whole numbers that may be 0, as those may that are by default; all others are 1 or more.
    ZERO: ClassVar[tuple[str, ...]] = ("patience", "seed", "threads")
    # Fields that say which part of the data is learned from; they mean nothing of other data that a version meets.
    PART: ClassVar[tuple[str, ...]] = ()

    data: str = ""  # name of a public data set, or a path; empty: the set that comes with the suite
    epochs: int = 10  # passes over the training examples
    batch: int = 128  # examples in a step, over all devices together
    patience: int = 10  # epochs without a better validation result before training stops
    seed: int = 1  # of everything random
    deterministic: bool = False  # make two runs equal to the bit, at some cost in speed
    # Of the network's arithmetic; auto: mixed_bfloat16 where the processor multiplies it in hardware, else float32.
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    # Devices: auto is every GPU, or the one CPU, and many workers where TF_CONFIG or Slurm names them.
    strategy: Literal["auto", "one", "mirrored", "multiworker"] = "auto"
    threads: int = 0  # processors that one operation may take; 0: all
    data_service: str = ""  # grpc://HOST:PORT of a cornucopia data-service that makes the training batches; empty: here
    clip: float = 0.0  # longest gradient, of all weights together; longer ones are shortened to it; 0: any
    checkpoint_every: int = 0  # steps between checkpoints within an epoch; 0: a minute's worth
    max_hours: float = 0.0  # of training, of each fold's; then the best epoch so far is the result; 0: any
    max_cost: float = 0.0  # of training, of each fold's, in the currency of --price-per-hour; 0: any
    price_per_hour: float = 0.0  # of this machine, or of all workers together
    watts: float = 150.0  # that the machine is assumed to draw, for the estimate of energy
    on_error: Literal["fail", "skip"] = "fail"  # what an unreadable example does to the run
    name: str = ""  # of the run, its folder below `runs`; empty: the task's name and the time
    resume: bool = False  # go on with the run of that name, or with the task's newest
    runs: str = "runs"  # folder for logs, checkpoints and pictures of runs
    saved_models: str = "saved_models"  # folder for exported versions, in TensorFlow Serving's layout

    def __post_init__(self):
        """ValueError: a number that no training can use."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = int(type(field.default) is int and field.default > 0 and field.name not in self.ZERO)
            if isinstance(value, int | float) and not value >= least:  # nor is NaN
                flag = field.name.replace("_", "-")
                raise ValueError(f"--{flag}={value}: expected {least} or more; the default is {field.default}")

    @property
    def folder(self) -> Path:
        """Where this run writes while it learns."""
        return Path(self.runs) / self.name


def run(task_name: str, task: ModuleType, config: Config) -> dict[str, Any]:
    """Take one task from raw data to a served answer; return what `metrics.json` holds."""
    from shared import export, training
    from shared.serving import checking

    config = training.begin(task_name, config)  # run folder, seed, precision
    read = checksum(config)
    learned = _learn(task, config)
    folds = task.folds(config) if hasattr(task, "folds") else None
    if folds:
        learned = cross_validate(task, config, folds, learned)
    model, splits, about = learned.model, learned.splits, learned.about
    if not training.workers.chief():
        training.workers.meet(training.strategy(config.strategy))  # the chief exports
        return {}
    endpoint = task.Endpoint(config, model, splits)
    report = {
        "task": task_name,
        "data": about["data"],
        "checksum": read,
        "protocol": about["protocol"],
        "published": {key.removeprefix("published "): text for key, text in about.items() if "published" in key},
        "model": f"{model.name}, {model.count_params():,} parameters",
        "headline": next(iter(learned.test)),
        "names": list(splits.names),
        "test": {metric: dataclasses.asdict(value) for metric, value in learned.test.items()},
        "baseline": {metric: dataclasses.asdict(value) for metric, value in learned.baseline.items()},
        "folds": learned.folds,
        "served_model": {metric: dataclasses.asdict(value) for metric, value in learned.own.items()},
        "cost": {**learned.cost, "peak_bytes": training.peak_bytes()},
    }
    settled = dataclasses.replace(config, **splits.settled)
    candidate = export.write(endpoint, settled, task_name, splits.request)
    with export.removed_on_failure(candidate):
        report["served"] = checking.check(candidate, endpoint, task_name, splits.request)
    about = {**splits.about, "checksum": read}
    version = export.publish(candidate, model=model, task=task, report=report, about=about)
    (config.folder / "metrics.json").write_text(json.dumps(report, indent=1))
    training.workers.meet(training.strategy(config.strategy))
    say("cost", training.describe(report["cost"]))
    say("served", f"{report['served']['answers']} answers over gRPC equal the model in memory, "
                  f"largest difference {report['served']['largest_difference']:.1e}, "
                  f"{report['served']['milliseconds']:.1f} ms a request")  # fmt: skip
    _warn(report)
    say("saved", f"{version}")
    return report


@dataclasses.dataclass(frozen=True)
class Folds:
    """Runs of a task, each with a network of its own, of which the result is made."""

    configs: Mapping[str, Config]  # by the fold's name
    protocol: str  # what is made of them, and how they differ
    statistic: Callable[[Any], float] = statistics.fmean  # of what the folds measured, [fold]


@dataclasses.dataclass(frozen=True)
class Learned:
    """A trained model and what was measured of it; of several, the one that is served, and what they have in common."""

    model: Any
    splits: Any
    about: Mapping[str, str]
    cost: dict[str, float]
    test: dict[str, Any]
    baseline: dict[str, Any]
    folds: dict[str, Any] = dataclasses.field(default_factory=dict)
    first: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the served model, where `test` is of several

    @property
    def own(self) -> dict[str, Any]:
        """What was measured of the served model itself."""
        return self.first or self.test


def _learn(task: ModuleType, config: Config) -> Learned:
    from shared import training

    model, splits, cost = train(task, config)
    # Of many workers each measures, for its devices answer together; what needs no network is the chief's.
    test = task.measure(config, model, splits)
    learned = Learned(
        model, splits, splits.about, cost, test, task.baseline(config, splits) if training.workers.chief() else test
    )
    _compare(learned)
    return learned


def train(task: ModuleType, config: Config) -> tuple[Any, Any, dict[str, float]]:
    """A trained model, the data, and what it cost; the test part was not looked at."""
    from shared import training

    with training.beginning(config):
        splits = task.load(config)
        with training.strategy(config.strategy).scope():
            model = task.build(config, splits)
    return model, splits, task.train(config, model, splits)


def _compare(learned: Learned) -> None:
    say("test", learned.about["protocol"])
    for metric, value in learned.test.items():
        beside = f"baseline {learned.baseline[metric]}" if metric in learned.baseline else ""
        say("", f"{metric:<16} {value!s:<24} {beside}")


def _warn(report: Mapping[str, Any]) -> None:
    """Say where the version is worse than its baseline; a server that watches its folder takes it all the same."""
    from shared import metrics

    headline = report["headline"]
    if headline in report["baseline"]:
        ours, theirs = (report[part][headline]["value"] for part in ("test", "baseline"))
        if metrics.worse(headline, ours, than=theirs):
            say("warning", f"{headline} {ours:.4f} is worse than the baseline's {theirs:.4f}")


def cross_validate(task: ModuleType, config: Config, folds: Folds, first: Learned) -> Learned:
    """Run a task's folds below the run's folder; one that is the run itself is not run again.

    Returns:
        The first run's model, with the statistic of what the folds measured, each with the interval in which it
        would fall on other folds of the same kind, and with what they cost together.
    """
    import keras
    import numpy as np

    from shared import metrics

    found = {}
    for name, fold in folds.configs.items():
        if fold == config:
            found[name] = first
            continue
        say("fold", name)
        fold = dataclasses.replace(fold, name=f"{config.name}/{name}")
        fold.folder.mkdir(exist_ok=True)
        keras.utils.set_random_seed(fold.seed)
        found[name] = dataclasses.replace(_learn(task, fold), model=None, splits=None)  # ten data sets are many

    def over(part):
        return {metric: metrics.measured(folds.statistic, np.array([getattr(one, part)[metric].value
                                                                    for one in found.values()]))
                for metric in getattr(first, part)}  # fmt: skip

    runs = list(found.values()) if first in found.values() else [first, *found.values()]
    summed = {key: sum(one.cost[key] for one in runs) for key in first.cost if key in SUMMED}
    learned = dataclasses.replace(
        first,
        about={**first.about, "protocol": folds.protocol},
        cost={**first.cost, **summed},
        test=over("test"),
        first=first.test,
        baseline=over("baseline"),
        folds={
            name: {
                "test": {metric: value.value for metric, value in one.test.items()},
                "baseline": {metric: value.value for metric, value in one.baseline.items()},
                "cost": one.cost,
            }
            for name, one in found.items()
        },
    )
    _compare(learned)
    return learned


def evaluate(task_name: str, task: ModuleType, flags: Any) -> dict[str, Any]:
    """Measure a saved version on other data, of two of its classes or more: on their test part where they name one,
    else on all; or anew on the test part of the data that it learned from. Return the metrics.

    Raises:
        FileNotFoundError: there is no such version.
        ValueError: the data have classes that the model does not know.
    """
    import keras

    from shared import training

    version, extra = _saved(task_name, flags)
    saved = json.loads((extra / "config.json").read_text())["config"]
    given, taught = saved["data"] if flags.data is None else flags.data, saved["data"]
    paths = [Path(data) for data in (given, taught) if data and Path(data).exists()]
    own = given == taught or (len(paths) == 2 and paths[0].samefile(paths[1]))
    changes = {"data": given, "on_error": saved["on_error"] if own else flags.on_error, "runs": flags.runs,
               "saved_models": flags.saved_models, "batch": 1}  # fmt: skip
    other = training.FREE if own else (*training.FREE, *task.Config.PART)  # how and where it was learned
    learned = {key: value for key, value in saved.items() if key not in other}
    config = training.begin(f"{task_name}-evaluate", task.Config(**{**learned, **changes}))
    report = json.loads((extra / "metrics.json").read_text())
    names = report["names"]
    with training.beginning(config):
        splits = task.load_other(config, names) if hasattr(task, "load_other") and not own else task.load(config)
        if list(splits.names) != names:
            raise ValueError(f"the data's classes {some(splits.names)} are not the model's {some(names)}")
    protocol = splits.about["protocol"]
    if own and not report["folds"]:
        read = report.get("checksum", "")  # which versions of earlier days have not
        if protocol != report["protocol"] or (read and read != checksum(config)):
            told = "the data changed, so the model may have learned some of its test part"
            say("warning", f"{told}: {report['protocol']}")
    with warnings.catch_warnings():  # KerasHub's models want an optimizer even where they are parts of another model
        warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
        model = keras.saving.load_model(extra / "model.keras", compile=False)
    test = task.measure(config, model, splits)
    say("test", f"version {version} on {splits.about['data']}: {protocol}")
    for metric, value in test.items():
        say("", f"{metric:<18} {value}")
    return {metric: dataclasses.asdict(value) for metric, value in test.items()}


def checksum(config: Config) -> str:
    """SHA-256 of the file, or of the names and contents of a folder's files, that `data` names; empty where it names a
    set. Of a table of pictures it is the table's.
    """
    from shared.data import archives

    path = Path(config.data)
    if not config.data or not path.exists():
        return ""
    whole = hashlib.sha256()
    for name in archives.names(path) if path.is_dir() else [""]:
        with (path / name).open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        whole.update(f"{name}\0{content}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()


def _saved(task_name: str, flags: Any) -> tuple[int, Path]:
    """Number of the version that the flags name, and the folder with what it keeps beside the graph."""
    from shared import export

    base = Path(flags.saved_models) / task_name
    versions = export.versions(base)
    version = flags.version or max(versions, default=0)
    if version not in versions:
        raise FileNotFoundError(f"there is no version {version or ''} below {base}; train one first")
    return version, versions[version] / "assets.extra"


def explain(task_name: str, task: ModuleType, flags: Any) -> None:
    """Print a saved model's answer to a text, and, to a terminal, the text in colours: green speaks for the answer, red
    against it.
    """
    import keras
    from rich.console import Console

    console = Console()
    coloured = console.is_terminal and not console.no_color  # to a terminal, or as FORCE_COLOR says
    _, extra = _saved(task_name, flags)
    names = json.loads((extra / "metrics.json").read_text())["names"]
    label, gain, parts = task.explain(keras.saving.load_model(extra / "model.keras"), flags.text)
    most = max(abs(value) for _, value in parts) or 1.0
    say("label", names[label])
    say("gain", f"{gain:+.4f} of its score comes from the text; its words' parts sum to "
                f"{sum(value for _, value in parts):+.4f}")  # fmt: skip

    def shade(word, value):
        if not coloured:
            return word
        strength = 255 - round(200 * abs(value) / most)
        red, green = (strength, 255) if value > 0 else (255, strength)
        return f"\033[48;2;{red};{green};{strength}m\033[30m{word}\033[0m"

    say("text", " ".join(shade(word, value) for word, value in parts))
    for word, value in sorted(parts, key=lambda part: -abs(part[1]))[:10]:
        say("", f"{value:+.4f}  {word}")


def some(names: Any, most: int = 10) -> str:
    """The first of many names, and how many more there are."""
    return f"{list(names[:most])}{f' and {len(names) - most} more' if len(names) > most else ''}"


def say(label: str, text: str) -> None:
    """Print one line of a run's report."""
    print(f"{label:<10} {text}", flush=True)


def seconds_since_start() -> float:
    """How long ago this process began: a user waits from then on."""
    import psutil

    return time.time() - psutil.Process().create_time()
