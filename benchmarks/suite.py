"""Every domain's first task on embedded data, from raw data to a served answer, then one table: `make suite`."""

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.report import cell
from shared import export

COLUMNS = ("task", "metric", "result (95 % interval)", "baseline", "a served answer", "ms a request", "seconds")


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


def main(tasks: list[str]) -> int:
    rows, begun = [COLUMNS], time.monotonic()
    for task in tasks:
        print(f"\n$ cornucopia train {task}", flush=True)
        since = time.monotonic()
        code = subprocess.run([Path(sys.executable).with_name("cornucopia"), "train", task], check=False).returncode
        if code:
            return code
        versions = export.versions(Path("saved_models") / task)
        report = json.loads((versions[max(versions)] / "assets.extra" / "metrics.json").read_text())
        rows.append(row(report, time.monotonic() - since))
    print(f"\n{aligned(rows)}\n\n{len(tasks)} tasks in {time.monotonic() - begun:.0f} seconds", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
