"""Who took which item, and when: MovieLens files and CSV tables."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shared.data import tables


@dataclasses.dataclass(frozen=True)
class Ratings:
    """Users' items in the order in which each user took them, an item once a user, the first time.

    User `u` took `items[starts[u]:starts[u + 1]]`, indices of `item_names`, at the `times` beside them. Equal times
    keep the order of the file; a table without times is in order, and its line numbers are the times.
    """

    user_names: tuple[str, ...]
    item_names: tuple[str, ...]
    items: np.ndarray  # [interaction], int32
    times: np.ndarray  # [interaction], in the file's unit, float64
    starts: np.ndarray  # [user + 1], int64
    repeated: int  # interactions left out, because the user had the item before


# A column's name in lower case, in our tables and in MovieLens' CSV files -> what it holds.
COLUMNS = {"user": "user", "userid": "user", "user_id": "user", "item": "item", "itemid": "item", "item_id": "item",
           "movieid": "item", "rating": "rating", "timestamp": "timestamp"}  # fmt: skip


def read(path: Path) -> Ratings:
    """Interactions from a file, or from a folder that holds one of MovieLens' names.

    A `.csv` or `.tsv` names its columns in the first line: `user`, `item`, and if it likes `rating` and `timestamp`.
    Any other file is MovieLens' `user item rating timestamp`, with tabs (`u.data`) or `::` (`ratings.dat`) between.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not as expected; says which, and what was expected.
    """
    if path.is_dir():
        found = [path / name for name in ("u.data", "ratings.dat", "ratings.csv") if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"no u.data, ratings.dat or ratings.csv is in {path}; name the file itself")
        path = found[0]
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a MovieLens file, or a CSV with columns user,item")
    table = path.suffix.lower() in (".csv", ".tsv")
    users, items, times = [], [], []
    try:
        for number, user, item, time in _table(path) if table else _movielens(path):
            if not user or not item:
                raise ValueError(f"{path}, line {number}: the {'user' if not user else 'item'} is empty")
            try:
                times.append(float(time))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: expected a number as timestamp, found {time!r}") from error
            users.append(user)
            items.append(item)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); convert it, e.g. iconv -f latin1 -t utf8") from error
    if not users:
        raise ValueError(f"{path} holds no interaction; expected one a line")
    if not np.isfinite(times).all():
        raise ValueError(f"{path}, line {1 + table + int(np.flatnonzero(~np.isfinite(times))[0])}: no finite timestamp")
    return in_order(users, items, np.array(times))


def _movielens(path: Path) -> Iterator[tuple[int, str, str, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            fields = line.rstrip("\n").split("::" if "::" in line else "\t")
            if len(fields) != 4:
                raise ValueError(f"{path}, line {number}: expected user, item, rating and timestamp with tabs or :: "
                                 f"between, found {line.strip()[:60]!r}; tables with a header end in .csv")  # fmt: skip
            yield number, fields[0].strip(), fields[1].strip(), fields[3]


def _table(path: Path) -> Iterator[tuple[int, str, str, str]]:
    def choose(head: list[str]) -> list[int]:
        at = {COLUMNS.get(name.strip().lower()): place for place, name in enumerate(head)}
        if not {"user", "item"} <= set(at):
            raise ValueError(f"{path}: expected a first line that names user and item (rating and timestamp, if there "
                             f"are any), found {','.join(head)[:60] or 'an empty file'}")  # fmt: skip
        return [at[name] for name in ("user", "item", "timestamp") if name in at]

    for number, (user, item, *time) in tables.rows(path, choose):
        yield number, user.strip(), item.strip(), time[0] if time else str(number)


def in_order(users: list[str], items: list[str], times: np.ndarray) -> Ratings:
    """Sort each user's interactions by time, and drop those with an item that the user had before."""
    user_names, user = _numbered(users)
    item_names, item = _numbered(items)
    order = np.lexsort((times, user))  # stable: equal times stay in the order of the file
    _, first = np.unique(user[order] * len(item_names) + item[order], return_index=True)
    kept = order[np.sort(first)]
    starts = np.concatenate([[0], np.cumsum(np.bincount(user[kept], minlength=len(user_names)))])
    return Ratings(user_names, item_names, item[kept].astype(np.int32), times[kept], starts, len(order) - len(kept))


def _numbered(names: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Distinct names, numbers by their value, and each name's index among them."""
    distinct = sorted(set(names))
    if all(name.isdecimal() for name in distinct):
        distinct.sort(key=int)
    rank = {name: at for at, name in enumerate(distinct)}
    return tuple(distinct), np.fromiter((rank[name] for name in names), np.int64, len(names))


def titles(folder: Path) -> dict[str, str]:
    """Item -> title, from MovieLens' u.item where it lies in the folder; else none."""
    path = folder / "u.item"
    if not path.exists():
        return {}
    rows = [line.split("|") for line in path.read_text(encoding="latin-1").splitlines()]
    return {row[0]: row[1] for row in rows if len(row) > 1}
