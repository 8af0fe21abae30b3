"""Write the tables of README.md, CONTRIBUTING.md and deploy/README.md from what the benchmarks measured.

python -m benchmarks.report    reads benchmarks/results/*.json and benchmarks/{serving,training,races}.json
"""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent


COLUMNS = ("task", "data, protocol", "model", "metric", "result (95 % interval)", "baseline", "published", "minutes",
           "examples/s", "memory")  # fmt: skip


def table(reports: list[dict]) -> str:
    lines = [" | ".join(COLUMNS), " | ".join(["---"] * len(COLUMNS))]
    for report in reports:
        cost = report["cost"]
        for metric in dict.fromkeys([report["headline"], *report["expected"]]):
            cells = [
                f"`{' '.join([report['task'], *report['flags']])}`",
                f"{report['data']}, {report['protocol']}",
                report["model"],
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


def serving(found: dict) -> str:
    """The figures of the server, each beside what was measured in turn with it."""
    compared = {**found["throughput"], "seconds from start to ready, of import and load of the model": found["start"]}
    lines = ["| | ours | beside | ratio (median of rounds) | asked |", "| --- | --- | --- | --- | --- |"]
    for name, one in compared.items():
        sign = "at most" if "seconds" in name else "at least"
        asked = "" if one["bar"] is None else f"{sign} {one['bar']:g}"
        lines.append(f"| {name} | {_short(one['ours'])} | {_short(one['beside'])} | {one['ratio']:.2f} | {asked} |")
    swap, long, one = found["swap"], found["endurance"], found["imports"]
    lines.append(f"| seconds to import the client, beside the stock package's stubs | {_short(one['ours'])} | "
                 f"{_short(one['beside'])} | {one['ratio']:.2f} | ours at most 0.3 s |")  # fmt: skip
    lines.append(f"| p99 in ms during two swaps under 200 requests/s, of that before; {swap['errors']} errors of "
                 f"{swap['requests']:,} | {swap['p99_during']:.1f} | {swap['p99_before']:.1f} | {swap['ratio']:.2f} | "
                 "at most 5 |")  # fmt: skip
    last, first = (f"{long[key] / 2**20:,.0f}" for key in ("last", "first"))
    lines.append(f"| resident MiB after {long['requests']:,} requests, of that after 10,000 | {last} | {first} | "
                 f"{long['ratio']:.2f} | at most 1.1 |")  # fmt: skip
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def scaling(found: dict) -> str:
    """What two devices and two processes make of the cores of one machine, and what fit costs."""
    named = {"one": "one process", "mirrored": "two logical devices of it", "multiworker": "two processes, gRPC"}
    lines = [
        "| | ms a step | as fast as one | all-reduce of the gradient alone, of a step |",
        "| --- | --- | --- | --- |",
    ]
    for strategy, name in named.items():
        one = found["scaling"][strategy]
        lines.append(f"| {name} | {1000 * one['step']:.1f} | {one['of_one']:.2f} | {one['reduce_share']:.0%} |")
    return "\n".join(lines)


def races(found: dict) -> str:
    """Medians of every side of every race in which ours ran, and in brackets the quality of each run."""
    found = {name: race for name, race in found.items() if "ours" in race["sides"]}
    lines = [
        "| race | | quality | seconds | of processors | examples/s | settings |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for race in found.values():
        changed = "".join(f" --{name}={value}" for name, value in race["flags"].items())
        for side, named in race["sides"].items():
            runs = list(named.values())
            library, _, variant = side.partition(", ")
            name = f"`{race['task']}{changed}`" if library == "ours" else f"{library} {runs[0]['version']}"
            each = ", ".join(
                f"{'' if run.isdecimal() else run + ' '}{one['quality']:.3f}" for run, one in named.items()
            )
            cells = [
                f"{race['data'] or 'embedded'}, {race['metric']}",
                f"{name}, {variant}" if variant else name,
                f"{_median(runs, 'quality'):.3f} ({each})",
                _short(_median(runs, "seconds")),
                _short(_median(runs, "processor")),
                f"{_median(runs, 'speed'):,.0f}" if "speed" in runs[0] else "",
                " / ".join(dict.fromkeys(one["settings"] for one in runs if "settings" in one)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for race in found.values():
        asleep = f", OMP_WAIT_POLICY={race['omp_wait_policy']}" if race["omp_wait_policy"] else ""
        where = f"On {race['threads']} threads of {race['machine']}{asleep}."
        if where not in lines:
            lines.append(where)
    return "\n".join(lines)


def _median(runs: list[dict], key: str) -> float:
    return statistics.median(one[key] for one in runs)


def fill(text: str, begin: str, end: str, table: str) -> str:
    """A page with a table between the comments that mark its place."""
    marked = re.compile(rf"(<!-- {re.escape(begin)} -->\n).*?(<!-- end of {end} -->)", re.DOTALL)
    if not marked.search(text):
        raise ValueError(f"the page has no place for {begin}: the two comments that mark it are gone")
    return marked.sub(lambda found: found[1] + "\n" + table + "\n\n" + found[2], text)


def main() -> None:
    reports = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    readme, deploy = ROOT / "README.md", ROOT / "deploy" / "README.md"
    text = fill(readme.read_text(), "results: make report", "results", table(reports))
    figures = json.loads((ROOT / "benchmarks" / "serving.json").read_text())
    readme.write_text(fill(text, "serving: make report", "serving", serving(figures)))
    figures = json.loads((ROOT / "benchmarks" / "races.json").read_text())
    contributing = ROOT / "CONTRIBUTING.md"
    contributing.write_text(fill(contributing.read_text(), "races: make report", "races", races(figures)))
    figures = json.loads((ROOT / "benchmarks" / "training.json").read_text())
    deploy.write_text(fill(deploy.read_text(), "scaling: make report", "scaling", scaling(figures)))


if __name__ == "__main__":
    main()
