"""Races of the tasks against other libraries: the same data, split and threads; quality and time side by side.

python -m benchmarks.races [TASK ...] [--runs 1 2 3] [--sides ours ...]

The sides of a race take turns, each run in a process of its own. What they reach goes to benchmarks/races.json after
every run, and from there by `python -m benchmarks.report` into CONTRIBUTING.md. With --runs or --sides only these are
run, and what the others reached before stays. scikit-learn is the suite's own; other peers live in an environment of
their own (`.venv-peers`, made where it is missing).

The clock runs from reading the data to a trained model, with features, compilation and our validation after each
epoch; without the import of libraries, the test, and what a peer's settings are searched with. Of scikit-learn, it
runs from the first feature to the last answer.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from benchmarks.peers import clock
from shared import command

RESULTS = Path(__file__).with_suffix(".json")
PEERS = Path(".venv-peers")
PACKAGES = ("gymnasium[box2d,classic-control]", "implicit", "stable-baselines3", "torch")
THREADS = os.cpu_count()


@dataclasses.dataclass(frozen=True)
class Race:
    """One task on one set of data. A side takes the race and our flags, and returns `quality`, `seconds` and more."""

    task: str
    data: str
    metric: str
    sides: dict[str, Callable[["Race", dict], dict]]
    runs: dict[str, dict]  # by name, what of our flags is another each time
    flags: dict = dataclasses.field(default_factory=dict)  # other than the default command's

    @property
    def name(self) -> str:
        return f"{self.task}.{self.data or 'embedded'}"


def ours(race: Race, flags: dict) -> dict:
    return _apart(_ours, race.task, race.metric, flags)


def other(**changes) -> Callable[[Race, dict], dict]:
    """Our side with some other flags."""
    return lambda race, flags: ours(race, {**flags, **changes})


def _ours(task: str, metric: str, flags: dict) -> dict:
    import keras
    import tensorflow as tf

    from shared import run

    with _begun(task, flags) as (module, config):
        begun = clock()
        model, splits, cost = run.train(module, config)
        seconds, processor = (clock() - begun).tolist()
        test = module.measure(config, model, splits)
    return {
        "quality": test[metric].value,
        "seconds": seconds,
        "processor": processor,
        "speed": cost["examples_per_second"] * getattr(config, "context", 1),  # of a text, tokens count
        "settings": f"{keras.config.dtype_policy().name}, {cost['epochs']:.0f} epochs",
        "version": f"TensorFlow {tf.__version__}, Keras {keras.__version__}",
    }


def scikit_learn(race: Race, flags: dict) -> dict:
    """The task's own baseline, which is the usual recipe of that library."""
    return _apart(_scikit_learn, race.task, race.metric, flags)


def _scikit_learn(task: str, metric: str, flags: dict) -> dict:
    import sklearn

    from shared.metrics import Measured, classification

    def once(statistic, *examples):
        """Without the bootstrap of its interval, which would take longer than the peer itself."""
        value = float(statistic(*examples))
        return Measured(value, value, value)

    def of_share(those):
        return once(lambda hits: hits.mean(), those)

    plain = mock.patch.multiple(classification, measured=once, share=of_share)
    with _begun(task, flags) as (module, config), plain:
        splits = module.load(config)
        begun = clock()
        found = module.baseline(config, splits)
        seconds, processor = (clock() - begun).tolist()
    return {"quality": found[metric].value, "seconds": seconds, "processor": processor, "version": sklearn.__version__}


def peer(name: str, **settings) -> Callable[[Race, dict], dict]:
    """A side that is a function of benchmarks/peers.py, given the data as arrays and these settings beside ours."""

    def side(race: Race, flags: dict) -> dict:
        python = _environment()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "data.npz"
            known = _apart(_hand_over, race.task, flags, path)
            words = [python, "-W", "ignore", Path(__file__).with_name("peers.py"), name, path,
                     json.dumps({**known, "threads": THREADS, **settings})]  # fmt: skip
            said = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
        return json.loads(said.splitlines()[-1])

    return side


def _hand_over(task: str, flags: dict, path: Path) -> dict:
    """Write what a peer learns from as arrays; return the settings of ours that it may need."""
    import keras
    import numpy as np

    with _begun(task, flags) as (module, config):
        splits = module.load(config)
        np.savez(path, **{"vision.classify": _pictures, "recommendation.retrieve": _histories,
                          "generative.write": _text, "rl.ppo": _nothing}[task](module, config, splits))  # fmt: skip
        settled = dataclasses.replace(config, **splits.settled, precision=keras.config.dtype_policy().name)
        weights = sum(math.prod(weight.shape) for weight in module.build(config, splits).trainable_weights)
    more = {"steps_an_epoch": splits.steps, "classes": len(splits.names), "weights": weights}
    return {**dataclasses.asdict(settled), **more}


def _pictures(module, config, splits) -> dict:
    import numpy as np

    found = {}
    for part, batches in (("train", splits.train), ("test", splits.test)):
        pictures, targets = zip(*batches.as_numpy_iterator(), strict=True)
        found |= {part: np.concatenate(pictures), f"{part}_labels": np.concatenate(targets).argmax(-1)}
    return found


def _histories(module, config, splits) -> dict:
    questions = {part: module._questions(getattr(splits, part)) for part in ("validation", "test")}
    return {f"{what}_{part}": pair[at] for part, pair in questions.items() for at, what in enumerate(("had", "took"))}


def _text(module, config, splits) -> dict:
    import numpy as np

    return {"text": np.frombuffer(module._read(config)[0].encode("utf-32-le"), np.uint32)}


def _nothing(module, config, splits) -> dict:
    return {}


SEEDS = {str(seed): {"seed": seed} for seed in (1, 2, 3)}
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
NANOGPT = {"layers": 4, "heads": 4, "width": 128, "context": 64, "batch": 12, "history": 1, "epochs": 1,
           "optimizer": "adamw", "rate": 0.003}  # fmt: skip
RACES = (
    Race(
        "nlp.classify", "trec", "accuracy",
        {"scikit-learn, TF-IDF and linear SVM": scikit_learn, "ours": ours}, SEEDS,
    ),
    Race(
        "speech.spot", "fsdd", "accuracy", {"scikit-learn, MFCC and SVM": scikit_learn, "ours": ours},
        {speaker: {"speaker": speaker} for speaker in SPEAKERS},
    ),
    Race(
        "recommendation.retrieve", "ml-100k", "ndcg@10",
        {"implicit, ALS": peer("implicit", kind="als"), "implicit, BPR": peer("implicit", kind="bpr"), "ours": ours},
        SEEDS,
    ),
    Race(
        "vision.classify", "", "accuracy",
        {"PyTorch, eager": peer("pytorch", compiled=False), "PyTorch, compiled": peer("pytorch", compiled=True),
         "PyTorch, eager, float32": peer("pytorch", compiled=False, precision="float32"),
         "PyTorch, compiled, float32": peer("pytorch", compiled=True, precision="float32"),
         "ours": ours},
        SEEDS, {"epochs": 4},
    ),
    Race(
        "generative.write", "tinyshakespeare", "loss",
        {"PyTorch, eager": peer("nanogpt", compiled=False, iterations=2000),
         "PyTorch, compiled": peer("nanogpt", compiled=True, iterations=2000),
         "ours, as wide and as deep, float32": other(**NANOGPT, precision="float32"),
         "ours, as wide and as deep": other(**NANOGPT),
         "ours": ours},
        SEEDS,
    ),
    Race("rl.ppo", "", "return", {"Stable-Baselines3": peer("ppo"), "ours": ours}, SEEDS, {"steps": 100_000}),
    Race("rl.ppo", "LunarLander-v3", "return", {"Stable-Baselines3": peer("ppo"), "ours": ours}, SEEDS,
         {"steps": 200_000}),
)  # fmt: skip


@contextlib.contextmanager
def _begun(task: str, flags: dict):
    """A task's module and a config of it, in a run's folder that is removed afterwards."""
    from shared import training

    module = importlib.import_module(f"apps.{task}")
    with tempfile.TemporaryDirectory() as folder:
        yield module, training.begin(task, module.Config(**flags, runs=folder, saved_models=folder))


def _apart(function, *arguments) -> dict:
    """Call a function in a new process: what one run leaves in the libraries does not touch the next."""
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(function, *arguments).result()


def _environment() -> Path:
    """The peers' Python, with their packages."""
    python = PEERS / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", PEERS], check=True)
    wanted = f"import importlib.metadata as m; [m.version(name.split('[')[0]) for name in {PACKAGES}]"
    if subprocess.run([python, "-c", wanted], stderr=subprocess.DEVNULL, check=False).returncode:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def machine() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def run(race: Race, before: dict, runs: list[str], sides: list[str]):
    """Run some runs of some sides in turn; after each, yield the race's record with what was there before."""
    found = {side: dict(before.get("sides", {}).get(side, {})) for side in race.sides}
    for name, changes in race.runs.items():
        for side, compete in race.sides.items():
            if name in runs and side in sides:
                found[side][name] = compete(race, {"data": race.data, **race.flags, **changes})
                print(f"{race.name}, {name}: {side} {found[side][name]}", flush=True)
                yield {
                    "task": race.task,
                    "data": race.data,
                    "metric": race.metric,
                    "flags": race.flags,
                    "threads": THREADS,
                    "machine": machine(),
                    # PyTorch's threads wait for one another awake, which costs much where other work runs beside.
                    "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
                    "sides": {side: results for side, results in found.items() if results},
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = sorted({race.task for race in RACES})
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(tasks)}; else all")
    parser.add_argument("--runs", nargs="+", help="seeds, of speech.spot speakers; else all")
    parser.add_argument("--sides", nargs="+", help="as the table names them; else all")
    flags = parser.parse_args()
    command.onednn()  # as `cornucopia train` does
    if unknown := set(flags.tasks) - set(tasks):
        parser.error(f"no race of {', '.join(sorted(unknown))}; there are {', '.join(tasks)}")
    for race in RACES:
        if race.task not in (flags.tasks or tasks):
            continue
        before = {} if not (flags.runs or flags.sides) else _results().get(race.name, {})
        for record in run(race, before, flags.runs or list(race.runs), flags.sides or list(race.sides)):
            RESULTS.write_text(json.dumps({**_results(), race.name: record}, indent=1) + "\n")


def _results() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


if __name__ == "__main__":
    main()
