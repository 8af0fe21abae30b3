"""A task that names folds is measured by their mean."""

import dataclasses
import types

import numpy as np
import pytest

from shared import metrics, run

ACCURACY = {"one": np.array([1, 1, 0, 1.0]), "two": np.array([1, 0, 0, 1.0])}


def test_the_mean_over_folds_each_with_a_network_of_its_own(tmp_path, capsys):
    config = run.Config(name="mine", runs=str(tmp_path), data="")
    config.folder.mkdir()
    seen = []

    def train(fold, model, splits):
        seen.append((fold.folder, fold.data, model))
        return {"train_seconds": 1.0}

    task = types.SimpleNamespace(
        load=lambda fold: types.SimpleNamespace(about={"protocol": f"without {fold.data}"}),
        build=lambda fold, splits: object(),
        train=train,
        measure=lambda fold, model, splits: {"accuracy": metrics.measured(np.mean, ACCURACY[fold.data])},
        baseline=lambda fold, splits: {"accuracy": metrics.measured(np.mean, np.array([1.0, 0.0]))},
    )
    configs = {name: dataclasses.replace(config, data=name) for name in ACCURACY}
    first = run.Learned("model", None, {"protocol": ""}, {"train_seconds": 5.0}, *[{"accuracy": None}] * 2)
    learned = run.cross_validate(task, config, run.Folds(configs, "mean of two"), first)
    accuracy = learned.test["accuracy"]
    assert accuracy.value == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert (accuracy.low, accuracy.high) == (0.5, 0.75)  # over the folds
    assert learned.baseline["accuracy"].value == 0.5
    assert learned.folds["one"] == {
        "test": {"accuracy": 0.75},
        "baseline": {"accuracy": 0.5},
        "cost": {"train_seconds": 1.0},
    }
    assert learned.cost["train_seconds"] == 5 + 1 + 1
    assert (learned.model, learned.about["protocol"]) == ("model", "mean of two")
    assert [(folder, data) for folder, data, _ in seen] == [
        (tmp_path / "mine" / "one", "one"),
        (tmp_path / "mine" / "two", "two"),
    ]
    assert seen[0][2] is not seen[1][2]
    assert (tmp_path / "mine" / "two").is_dir()
    printed = capsys.readouterr().out
    assert "without two" in printed
    assert "mean of two" in printed

    # A fold that is the run itself is not run again; another statistic than the mean.
    configs = {"zero": config, **configs}
    first = dataclasses.replace(first, test=learned.test, baseline=learned.baseline)
    learned = run.cross_validate(task, config, run.Folds(configs, "the best", np.max), first)
    assert len(seen) == 4
    assert learned.test["accuracy"].value == 0.75
    assert learned.cost["train_seconds"] == 5 + 1 + 1
