"""A search: what is marked, what is tried, what comes of it, and how it goes on."""

import dataclasses
import importlib
import json
import signal
from typing import Annotated, Literal

import forks
import keras_tuner
import pytest

from shared import command, run, tuning

TUNE = ("tune", "vision.classify", "--size=8", "--width=8", "--batch=64", "--method=random", "--name=a")


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
    rate: Annotated[float, run.Range(1e-4, 1e-1, log=True)] = 3e-3
    width: Annotated[int, run.Range(16, 64, step=16)] = 32
    kind: Annotated[Literal["plain", "deep"], run.Choices(("plain", "deep"))] = "plain"
    mirror: bool = True


MARKS = run.marks(Config)


def search(folder, method, *, trials, score, epochs=9, going_on=False):
    """Run a search whose trials only score; its oracle, and the configs that were tried."""
    tried = []

    class Scored(tuning.Tuner):
        def run_trial(self, trial):
            config = tuning.settled(self.config, trial)
            tried.append(config)
            return {"score": score(config)}

    config = Config(runs=str(folder), name="tune-a", epochs=epochs)
    oracle = tuning.oracle(method, MARKS, config=config, trials=trials)
    tuner = Scored("task", None, config, oracle=oracle)
    if going_on:
        tuner.take_up()
    tuner.search()
    return oracle, tried


def test_marks_become_hyperparameters():
    assert list(MARKS) == ["rate", "width", "kind"]
    rate, width, kind = tuning.space(MARKS, {"rate": 3e-3, "width": 32, "kind": "plain"}).space
    assert (rate.min_value, rate.max_value, rate.sampling, rate.default) == (1e-4, 1e-1, "log", 3e-3)
    assert list(width.values) == [16, 32, 48, 64]
    assert kind.values == ["plain", "deep"]


@pytest.mark.parametrize("task", [task for task in command.tasks() if run.marks(command.head(task))])
def test_defaults_can_be_drawn(task):
    config = importlib.import_module(f"apps.{task}").Config
    assert run.marks(config) == run.marks(command.head(task))
    for name, mark in run.marks(config).items():
        default = getattr(config(), name)
        if isinstance(mark, run.Choices):
            assert default in mark.values, name
        else:
            assert mark.low <= default <= mark.high, name
            assert (default - mark.low) % (mark.step or 1) == 0 or isinstance(default, float), name


@pytest.mark.parametrize("method", tuning.ORACLES)
def test_defaults_are_tried_first_and_the_search_goes_on(tmp_path, method):
    oracle, tried = search(tmp_path, method, trials=4, score=lambda config: -config.rate)
    assert (tried[0].rate, tried[0].width, tried[0].kind) == (3e-3, 32, "plain")
    assert len(tried) == len(oracle.trials) == 4
    assert len({(config.rate, config.width, config.kind) for config in tried}) > 1
    oracle, more = search(tmp_path, method, trials=13, score=lambda config: -config.rate, going_on=True)
    assert len(more) == 9
    assert len(oracle.trials) == 13
    best = tuning.rank(oracle.trials.values())[0]
    assert best.score == max(-config.rate for config in [*tried, *more])
    assert all(1e-4 <= config.rate <= 1e-1 for config in more)


def test_hyperband_gives_the_best_more_epochs(tmp_path):
    _, tried = search(tmp_path, "hyperband", trials=13, score=lambda config: -config.rate)
    assert tried[0].epochs == 1
    assert {config.epochs for config in tried} == {1, 3, 9}
    again = [config.rate for config in tried if config.epochs == 3]
    assert sorted(again) == sorted(config.rate for config in tried if config.epochs == 1)[: len(again)]


def test_values_that_came_over_the_network_are_what_was_drawn():
    parameters = tuning.space(MARKS, {"rate": 3e-3, "width": 32, "kind": "plain"})
    parameters = keras_tuner.HyperParameters.from_proto(parameters.to_proto())
    trial = keras_tuner.engine.trial.Trial(parameters, trial_id="0")
    assert tuning.settled(Config(name="tune-a"), trial) == Config(name="tune-a/trial_0")


def test_table_and_flags(tmp_path):
    def score(config):
        if config.width == 16:
            raise FloatingPointError("the loss became nan")
        return -config.rate

    oracle, _ = search(tmp_path, "random", trials=8, score=score)
    assert "the loss became nan" in next((tmp_path / "tune-a").glob("trial_*/error.txt")).read_text()
    ranked = tuning.rank(oracle.trials.values())
    config = Config(name="tune-a", mirror=False, data="some/path", checkpoint_every=5)
    heading, *lines = tuning.table(config, ranked, fields=MARKS)
    assert heading.split() == ["trial", "score", "epochs", "rate", "width", "kind"]
    scores = [line.split()[1] for line in lines]
    scored = [float(score) for score in scores if score != "failed"]
    assert scored == sorted(scored, reverse=True)
    assert scores[len(scored) :] == ["failed"] * (8 - len(scored))
    assert len(scored) < 8
    (first,) = [line for line in lines if line.endswith("defaults")]
    assert first.split()[2:-1] == ["10", "0.003", "32", "plain"]
    assert tuning.flags(dataclasses.replace(config, rate=0.01, kind="deep")) == [
        "--data=some/path", "--checkpoint-every=5", "--rate=0.01", "--kind=deep", "--no-mirror",
    ]  # fmt: skip


def test_of_equal_trials_the_earlier_is_best(tmp_path):
    oracle, _ = search(tmp_path, "random", trials=3, score=lambda config: 0.5)
    trials = [*oracle.trials.values()][::-1]  # as a resumed search may read them
    assert [one.trial_id for one in tuning.rank(trials)] == ["0", "1", "2"]


def test_what_cannot_be_tuned_is_told_at_once(mistaken):
    said = mistaken("tune", "rl.ppo").err
    assert "rl.ppo marks no field with a range" in said
    assert "vision.classify" in said
    given = ("--rate=0.1", "--decay=0", "--width=8", "--mix=none")
    assert "leave out one of rate, decay" in mistaken("tune", "vision.classify", *given).err
    assert "give 1 or more" in mistaken("tune", "vision.classify", "--trials=0").err


def test_keras_tuner_is_missing(monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'cornucopia-suite\[tune\]'"):
        command._tune(["vision.classify"])


def test_interrupted_search_goes_on_within_its_trial(forked, tmp_path):
    flags = (*TUNE, "--epochs=3", "--trials=2")
    log = tmp_path / "log"
    where = (signal.SIGINT, "tune-a/trial_1", 1, 1)
    first = forks.start(forks.signalled, *where, *flags, folder=tmp_path, out=log)
    code, said = forks.ended(first), log.read_text()
    assert code == 130, said
    assert "the search goes on with cornucopia tune vision.classify --resume --name=a" in said
    folder = tmp_path / "runs" / "tune-a"
    done = forked(*flags, "--resume").stdout
    assert "trial_0\n" not in done
    assert "of 3 epochs" in done
    assert "defaults" in done
    states = [json.loads((folder / f"trial_{n}" / "checkpoint-3" / "state.json").read_text()) for n in (0, 1)]
    best = max((0, 1), key=lambda number: states[number]["best"][0])
    assert done.rsplit("mix\n", 1)[1].split()[:2] == [str(best), f"{states[best]['best'][0]:.4f}"]
    chosen = json.loads((folder / f"trial_{best}" / "config.json").read_text())["config"]
    replay = (folder / "best.flags").read_text().split()
    again = command.tyro.cli(command.head("vision.classify"), args=replay)
    assert {key: value for key, value in dataclasses.asdict(again).items() if key in chosen} == chosen
    assert "was another" in forked(*flags, "--resume", "--method=bayesian", expect=2).stderr


def test_workers_share_a_search(forked, tmp_path):
    done = forked(*TUNE, "--epochs=1", "--trials=3", "--workers=2")  # none waits for another for ever
    logs = [(tmp_path / "runs" / "tune-a" / f"worker-{index}.log").read_text() for index in (0, 1)]
    assert sorted(number for log in logs for number in "012" if f"trial_{number}\n" in log) == ["0", "1", "2"]
    lines = done.stdout.rsplit("mix\n", 1)[1].splitlines()
    assert sorted(line.split()[0] for line in lines[:3]) == ["0", "1", "2"]
    assert "$(cat runs/tune-a/best.flags)" in lines[3]


def test_no_trial_came_to_a_score(forked):
    done = forked("tune", "vision.classify", "--data=nowhere", "--trials=2", "--name=b", expect=2)
    assert "FileNotFoundError: nowhere does not exist" in done.stdout
    assert done.stderr.startswith("cornucopia: none of 2 trials came to a score; why not is in runs/tune-b/trial_*")
