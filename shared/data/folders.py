"""Which class and split a file belongs to, by the folders that it is in."""

from pathlib import Path

from shared.data import archives

SPLITS = {"train": "train", "training": "train", "validation": "validation", "val": "validation",
          "valid": "validation", "dev": "validation", "test": "test"}  # fmt: skip


def classes(path: Path, *, kind: str, suffixes: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """File name -> (class, split) of a folder or archive with one sub-folder a class.

    Where the upper folders are splits, train and others, the classes are below these; else split is "".

    Args:
        path: of the folder or archive.
        kind: what the files hold, in the plural, for messages.
        suffixes: how files of the kind end, for messages.

    Raises:
        FileNotFoundError, ValueError: nothing is there, an empty class, a folder beside train and test.
    """
    parts = {name: name.split("/") for name in archives.names(path)}
    tops = {part[0] for part in parts.values() if len(part) > 1}
    while len(tops) == 1 and not any(_is_data(part, suffixes) for part in parts.values() if len(part) == 2):
        inside = {name: part[1:] for name, part in parts.items() if len(part) > 2}
        if not inside:
            break
        parts = inside  # archives often wrap all in one folder, with a README or a licence beside the classes
        tops = {part[0] for part in parts.values()}
    named = {SPLITS.get(top.lower()) for top in tops}
    is_split = {"train", "test"} <= named or ("train" in named and len(named) > 1 and None not in named)
    if is_split:
        unknown = sorted(top for top in tops if top.lower() not in SPLITS)
        if unknown:
            raise ValueError(f"{path} holds train and test, but also {', '.join(unknown)}; expected splits only")
    depth = 1 if is_split else 0
    files = {
        name: (part[depth], SPLITS[part[0].lower()] if is_split else "")
        for name, part in parts.items()
        if len(part) > depth + 1
    }
    if path.is_dir():
        roots = [folder for folder in path.iterdir() if folder.is_dir()] if is_split else [path]
        found = [folder for root in roots for folder in root.iterdir() if folder.is_dir()]
        empty = [f for f in found if not f.name.startswith(".") and not any(i.is_file() for i in f.rglob("*"))]
        if empty:
            raise ValueError(f"class {empty[0].name} is empty: no file is below {empty[0]}; add {kind} or remove it")
    if not files:
        raise ValueError(
            f"no {kind} below {path}; expected one sub-folder a class, each with {' '.join(suffixes)} files"
        )
    return files


def _is_data(part: list[str], suffixes: tuple[str, ...]) -> bool:
    """Whether a file is one of those that have a class, by its name."""
    name = part[-1].lower()
    return name.endswith(suffixes) and not name.startswith(("readme", "license", "licence"))
