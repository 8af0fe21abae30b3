"""Run every task's default command on the data that its EXPECT names, and compare what it reaches.

python -m benchmarks.quality [TASK]    writes benchmarks/results/TASK.DATA.json, from which the README's table is made
"""

import ast
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from shared import command
from shared.metrics import LOWER_IS_BETTER

RESULTS = Path(__file__).parent / "results"
BEST = {("rl.ppo", "CartPole-v1"): 500.0}  # what cannot be beaten, only equalled


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
        worse = value > bar if metric in LOWER_IS_BETTER else value < bar
        if worse:
            found.append(f"{metric} {value:.4f}, expected {bar}")
        baseline = report["baseline"].get(metric, {}).get("value")
        if value == baseline == BEST.get((report["task"], report["data"])):
            continue
        if baseline is not None and (value >= baseline if metric in LOWER_IS_BETTER else value <= baseline):
            found.append(f"{metric} {value:.4f} does not beat the baseline's {baseline:.4f}")
    return found


def main(only: list[str]) -> int:
    RESULTS.mkdir(exist_ok=True)
    failed = 0
    for task in only or command.tasks():
        for data, bars in expected(task).items():
            folder = Path(tempfile.mkdtemp(prefix="cornucopia-quality-"))
            words = ["train", task, f"--data={data}", f"--runs={folder}/runs", f"--saved-models={folder}/saved"]
            print(f"\n$ cornucopia train {task} --data={data}", flush=True)
            done = subprocess.run([Path(sys.executable).with_name("cornucopia"), *words], check=False)
            if done.returncode:
                print(f"{task} on {data or 'embedded data'}: exit code {done.returncode}")
                failed += 1
                continue
            (metrics,) = folder.glob(f"saved/{task}/1/assets.extra/metrics.json")
            report = json.loads(metrics.read_text())
            del report["names"]  # there may be thousands, and not all may be given away
            (RESULTS / f"{task}.{data or 'embedded'}.json").write_text(json.dumps(report, indent=1))
            short = shortfalls(report, bars)
            failed += bool(short)
            print(f"{task} on {data or 'embedded data'}: {'; '.join(short) or 'as expected'}")
            shutil.rmtree(folder)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
