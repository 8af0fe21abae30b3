"""How well a ranking of all items finds the one that a user took next."""

import numpy as np

from shared.metrics import Measured, measured


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
        f"hr@{top}": measured(np.mean, (place <= top).astype(float)),
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
