"""Every domain's first task on embedded data, from raw data to a served answer, then one table: `make suite`.

Two tasks at a time, for one alone leaves a quarter of two cores idle: tracing, compiling and many baselines take a
single core. Each has a process of its own, forked from one that has imported TensorFlow, which takes a start some 5 s.
"""

import json
import multiprocessing
import os
import sys
import time
from multiprocessing import connection
from pathlib import Path

from benchmarks.report import cell
from shared import command

COLUMNS = ("task", "metric", "result (95 % interval)", "baseline", "a served answer", "ms a request", "seconds")
AT_ONCE = 2


def row(report: dict, seconds: float) -> tuple[str, ...]:
    metric, served = report["headline"], report["served"]
    beside = cell(report["baseline"].get(metric))
    return (report["task"], metric, cell(report["test"][metric]), beside, served["answer"],
            f"{served['milliseconds']:.1f}", f"{seconds:.0f}")  # fmt: skip


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Rows of text in columns that are as wide as their widest."""
    widths = [max(len(text) for text in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(one, widths, strict=True)).rstrip()
                     for one in rows)  # fmt: skip


class Named:
    """A stream whose lines begin with a name, each written at once, so that those of two processes do not mix."""

    def __init__(self, stream, name: str):
        self.stream, self.name, self.begun = stream, name, ""

    def write(self, text: str) -> None:
        *lines, self.begun = (self.begun + text).split("\n")
        if lines:
            self.stream.write("".join(f"{self.name:<24} {line}\n" for line in lines))
            self.stream.flush()

    def flush(self) -> None:
        """Lines are written when they end."""


def _train(task: str) -> None:
    """`cornucopia train TASK`, in this process."""
    sys.stdout = Named(sys.stdout, task)
    sys.argv = ["cornucopia", "train", task]
    print(f"$ {' '.join(sys.argv)}")
    command.main()


def train(tasks: list[str]) -> dict[str, tuple[int, float]]:
    """Task -> exit code and seconds; after one that failed no other is begun."""
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # or the first takes all the memory of a GPU
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # as `cornucopia` does before TensorFlow is imported
    command.onednn()
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tensorflow", "keras", "shared.command"])
    waiting, running, done = list(tasks), {}, {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            task = waiting.pop(0)
            process = forks.Process(target=_train, args=(task,))
            process.start()
            running[process.sentinel] = task, process, time.monotonic()
        for sentinel in connection.wait(running):
            task, process, since = running.pop(sentinel)
            process.join()
            done[task] = process.exitcode, time.monotonic() - since
            if process.exitcode:
                waiting.clear()
    return done


def main(tasks: list[str]) -> int:
    begun = time.monotonic()
    done = train(tasks)
    if failed := [task for task, (code, _) in done.items() if code]:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    rows = [COLUMNS]
    for task in sorted(done):
        reports = Path("saved_models", task).glob("*/assets.extra/metrics.json")
        newest = max(reports, key=os.path.getmtime)
        rows.append(row(json.loads(newest.read_text()), done[task][1]))
    print(f"\n{aligned(rows)}\n\n{len(tasks)} tasks in {time.monotonic() - begun:.0f} seconds", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
