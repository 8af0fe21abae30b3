"""Tables in CSV or TSV files."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from shared.data import folders

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # characters of a cell: a text may be a book


def rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number of its last line and the cells of each row, that with the columns' names first; `.tsv` means tabs,
    else commas. Rows without anything are passed over.

    Raises:
        ValueError: a row has more cells than the first, a quotation mark is not closed, or the text is not UTF-8; says
            where.
    """
    tabs = path.suffix.lower() == ".tsv"
    head = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if tabs else ",", strict=True)
            for row in reader:
                number = reader.line_num
                if not row:
                    continue
                head = head or len(row)
                if any(row[head:]):  # what is empty there is no harm
                    raise ValueError(f"{path}, line {number}: {len(row)} fields, the first line names {head}")
                # From a mark that nothing closes to the next one all is one cell, with its tabs and ends of lines.
                if tabs and any("\t" in cell and ("\n" in cell or "\r" in cell) for cell in row):
                    raise csv.Error("a field of several lines with tabs in it")
                yield number, row[:head]
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: {error}; a field that begins with a quotation mark ends with one, and "
            f"those within it are written twice"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); convert it, e.g. iconv -f latin1 -t utf8") from error


def pick(path: Path, number: int, row: list[str], at: list[int], head: list[str]) -> tuple[str, ...]:
    """The cells of a row at some places; ValueError where it is too short for them."""
    if len(row) <= max(at):
        raise ValueError(f"{path}, line {number}: {len(row)} fields, the first line names {len(head)}")
    return tuple(row[place] for place in at)


def read(path: Path, columns: tuple[str, ...], *, perhaps: str = "") -> list[tuple[str | None, ...]]:
    """The named columns of a table with a header line, row by row, and `perhaps` one more: None where there is none.

    Raises:
        ValueError: a column is missing, a row is too short, or as `rows`.
    """
    lines = rows(path)
    _, head = next(lines, (0, []))
    missing = [column for column in columns if column not in head]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}; expected a first line that names {', '.join(columns)}, found "
            f"{', '.join(head) or 'an empty file'}"
        )
    has = perhaps in head
    at = [head.index(column) for column in (*columns, *[perhaps] * has)]
    absent = (None,) * (bool(perhaps) and not has)
    return [pick(path, number, row, at, head) + absent for number, row in lines]


def labelled(path: Path, column: str) -> list[tuple[str, str, str]]:
    """(what is in a column, label, split) from a table with a column `label` and perhaps `split`, without which the
    split is "".

    Raises:
        ValueError: a split is unknown, or as `read`.
    """
    found = read(path, (column, "label"), perhaps="split")
    wrong = sorted({split for _, _, split in found if split is not None and split.lower() not in folders.SPLITS})
    if wrong:
        raise ValueError(f"{path}: split {', '.join(wrong)} is unknown; expected {', '.join(folders.SPLITS)}")
    return [(value, label, "" if split is None else folders.SPLITS[split.lower()]) for value, label, split in found]
