"""How well a ranking of all items finds the one that a user took next."""

from pathlib import Path

import numpy as np

from shared.metrics import Measured, measured, share


def retrieval(scores: np.ndarray, targets: np.ndarray, popularity: np.ndarray, *, top: int = 10) -> dict[str, Measured]:
    """NDCG, hit rate, mean reciprocal rank, coverage and popularity bias of rankings with one right item each.

    Args:
        scores: [user, item]; -inf for an item that must not be recommended.
        targets: the right item, an index, [user].
        popularity: share of the users who took an item before, [item].
        top: length of the list that a user sees.

    Returns:
        `ndcg@10`, `hr@10`: of the list of ten (Jarvelin & Kekalainen 2002; with one right item, the ideal DCG is 1).
        `mrr`: mean of 1 / rank over the full ranking.
        `coverage@10`: share of the items that at least one user sees; of all these users, so without an interval.
        `popularity_bias@10`: how much more popular the items are that users see than those that they took, on
        average; 1 is unbiased.

    Raises:
        ValueError: a score is NaN, or a right item was excluded.
    """
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN; expected numbers, or -inf for an item that must not be recommended")
    own = scores[np.arange(len(targets)), targets]
    if not np.isfinite(own).all():
        raise ValueError("the right item is among the excluded ones; expected it to be recommendable")
    place = ranks(scores, targets)
    shown = np.argsort(-scores, axis=-1, kind="stable")[:, :top]
    covered = len(np.unique(shown)) / scores.shape[1]
    bias = measured(lambda seen, took: seen.mean() / took.mean(), popularity[shown].mean(-1), popularity[targets])
    return {
        f"ndcg@{top}": measured(np.mean, ndcg(place, top=top)),
        f"hr@{top}": share(place <= top),
        "mrr": measured(np.mean, 1 / place),
        f"coverage@{top}": Measured(covered, covered, covered),
        f"popularity_bias@{top}": bias,
    }


def ndcg(place: np.ndarray, *, top: int = 10) -> np.ndarray:
    """Of a list whose one right item stands at a place, from 1, [user]."""
    return np.where(place <= top, 1 / np.log2(place + 1), 0)


def ranks(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Place of the right item, from 1; among equal scores it comes last, so that a constant earns nothing, [user]."""
    return (scores >= scores[np.arange(len(targets)), targets][:, None]).sum(-1)


def plot_popularity(
    scores: np.ndarray, targets: np.ndarray, popularity: np.ndarray, path: Path, *, top: int = 10
) -> None:
    """Draw which items are taken, shown and found, by tenths of the items from the rarest on, as a PNG.

    The arguments are those of `retrieval`.
    """
    from matplotlib.figure import Figure

    tenth = np.empty(len(popularity), int)  # of each item
    tenth[np.argsort(popularity, kind="stable")] = np.arange(len(popularity)) * 10 // len(popularity)
    shown = np.argsort(-scores, axis=-1, kind="stable")[:, :top]
    found = targets[ranks(scores, targets) <= top]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for place, (name, items) in enumerate({"taken": targets, "shown": shown.ravel(), "found": found}.items()):
        shares = np.bincount(tenth[items], minlength=10) / (len(targets) if name == "found" else items.size)
        axes.bar(np.arange(10) + 0.28 * (place - 1), shares, 0.28, label=f"{name}, {shares.sum():.2f} in all")
    axes.set(xticks=range(10), xticklabels=range(1, 11), ylabel="share",
             xlabel="tenths of the items, the tenth is the most popular")  # fmt: skip
    axes.legend(title=f"what users take next; the {top} that they are shown")
    figure.savefig(path, dpi=120)
