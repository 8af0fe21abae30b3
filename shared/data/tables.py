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
        ValueError: a row has more or fewer cells than the first, a quotation mark is not closed, or the text is not
            UTF-8; says where.
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
                if len(row) != head:
                    raise ValueError(f"{path}, line {number}: {len(row)} fields, the first line names {head}")
                # From a mark that nothing closes to the next one all is one cell, tabs too.
                if tabs and any("\t" in cell for cell in row):
                    raise csv.Error("a field with tabs in it")
                yield number, row
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: {error}; a field that begins with a quotation mark ends with one, and "
            f"those within it are written twice"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); convert it, e.g. iconv -f latin1 -t utf8") from error


def read(path: Path, columns: tuple[str, ...], *, perhaps: str = "") -> list[tuple[str | None, ...]]:
    """The named columns of a table with a header line, row by row, and `perhaps` one more: None where there is none.

    Raises:
        ValueError: a column is missing, or as `rows`.
    """
    lines = rows(path)
    _, head = next(lines, (0, []))
    missing = [column for column in columns if column not in head]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}; expected a first line that names {', '.join(columns)}, found "
            f"{', '.join(head) or 'an empty file'}"
        )
    at = [head.index(column) for column in columns]
    more = head.index(perhaps) if perhaps in head else None
    if not perhaps:
        return [tuple(row[place] for place in at) for _, row in lines]
    return [(*(row[place] for place in at), None if more is None else row[more]) for _, row in lines]


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
