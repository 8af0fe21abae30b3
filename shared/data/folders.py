"""Which class and split a file belongs to, by the folders that it is in."""

from pathlib import Path

from shared.data import archives

SPLITS = {"train": "train", "training": "train", "validation": "validation", "val": "validation",
          "valid": "validation", "dev": "validation", "test": "test"}  # fmt: skip


def classes(path: Path, *, kind: str, suffixes: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """File name -> (class, split) of a folder or archive with one sub-folder a class.

    Where the upper folders are train and test (and validation or val), the classes are below these; else split is "".

    Args:
        path: of the folder or archive.
        kind: what the files hold, in the plural, for messages.
        suffixes: how files of the kind end, for messages.

    Raises:
        FileNotFoundError, ValueError: nothing is there, an empty class, a folder beside train and test.
    """
    parts = {name: name.split("/") for name in archives.names(path)}
    tops = {part[0] for part in parts.values() if len(part) > 1}
    while len(tops) == 1 and all(len(part) > 2 for part in parts.values()):  # archives often wrap all in one folder
        parts = {name: part[1:] for name, part in parts.items()}
        tops = {part[0] for part in parts.values()}
    is_split = {"train", "test"} <= {SPLITS.get(top.lower()) for top in tops}
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
