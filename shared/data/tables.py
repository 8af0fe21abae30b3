"""Tables in CSV or TSV files."""

import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from shared.data import folders

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # characters of a cell: a text may be a book


def rows(path: Path, choose: Callable[[list[str]], list[int]]) -> Iterator[tuple[int, list[str]]]:
    """The number of its last line and the chosen cells of each row behind the first; `.tsv` means tabs, else commas.
    Rows without anything are passed over.

    Args:
        path: of the table.
        choose: the columns' names, none of an empty file -> the places of those that are wanted.

    Raises:
        ValueError: a row has more cells than the first, or too few for those wanted; a quotation mark is not closed; or
            the text is not UTF-8; says where.
    """
    tabs = path.suffix.lower() == ".tsv"
    head, at = 0, []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if tabs else ",", strict=True)
            for row in filter(None, reader):
                # From a mark that nothing closes to the next one all is one cell, with its tabs and ends of lines.
                if tabs and any("\t" in cell and ("\n" in cell or "\r" in cell) for cell in row):
                    raise csv.Error("a field of several lines with tabs in it")
                if not head:
                    head, at = len(row), choose(row)
                    continue
                if any(row[head:]) or len(row) <= max(at):  # what is empty at the end, or not wanted, is no harm
                    told = f"{len(row)} fields, the first line names {head}"
                    raise ValueError(f"{path}, line {reader.line_num}: {told}")
                yield reader.line_num, [row[place] for place in at]
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: {error}; a field that begins with a quotation mark ends with one, and "
            f"those within it are written twice"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); convert it, e.g. iconv -f latin1 -t utf8") from error
    if not head:
        choose([])


def read(path: Path, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The named columns of a table with a header line, row by row; ValueError where one is missing, or as `rows`."""
    return [tuple(cells) for _, cells in rows(path, lambda head: _places(path, head, columns))]


def labelled(path: Path, column: str) -> list[tuple[str, str, str]]:
    """(what is in a column, label, split) from a table with a column `label` and perhaps `split`, without which the
    split is "".

    Raises:
        ValueError: a split is unknown, or as `read`.
    """

    def choose(head: list[str]) -> list[int]:
        return _places(path, head, (column, "label", *["split"] * ("split" in head)))

    found = [cells for _, cells in rows(path, choose)]
    wrong = sorted({name for _, _, *split in found for name in split if name.lower() not in folders.SPLITS})
    if wrong:
        raise ValueError(f"{path}: split {', '.join(wrong)} is unknown; expected {', '.join(folders.SPLITS)}")
    return [(value, label, folders.SPLITS[split[0].lower()] if split else "") for value, label, *split in found]


def _places(path: Path, head: list[str], columns: tuple[str, ...]) -> list[int]:
    missing = [column for column in columns if column not in head]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}; expected a first line that names {', '.join(columns)}, found "
            f"{', '.join(head) or 'an empty file'}"
        )
    return [head.index(column) for column in columns]
