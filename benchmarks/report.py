"""Write the README's table of results from benchmarks/results/*.json: python -m benchmarks.report."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


COLUMNS = ("task", "data, protocol", "metric", "result (95 % interval)", "baseline", "published", "minutes",
           "examples/s", "memory")  # fmt: skip


def table(reports: list[dict]) -> str:
    lines = [" | ".join(COLUMNS), " | ".join(["---"] * len(COLUMNS))]
    for report in reports:
        metric, cost = report["headline"], report["cost"]
        cells = [
            f"`{report['task']}`",
            f"{report['data']}, {report['protocol']}",
            metric,
            cell(report["test"][metric]),
            cell(report["baseline"].get(metric)),
            report["published"].get(metric, ""),
            f"{cost['train_seconds'] / 60:.1f}",
            f"{cost['examples_per_second']:,.0f}",
            f"{cost['peak_bytes'] / 2**30:.1f} GiB",
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def cell(value: dict | None) -> str:
    return f"{value['value']:.3f} ({value['low']:.3f}-{value['high']:.3f})" if value else ""


def main() -> None:
    reports = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    readme = ROOT / "README.md"
    text = readme.read_text()
    marked = re.compile(r"(<!-- results: make report -->\n).*?(<!-- end of results -->)", re.DOTALL)
    if not marked.search(text):
        raise ValueError(f"{readme} has no place for the results: the two comments that mark it are gone")
    readme.write_text(marked.sub(lambda found: found[1] + "\n" + table(reports) + "\n\n" + found[2], text))


if __name__ == "__main__":
    main()
