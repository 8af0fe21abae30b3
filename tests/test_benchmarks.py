"""The programs that compare results with what is promised and with other libraries, and write the tables."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from benchmarks import bound, peers, quality, races, report, suite
from shared import command
from shared.metrics import LOWER_IS_BETTER
from shared.metrics.retrieval import retrieval


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


def test_trials_have_names_of_their_own_and_every_result_is_of_one():
    names = [one.name for one in quality.trials()]
    assert len(set(names)) == len(names)
    assert {path.stem for path in quality.RESULTS.glob("*.json")} <= set(names)
    assert {f"{task}.embedded" for task in command.tasks()} <= set(names)


@pytest.mark.parametrize("task", command.tasks())
def test_expectations_can_be_read_without_the_task(task):
    for bars in quality.expected(task).values():
        assert all(isinstance(bar, float) for bar in bars.values())


def test_table_and_readme_agree():
    """The tables in the pages are what `make report` makes of the results that are committed."""
    paths = sorted((report.ROOT / "benchmarks" / "results").glob("*.json"))
    assert paths
    made = report.table([json.loads(path.read_text()) for path in paths])
    readme = (report.ROOT / "README.md").read_text()
    assert made in readme, "run make report"
    figures = json.loads((report.ROOT / "benchmarks" / "serving.json").read_text())
    assert report.serving(figures) in readme, "run make report"
    figures = json.loads((report.ROOT / "benchmarks" / "training.json").read_text())
    assert report.scaling(figures) in (report.ROOT / "deploy" / "README.md").read_text(), "run make report"
    figures = json.loads(races.RESULTS.read_text())
    assert report.races(figures) in (report.ROOT / "CONTRIBUTING.md").read_text(), "run make report"


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


def test_lines_of_two_tasks_do_not_mix():
    out = io.StringIO()
    first, second = suite.Named(out, "a.task"), suite.Named(out, "b.task")
    print("one", file=first)
    print("half of", end=" ", file=first)
    print("two\nthree", file=second)
    print("a line", file=first)
    assert [line.split(maxsplit=1) for line in out.getvalue().splitlines()] == [
        ["a.task", "one"], ["b.task", "two"], ["b.task", "three"], ["a.task", "half of a line"]]  # fmt: skip


def test_the_suite_ends_where_a_task_fails(tmp_path):
    words = [sys.executable, "-m", "benchmarks.suite", "no.first", "no.second", "no.third"]
    done = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "cornucopia: unknown task no.first" in done.stderr
    assert sorted(done.stderr.splitlines()[-1].split(": ")[1].split(", ")) == ["no.first", "no.second"]
    assert "no.third" not in done.stdout  # it was not begun
    assert "$ cornucopia train no.second" in done.stdout


def test_the_suite_is_every_domains_first_task():
    makefile = (report.ROOT / "Makefile").read_text()
    listed = next(line for line in makefile.splitlines() if line.startswith("SUITE :="))
    tasks = listed.removeprefix("SUITE :=").split("#")[0].split()
    assert set(tasks) <= set(command.tasks())
    assert {task.partition(".")[0] for task in tasks} == {task.partition(".")[0] for task in command.tasks()}


def test_table_of_races_by_hand():
    runs = {"1": {"quality": 0.25, "seconds": 1.5, "processor": 3.0, "version": "2.0"},
            "2": {"quality": 0.5, "seconds": 2.5, "processor": 5.0, "version": "2.0"}}  # fmt: skip
    mine = {"cat": {"quality": 1.0, "seconds": 100.0, "processor": 200.0, "speed": 1234.0, "settings": "float32"}}
    race = {"task": "a.task", "data": "", "metric": "accuracy", "flags": {"epochs": 1}, "threads": 2,
            "machine": "a made up one", "omp_wait_policy": "PASSIVE",
            "sides": {"library, fast": runs, "ours": mine}}  # fmt: skip
    assert report.races({"a.task.embedded": race, "unmet": {**race, "sides": {"library": runs}}}).splitlines()[2:] == [
        "| embedded, accuracy | library 2.0, fast | 0.375 (0.250, 0.500) | 2.00 | 4.00 |  |  |",
        "| embedded, accuracy | `a.task --epochs=1` | 1.000 (cat 1.000) | 100 | 200 | 1,234 | float32 |",
        "",
        "On 2 threads of a made up one, OMP_WAIT_POLICY=PASSIVE.",
    ]


def test_sides_race_in_turn_and_what_is_not_run_again_stays():
    order = []

    def side(name):
        def compete(race, flags):
            order.append((name, flags))
            return {"quality": len(order)}

        return compete

    sides = {"theirs": side("theirs"), "ours": side("ours")}
    race = races.Race("a.task", "some", "accuracy", sides, {"1": {"seed": 1}, "2": {"seed": 2}}, {"epochs": 3})
    *_, last = races.run(race, {}, ["1", "2"], ["theirs", "ours"])
    assert [name for name, _ in order] == ["theirs", "ours"] * 2
    assert [flags["seed"] for _, flags in order] == [1, 1, 2, 2]
    assert order[0][1] == {"data": "some", "epochs": 3, "seed": 1}
    *_, last = races.run(race, last, ["2"], ["ours"])
    assert last["sides"] == {"theirs": {"1": {"quality": 1}, "2": {"quality": 3}},
                             "ours": {"1": {"quality": 2}, "2": {"quality": 5}}}  # fmt: skip
    assert [list(record["sides"]) for record in races.run(race, {}, ["1"], ["ours"])] == [["ours"]]


def test_races_are_of_tasks_and_their_settings():
    """That a race names a task, fields of its Config, and a metric that the task measures and expects."""
    for race in races.RACES:
        fields = {field.name for field in dataclasses.fields(command.head(race.task))}
        assert fields >= {"data", *race.flags, *(name for changes in race.runs.values() for name in changes)}
        assert race.metric in quality.expected(race.task)[race.data]


def test_peers_are_measured_as_we_are():
    random = np.random.default_rng(1)
    scores, took = random.integers(0, 5, (50, 30)).astype(float), random.integers(0, 30, 50)
    assert peers.ndcg(scores, took) == pytest.approx(retrieval(scores, took, np.ones(30))["ndcg@10"].value)
    code = (
        "from benchmarks.peers import clock\n"
        "before = clock()\n"
        "while (clock() - before)[1] < 0.1:  # of a processor\n"
        "    pass\n"
        "print((clock() - before)[0])\n"
    )
    # In a process of its own with one thread: NumPy's others would be awake, and count.
    one = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT, env=one)
    assert float(done.stdout) >= 0.08
