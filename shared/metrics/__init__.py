"""Test metrics, each with the interval in which it would fall on other test examples of the same kind."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import scipy.stats

LOWER_IS_BETTER = {"loss", "sliding_loss", "wer", "rmse", "calibration_error", "false_alarm_rate",
                   "unseen_false_alarm_rate", "false_rejection_rate"}  # fmt: skip


def worse(metric: str, value: float, *, than: float) -> bool:
    """Whether a value of the metric is worse than another."""
    return value > than if metric in LOWER_IS_BETTER else value < than


@dataclasses.dataclass(frozen=True)
class Measured:
    """A metric on the test examples with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.low:.4f}-{self.high:.4f})"


def measured(statistic: Callable[..., float], *examples: np.ndarray, seed: int = 1, resamples: int = 1000) -> Measured:
    """A statistic of test examples and its 95 % percentile bootstrap interval (Efron & Tibshirani 1993, chapter 13).

    Args:
        statistic: takes as many arrays as there are `examples` -> a number.
        examples: arrays of one length, drawn from together, with replacement; of one alone the interval is NaN.
    """
    value = float(statistic(*examples))
    if len(examples[0]) < 2:
        return Measured(value, math.nan, math.nan)
    found = scipy.stats.bootstrap(
        examples, statistic, n_resamples=resamples, paired=True, vectorized=False, method="percentile",
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return Measured(value, float(found.confidence_interval.low), float(found.confidence_interval.high))


def share(those: np.ndarray) -> Measured:
    """The share of test examples of which something is true, bool [example].

    Where it is true of all or of none, every resample says the same, however few they are; then the interval is the
    exact one of Clopper & Pearson (1934).
    """
    count = int(those.sum())
    if 0 < count < len(those):
        return measured(np.mean, those.astype(float))
    found = scipy.stats.binomtest(count, len(those)).proportion_ci(0.95, "exact")
    return Measured(count / len(those), float(found.low), float(found.high))
