"""The programs that compare results with what is promised, and write the README's table."""

import json

import pytest

from benchmarks import bound, quality, report, suite
from shared import command
from shared.metrics import LOWER_IS_BETTER


def result(**values):
    interval = {name: {"value": value, "low": value, "high": value} for name, value in values.items()}
    return {
        "task": "a.task",
        "data": "some",
        "test": interval,
        "baseline": {"accuracy": {"value": 0.8, "low": 0.7, "high": 0.9}},
    }


def test_shortfalls():
    assert quality.shortfalls(result(accuracy=0.9), {"accuracy": 0.9}) == []
    assert quality.shortfalls(result(accuracy=0.85), {"accuracy": 0.9}) == ["accuracy 0.8500, expected 0.9"]
    assert quality.shortfalls(result(accuracy=0.8), {"accuracy": 0.7}) == [
        "accuracy 0.8000 does not beat the baseline's 0.8000"
    ]
    best = {**result(**{"return": 500.0}), "task": "rl.ppo", "data": "CartPole-v1"}
    best["baseline"] = best["test"]
    assert quality.shortfalls(best, {"return": 475.0}) == []  # there is no more to be had
    assert quality.shortfalls({**best, "data": "Acrobot-v1"}, {"return": 475.0}) != []
    assert "loss" in LOWER_IS_BETTER
    assert quality.shortfalls(result(loss=1.5), {"loss": 1.4}) == ["loss 1.5000, expected 1.4"]
    assert quality.shortfalls(result(loss=1.3), {"loss": 1.4}) == []


@pytest.mark.parametrize("task", command.tasks())
def test_expectations_can_be_read_without_the_task(task):
    for bars in quality.expected(task).values():
        assert all(isinstance(bar, float) for bar in bars.values())


def test_table_and_readme_agree():
    """The table in the README is what `make report` makes of the results that are committed."""
    paths = sorted((report.ROOT / "benchmarks" / "results").glob("*.json"))
    assert paths
    made = report.table([json.loads(path.read_text()) for path in paths])
    readme = (report.ROOT / "README.md").read_text()
    assert made in readme, "run make report"
    figures = json.loads((report.ROOT / "benchmarks" / "serving.json").read_text())
    assert report.serving(figures) in readme, "run make report"
    figures = json.loads((report.ROOT / "benchmarks" / "training.json").read_text())
    assert report.scaling(figures) in (report.ROOT / "deploy" / "README.md").read_text(), "run make report"


def test_bound_by_hand():
    """A gigabyte around a ring of two hosts: once its bytes through each link, at 8 Gbit/s a second."""
    assert bound.milliseconds(10**9, hosts=2, gigabits=8) == pytest.approx(1000)
    assert bound.milliseconds(10**9, hosts=8, gigabits=8) == pytest.approx(1750)


def test_table_of_the_suite():
    found = result(accuracy=0.9) | {"headline": "accuracy", "served": {"answer": "label cat", "milliseconds": 1.234}}
    rows = [suite.COLUMNS, suite.row(found, 61.6)]
    assert rows[1] == ("a.task", "accuracy", "0.900 (0.900-0.900)", "0.800 (0.700-0.900)", "label cat", "1.2", "62")
    head, line = suite.aligned(rows).splitlines()
    assert head.index("a served answer") == line.index("label cat")


def test_the_suite_is_every_domains_first_task():
    makefile = (report.ROOT / "Makefile").read_text()
    listed = next(line for line in makefile.splitlines() if line.startswith("SUITE :="))
    tasks = listed.removeprefix("SUITE :=").split("#")[0].split()
    assert set(tasks) <= set(command.tasks())
    assert {task.partition(".")[0] for task in tasks} == {task.partition(".")[0] for task in command.tasks()}
