"""What every task lets you change, and the order in which every task runs.

A task is a module below `apps` with the names in `CONTRACT`; `run` is the one place where their order stands.
TensorFlow is imported inside `run`, so that `--help` and a mistyped flag are answered at once.
"""

import dataclasses
import json
import time
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

CONTRACT = ("Config", "load", "build", "train", "measure", "Endpoint", "SMOKE", "EXPECT", "baseline")


@dataclasses.dataclass(frozen=True)
class Config:
    """What can be changed in every task; a task's own Config adds its fields."""

    data: str = ""  # name of a public data set, or a path; empty: the set that comes with the suite
    epochs: int = 10  # passes over the training examples
    batch: int = 128  # examples in a step, over all devices together
    patience: int = 10  # epochs without a better validation result before training stops
    seed: int = 1  # of everything random
    deterministic: bool = False  # make two runs equal to the bit, at some cost in speed
    # Of the network's arithmetic; auto: mixed_bfloat16 where the processor multiplies it in hardware, else float32.
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    strategy: Literal["auto", "one", "mirrored"] = "auto"  # devices: auto is every GPU, or the one CPU
    on_error: Literal["fail", "skip"] = "fail"  # what an unreadable example does to the run
    name: str = ""  # of the run, its folder below `runs`; empty: the task's name and the time
    resume: bool = False  # go on with the run of that name, or with the task's newest
    runs: str = "runs"  # folder for logs, checkpoints and pictures of runs
    saved_models: str = "saved_models"  # folder for exported versions, in TensorFlow Serving's layout

    @property
    def folder(self) -> Path:
        """Where this run writes while it learns."""
        return Path(self.runs) / self.name


def run(task_name: str, task: ModuleType, config: Config) -> dict[str, Any]:
    """Take one task from raw data to a served answer; return what `metrics.json` holds."""
    from shared import export, serving, training

    config = training.begin(task_name, config)  # run folder, seed, precision
    splits = task.load(config)
    with training.strategy(config.strategy).scope():
        model = task.build(config, splits)
    cost = task.train(config, model, splits)
    test = task.measure(config, model, splits)
    baseline = task.baseline(config, splits)
    say("test", splits.about["protocol"])
    for metric, value in test.items():
        beside = f"baseline {baseline[metric]}" if metric in baseline else ""
        say("", f"{metric:<16} {value!s:<24} {beside}")

    endpoint = task.Endpoint(config, model, splits)
    report = {
        "task": task_name,
        "data": splits.about["data"],
        "protocol": splits.about["protocol"],
        "published": {key.removeprefix("published "): text for key, text in splits.about.items() if "published" in key},
        "headline": next(iter(test)),
        "names": list(splits.names),
        "test": {metric: dataclasses.asdict(value) for metric, value in test.items()},
        "baseline": {metric: dataclasses.asdict(value) for metric, value in baseline.items()},
        "cost": {**cost, "peak_bytes": training.peak_bytes()},
    }
    settled = dataclasses.replace(config, **splits.settled)
    candidate = export.write(endpoint, settled, task_name, splits.request)
    report["served"] = serving.check(candidate, endpoint, task_name, splits.request)
    version = export.publish(candidate, model=model, task=task, report=report, about=splits.about)
    (config.folder / "metrics.json").write_text(json.dumps(report, indent=1))
    say("cost", training.describe(report["cost"]))
    say("served", f"{report['served']['answers']} answers over gRPC equal the model in memory, "
                  f"largest difference {report['served']['largest_difference']:.1e}, "
                  f"{report['served']['milliseconds']:.1f} ms a request")  # fmt: skip
    say("saved", f"{version}")
    return report


def evaluate(task_name: str, task: ModuleType, flags: Any) -> dict[str, Any]:
    """Measure a saved version on other data: its test part where it names one, else all of it; return the metrics.

    Raises:
        FileNotFoundError: there is no such version.
        ValueError: the data have other classes than the model.
    """
    import keras

    from shared import export, training

    base = Path(flags.saved_models) / task_name
    versions = export.versions(base)
    version = flags.version or max(versions, default=0)
    if version not in versions:
        raise FileNotFoundError(f"there is no version {version or ''} below {base}; train one first")
    extra = versions[version] / "assets.extra"
    saved = json.loads((extra / "config.json").read_text())["config"]
    changes = {"data": flags.data, "on_error": flags.on_error, "runs": flags.runs, "name": "", "resume": False,
               "batch": 1}  # fmt: skip
    config = training.begin(f"{task_name}-evaluate", task.Config(**{**saved, **changes}))
    splits = task.load(config)
    names = json.loads((extra / "metrics.json").read_text())["names"]
    if list(splits.names) != names:
        raise ValueError(f"the data's classes {list(splits.names)} are not the model's {names}")
    protocol = splits.about["protocol"]
    if splits.drawn:
        whole = splits.train.concatenate(splits.validation).concatenate(splits.test)
        splits, protocol = dataclasses.replace(splits, test=whole), "all of it"
    test = task.measure(config, keras.saving.load_model(extra / "model.keras"), splits)
    say("test", f"version {version} on {splits.about['data']}: {protocol}")
    for metric, value in test.items():
        say("", f"{metric:<18} {value}")
    return {metric: dataclasses.asdict(value) for metric, value in test.items()}


def say(label: str, text: str) -> None:
    """Print one line of a run's report."""
    print(f"{label:<10} {text}", flush=True)


def seconds_since_start() -> float:
    """How long ago this process began: a user waits from then on."""
    import psutil

    return time.time() - psutil.Process().create_time()
