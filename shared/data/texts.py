"""Texts with a class each, from every way in which such data are published.

A folder or archive with one sub-folder of `.txt` files a class; a CSV or TSV table with `text`, `label` and perhaps
`split`; a folder with one text a line in `NAME.pos` and `NAME.neg`; lines of `COARSE:fine text` in `.label` files.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from shared.data import archives, folders, tables


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts with their labels, and what could not be read."""

    texts: tuple[str, ...]
    labels: np.ndarray  # int64 [text]
    splits: np.ndarray  # [text], "train", "validation", "test", or "" where the data names none
    names: tuple[str, ...]  # classes
    unreadable: tuple[str, ...]  # "where: reason"


def read(path: Path, *, fine: bool, on_error: str) -> Texts:
    """All texts of a folder, an archive or a file.

    Args:
        path: in one of the formats above.
        fine: of labels `COARSE:fine` take both parts, not the first alone.
        on_error: "fail" ends with the list of what cannot be read, "skip" leaves it out.

    Raises:
        FileNotFoundError, ValueError: nothing is there, it is in no known format, it has one class only, or holds
            texts that are empty or not UTF-8.
    """
    bad = []
    if path.is_file() and path.suffix.lower() in (".csv", ".tsv"):
        found = tables.labelled(path, "text")
    elif path.is_file() and path.suffix.lower() == ".label":
        found = [(*row, "") for row in questions(path, fine=fine)]
    elif path.is_dir() and (files := sorted([*path.glob("*.pos"), *path.glob("*.neg")])):
        found = [(text, file.suffix[1:], "") for file in files for text in lines(file)]
    elif path.is_dir() and (files := sorted(path.glob("*.label"))):
        found = [(*row, _split(file)) for file in files for row in questions(file, fine=fine)]
    elif path.is_file() and not archives.is_archive(path):
        raise ValueError(f"{path} is in no known format; expected .csv or .tsv with columns text and label, .label "
                         f"with COARSE:fine lines, a folder, or an archive")  # fmt: skip
    else:
        found, bad = _files(path)
    kept = []
    for number, (text, label, split) in enumerate(found, start=1):
        if text.strip() and label.strip():
            kept.append((text, label.strip(), split))
        else:
            bad.append(f"text {number}: {'no label' if text.strip() else 'no text'}")
    if bad and on_error == "fail":
        raise ValueError(
            f"{len(bad)} of {len(bad) + len(kept)} texts in {path} cannot be used; mend or remove them, or leave them "
            "out with --on-error=skip:\n  " + "\n  ".join(bad[:20]) + ("\n  …" if len(bad) > 20 else "")
        )
    return labelled(kept, path=str(path), unreadable=bad)


def labelled(rows: Iterable[tuple[str, str, str]], *, path: str, unreadable: Iterable[str] = ()) -> Texts:
    """Texts from rows of (text, label, split); ValueError where they are of fewer than two classes."""
    rows = list(rows)
    names = sorted({label for _, label, _ in rows})
    if len(names) < 2:
        held = f"one class only ({names[0]})" if names else "no text"
        raise ValueError(f"{path} holds {held}; a classifier needs two classes or more")
    index = {name: at for at, name in enumerate(names)}
    texts, labels, splits = zip(*rows, strict=True)
    return Texts(texts, np.array([index[label] for label in labels]), np.array(splits), tuple(names), tuple(unreadable))


def lines(path: Path, *, encoding: str = "utf-8") -> list[str]:
    """The lines of a text file, each without what ends it. ValueError where it is not in the encoding."""
    try:
        return path.read_text(encoding).removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not {encoding} ({error}); convert it, e.g. iconv -f latin1 -t utf8") from error


def questions(path: Path, *, fine: bool, encoding: str = "utf-8") -> list[tuple[str, str]]:
    """(text, label) from lines `COARSE:fine text` (Li & Roth 2002); ValueError where a line is another."""
    rows = []
    for number, line in enumerate(lines(path, encoding=encoding), start=1):
        label, _, text = line.partition(" ")
        if ":" not in label:
            raise ValueError(f"{path}, line {number}: expected COARSE:fine and a text, found {line[:60]!r}")
        rows.append((text, label if fine else label.partition(":")[0]))
    return rows


def _files(path: Path) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Rows of a folder or archive with one sub-folder of text files a class, and what is not readable."""
    files = folders.classes(path, kind="texts", suffixes=(".txt",))
    wanted = [name for name in files if name.lower().endswith(".txt")]
    bad = [f"{name}: no text by its ending; expected .txt" for name in files if not name.lower().endswith(".txt")]
    found, broken = [], {}
    for name, content in archives.contents(path, wanted, broken=broken):
        try:
            found.append((content.decode("utf-8-sig"), *files[name]))
        except UnicodeDecodeError as error:
            broken[name] = f"not UTF-8 ({error.reason} at byte {error.start})"
    return found, bad + [f"{name}: {reason}" for name, reason in broken.items()]


def _split(path: Path) -> str:
    """The split that a file's name begins with, or ""."""
    return next((split for word, split in folders.SPLITS.items() if path.stem.lower().startswith(word)), "")
