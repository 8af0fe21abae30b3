"""How well class probabilities fit labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sklearn.metrics

from shared.metrics import Measured, measured, share


def classification(labels: np.ndarray, scores: np.ndarray, *, top: int = 5) -> dict[str, Measured]:
    """Accuracy, top-k accuracy, macro F1 and expected calibration error, each with its interval.

    Args:
        labels: true class indices, [example].
        scores: probabilities, [example, class]; ValueError where they are not finite or do not sum to one.
        top: k of the top-k accuracy, left out where there are no more classes than that.
    """
    if not np.isfinite(scores).all() or not np.allclose(scores.sum(-1), 1, atol=1e-3):
        raise ValueError("scores must be finite and sum to one per example; pass probabilities, not logits")
    found = decisions(labels, scores.argmax(-1))
    if scores.shape[1] > top:
        best = np.argpartition(scores, -top, axis=-1)[:, -top:]
        found[f"top{top}_accuracy"] = share((best == labels[:, None]).any(-1))
    found["calibration_error"] = measured(
        calibration_error, (labels == scores.argmax(-1)).astype(float), scores.max(-1)
    )
    return found


def decisions(labels: np.ndarray, chosen: np.ndarray) -> dict[str, Measured]:
    """Accuracy and macro F1 of chosen classes, for a model that gives no probabilities.

    A class that is neither among the labels nor chosen does not count towards macro F1.
    """
    return {
        "accuracy": share(labels == chosen),
        "macro_f1": measured(macro_f1, labels, chosen),
    }


def macro_f1(labels: np.ndarray, chosen: np.ndarray) -> float:
    """Unweighted mean of the classes' F1, of class indices [example].

    scikit-learn's `f1_score`, which a test compares, takes milliseconds to check its input, for each resample anew.
    """
    count = 1 + max(labels.max(), chosen.max())
    right = np.bincount(labels[labels == chosen], minlength=count)
    both = np.bincount(labels, minlength=count) + np.bincount(chosen, minlength=count)
    return float(np.mean(2 * right[both > 0] / both[both > 0]))


def calibration_error(right: np.ndarray, confidence: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error, in bins of equal width (Guo et al. 2017, equation 3).

    No library that the suite depends on has it.

    Args:
        right: 1 where the best class is the true one, else 0, [example].
        confidence: the best class's probability, [example].
    """
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(which, weights=right - confidence, minlength=bins)  # bin size times its gap
    return float(np.abs(gaps).sum() / len(right))


def plot_confusion(labels: np.ndarray, chosen: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Draw the confusion matrix, rows summing to one, as a PNG."""
    from matplotlib.figure import Figure

    matrix = sklearn.metrics.confusion_matrix(labels, chosen, labels=range(len(names)), normalize="true")
    side = min(3 + 0.45 * len(names), 24)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(picture, shrink=0.8, label="share of the true class")
    axes.set(xticks=range(len(names)), yticks=range(len(names)), xlabel="answered", ylabel="true")
    axes.set_xticklabels(names, rotation=45, ha="right", parse_math=False)  # a name may hold dollars
    axes.set_yticklabels(names, parse_math=False)
    if len(names) <= 25:
        for row, column in np.argwhere(matrix >= 0.005):
            share = matrix[row, column]
            axes.text(column, row, f"{share:.2f}".lstrip("0"), ha="center", va="center", fontsize=7,
                      color="white" if share > 0.5 else "black")  # fmt: skip
    figure.savefig(path, dpi=120)
