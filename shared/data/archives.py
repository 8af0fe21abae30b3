"""Files of a folder, a zip or a tar archive by name, without unpacking anything."""

import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVES)


def names(path: Path) -> list[str]:
    """Names of the files in a folder or an archive, sorted, relative to it, with `/` between their parts.

    Hidden files, and what operating systems leave beside real ones, do not count.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is neither a folder nor an archive, or a broken archive.
    """
    if path.is_dir():
        found = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    elif not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a folder or an archive ({' '.join(ARCHIVES)})")
    elif not is_archive(path):
        raise ValueError(f"{path} is neither a folder nor an archive ({' '.join(ARCHIVES)})")
    else:
        try:
            if path.suffix.lower() == ".zip":
                with zipfile.ZipFile(path) as archive:
                    found = [member.filename for member in archive.infolist() if not member.is_dir()]
            else:
                with tarfile.open(path) as archive:
                    found = [member.name.removeprefix("./") for member in archive if member.isfile()]
        except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            raise ValueError(f"{path} is a broken archive ({error}); get it again") from error
    return sorted(name for name in found if not _is_clutter(name))


def contents(path: Path, wanted: list[str]) -> Iterator[tuple[str, bytes]]:
    """The named files of a folder or an archive with their bytes, one at a time, in the archive's own order.

    An archive is read once from front to back, for a compressed tar knows no other way.
    """
    if path.is_dir():
        for name in wanted:
            yield name, (path / name).read_bytes()
    elif path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in wanted:
                yield name, archive.read(name)
    else:
        names_wanted = set(wanted)
        with tarfile.open(path) as archive:
            for member in archive:
                if (name := member.name.removeprefix("./")) in names_wanted:
                    yield name, archive.extractfile(member).read()


def _is_clutter(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/")) or name.endswith("Thumbs.db")
