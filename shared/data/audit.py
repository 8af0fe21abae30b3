"""Look at the data before learning from it: sizes, balance, duplicates, leakage, inputs that say nothing."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from shared.run import say


def audit(
    splits: Mapping[str, tuple[Sequence, np.ndarray]], names: Sequence[str], *, unreadable: Sequence[str] = ()
) -> dict[str, int]:
    """Print one short block on labelled examples and return what was counted.

    Args:
        splits: name of a split -> (items, labels); an item is an array, a string or bytes, a label an index of names.
            Without one to learn from, `train`, they are a model's, and need not all be there.
        names: of the classes.
        unreadable: "path: reason" of each item that was left out.

    Raises:
        ValueError: a class has no example to learn from, or inputs hold NaN or infinity; says which.
    """
    counts = {split: np.bincount(labels, minlength=len(names)) for split, (_, labels) in splits.items()}
    train = counts.get("train")
    if train is not None and (train == 0).any():
        absent = [names[index] for index in np.flatnonzero(train == 0)]
        raise ValueError(f"no training example of class {', '.join(map(str, absent[:10]))}; add some, or remove it")
    digests = {split: [_digest(item) for item in items] for split, (items, _) in splits.items()}
    facts = {f"{split}_examples": len(labels) for split, (_, labels) in splits.items()}
    facts["classes"] = len(names) if train is not None else int((sum(counts.values()) > 0).sum())
    facts["unreadable"] = len(unreadable)
    facts["constant"] = sum(_is_constant(item) for items, _ in splits.values() for item in items)
    broken = {split: sum(_is_broken(item) for item in items) for split, (items, _) in splits.items()}
    if any(broken.values()):
        where = ", ".join(f"{count} in {split}" for split, count in broken.items() if count)
        raise ValueError(f"inputs hold NaN or infinity ({where}); mend or remove them")
    labels_seen: dict[bytes, set[int]] = {}
    for split, (_, labels) in splits.items():
        for digest, label in zip(digests[split], labels, strict=True):
            labels_seen.setdefault(digest, set()).add(int(label))
        facts[f"{split}_duplicates"] = len(digests[split]) - len(set(digests[split]))
    others = {split: set(found) for split, found in digests.items() if split != "train"}
    for split, found in others.items():
        facts[f"{split}_also_in_train"] = len(found & set(digests.get("train", ())))
    facts["contradictions"] = sum(len(labels) > 1 for labels in labels_seen.values())

    each, across = f" of the model's {len(names)}", ""
    if train is not None:
        each = f"; in train {train.min():,}"
        if train.min() < train.max():
            each += f" ({names[int(train.argmin())]}) to {train.max():,} ({names[int(train.argmax())]})"
        each += " each"
        across = "also in train: " + "  ".join(f"{split} {facts[f'{split}_also_in_train']:,}" for split in others)
    say("audit", "  ".join(f"{split} {len(labels):,}" for split, (_, labels) in splits.items())
        + f"  in {facts['classes']} classes{each}")  # fmt: skip
    inside = "  ".join(f"{split} {facts[f'{split}_duplicates']:,}" for split in splits)
    told = [f"exact duplicates: {inside}", across, f"same input, other label: {facts['contradictions']}"]
    say("", "; ".join(filter(None, told)))
    say("", f"unreadable {facts['unreadable']}, constant {facts['constant']}, NaN or infinite 0")
    for line in unreadable[:5]:
        say("", f"left out {line}")
    return facts


def _digest(item: object) -> bytes:
    if isinstance(item, str):
        item = item.encode()
    return hashlib.blake2b(item if isinstance(item, bytes) else np.ascontiguousarray(item), digest_size=16).digest()


def _is_constant(item: object) -> bool:
    if isinstance(item, str | bytes):
        return not item.strip()
    return item.size == 0 or item.min() == item.max()


def _is_broken(item: object) -> bool:
    return isinstance(item, np.ndarray) and item.dtype.kind == "f" and not np.isfinite(item).all()
