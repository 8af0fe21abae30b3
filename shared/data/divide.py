"""Train, validation and test: as the data name them, else drawn by the seed; or all to measure a model on."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from shared.run import some

Found = TypeVar("Found")  # labelled examples as the readers give them: with `labels`, `splits` and `names`


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


def whole(
    found: Found, about: Mapping[str, str], names: Sequence[str]
) -> tuple[Found, dict[str, np.ndarray], dict[str, str]]:
    """Examples to measure a model of the classes `names` on: with labels that are its; the rows of their test part or,
    where they name none, of all, as `test`, beside one row each to learn from and to validate; and what is told about
    them, with the protocol.

    Raises:
        ValueError: the model does not know one of their classes.
    """
    if unknown := sorted(set(found.names) - set(names)):
        raise ValueError(f"the data's classes {some(unknown)} are not the model's {some(names)}")
    index = np.array([names.index(name) for name in found.names])
    test = np.flatnonzero(found.splits == "test")
    rows = test if len(test) else np.arange(len(found.labels))
    protocol = about["protocol"] if len(test) else "all of it"
    found = dataclasses.replace(found, labels=index[found.labels], names=tuple(names))
    return found, {"train": rows[:1], "validation": rows[:1], "test": rows}, {**about, "protocol": protocol}
