"""Running text: one file, or the *.txt files of a folder or an archive, one after the other."""

from pathlib import Path

from shared.data import archives


def read(path: Path, *, on_error: str) -> tuple[str, list[str]]:
    """The text below a path, and "name: reason" of each file that was left out; whatever ends a line becomes a newline.

    Args:
        path: a UTF-8 file of any name, or a folder, zip or tar with *.txt files, which are read in the order of names.
        on_error: "fail" ends with the list of what cannot be read, "skip" leaves it out.

    Raises:
        FileNotFoundError, ValueError: nothing is there, no text, or files that are not UTF-8.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a text, or a folder or archive of *.txt files")
    broken: dict[str, str] = {}
    if path.is_file() and not archives.is_archive(path):
        files = [(path.name, path.read_bytes())]
    else:
        wanted = [name for name in archives.names(path) if name.lower().endswith(".txt")]
        if not wanted:
            raise ValueError(f"no text below {path}; expected *.txt files in UTF-8")
        files = sorted(archives.contents(path, wanted, broken=broken))
    texts, bad = [], [f"{name}: {reason}" for name, reason in broken.items()]
    for name, content in files:
        try:
            texts.append(content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n"))
        except UnicodeDecodeError as error:
            bad.append(f"{name}: not UTF-8 ({error.reason} at byte {error.start:,})")
    if bad and (on_error == "fail" or not texts):
        raise ValueError(
            f"{len(bad)} of {len(files) + len(broken)} files of {path} cannot be read; convert them (iconv -f latin1 "
            "-t utf8), or leave them out with --on-error=skip:\n  "
            + "\n  ".join(bad[:20]) + ("\n  …" if len(bad) > 20 else "")
        )  # fmt: skip
    text = "\n".join(texts)
    if not text.strip():
        raise ValueError(f"{path} holds no text; expected a UTF-8 text, or *.txt files")
    return text, bad
