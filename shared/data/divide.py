"""Train, validation and test: as the data name them, else drawn by the seed."""

from collections.abc import Sequence

import numpy as np


def divide(
    splits: np.ndarray, labels: np.ndarray, names: Sequence[str], *, seed: int, what: str
) -> dict[str, np.ndarray]:
    """Rows of each split; a test part (a tenth) or validation part (a twelfth) that the data do not name is drawn,
    from every class alike.

    Args:
        splits: "train", "validation", "test" or "", [example].
        labels: class indices, [example].
        names: of the classes.
        seed: of the draw.
        what: the examples are, for messages, e.g. "pictures".

    Raises:
        ValueError: a class has too few examples to be in each part.
    """
    random = np.random.default_rng(seed)
    own = {split: np.flatnonzero(splits == split) for split in ("train", "validation", "test")}
    own["train"] = np.flatnonzero((splits == "train") | (splits == ""))
    for part, share in (("test", 1 / 10), ("validation", 1 / 12)):
        if len(own[part]):
            continue
        drawn = []
        for index, name in enumerate(names):
            rows = own["train"][labels[own["train"]] == index]
            if len(rows) < 2:
                raise ValueError(
                    f"class {name} has too few {what} to split: it needs one each to learn from, to validate and to "
                    f"test; add some, or remove the class"
                )
            drawn.append(random.choice(rows, max(1, round(share * len(rows))), replace=False))
        own[part] = np.sort(np.concatenate(drawn))
        own["train"] = np.setdiff1d(own["train"], own[part])
    return own
