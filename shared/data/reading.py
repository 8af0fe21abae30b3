"""Reading many files: in parallel, with the list of those that cannot be read."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tensorflow as tf

from shared.data import archives


def take(
    path: Path,
    files: Iterable[str],
    put: Callable[[str, bytes], None],
    *,
    what: str,
    suffixes: tuple[str, ...],
    on_error: str,
) -> tuple[list[str], list[str]]:
    """Hand each file's bytes to `put`, in parallel; return the names it took, in order, and "name: reason" of the rest.

    Args:
        path: folder or archive.
        files: names in it.
        put: takes a name and bytes; raises tf.errors.InvalidArgumentError where it cannot read them.
        what: the files hold, for messages.
        suffixes: of files to try; another ending is a reason to leave a file out.
        on_error: "fail" ends with the list of what cannot be read, "skip" leaves it out.
    """
    files = list(files)
    wanted = [name for name in files if name.lower().endswith(suffixes)]
    bad = {name: f"no {what} by its ending; expected {' '.join(suffixes)}" for name in set(files) - set(wanted)}

    def attempt(item: tuple[str, bytes]) -> tuple[str, str]:
        try:
            put(*item)
        except tf.errors.InvalidArgumentError as error:
            return item[0], _reason(item[1], error)
        return item[0], ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for chunk in _chunks(archives.contents(path, wanted, broken=bad), 256):
            bad.update({name: problem for name, problem in pool.map(attempt, chunk) if problem})
    lines = [f"{name}: {bad[name]}" for name in sorted(bad)]
    if bad and on_error == "fail":
        raise ValueError(
            f"{len(bad)} of {len(files)} files below {path} cannot be read; mend or remove them, or leave them out "
            f"with --on-error=skip:\n  " + "\n  ".join(lines[:20]) + ("\n  …" if len(bad) > 20 else "")
        )
    return [name for name in wanted if name not in bad], lines


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    yield chunk


def _reason(content: bytes, error: tf.errors.InvalidArgumentError) -> str:
    if not content:
        return "the file is empty"
    lines = [line.strip() for line in error.message.splitlines()]
    told = [line for line in lines if line and not line.startswith(("[[", "Detected at", "Graph execution", "File "))]
    return told[-1].split(" [Op:")[0].removeprefix("assertion failed: ").strip("[]") if told else "cannot be decoded"
