"""Files of a folder, a zip or a tar archive by name, without unpacking anything."""

import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# What a damaged archive or member raises. RuntimeError: it is encrypted, or packed by a method that is not known here.
BROKEN = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, RuntimeError, OSError)


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
                    _at_end(archive)
        except BROKEN as error:
            if _of_the_disk(error):
                raise
            raise ValueError(f"{path} is a broken archive ({error}); get it again") from error
    return sorted(name for name in found if not _is_clutter(name))


def _at_end(archive: tarfile.TarFile) -> None:
    """tarfile.ReadError where the last member that was found is not the last one: tarfile takes damage for the end."""
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("damaged or cut off")
    try:
        while archive.fileobj.read(1 << 20):  # to where a compressed file holds its checksum
            pass
    except gzip.BadGzipFile as error:
        if "Not a gzipped file" not in str(error):  # what stands behind the whole of it is nobody's business
            raise


def _of_the_disk(error: Exception) -> bool:
    """Whether it is an error of the file system; a decompressor's has no number."""
    return getattr(error, "errno", None) is not None


def contents(path: Path, wanted: list[str], *, broken: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    """The named files of a folder or an archive with their bytes, one at a time, in the archive's own order.

    An archive is read once from front to back, for a compressed tar knows no other way. A zip's file that is damaged
    or encrypted goes to `broken`, with the reason.
    """
    if path.is_dir():
        for name in wanted:
            yield name, (path / name).read_bytes()
    elif path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in wanted:
                try:
                    content = archive.read(name)
                except BROKEN as error:
                    if _of_the_disk(error):
                        raise
                    broken[name] = str(error)
                else:
                    yield name, content
    else:
        names_wanted = set(wanted)
        with tarfile.open(path) as archive:
            for member in archive:
                if (name := member.name.removeprefix("./")) in names_wanted:
                    yield name, archive.extractfile(member).read()


def _is_clutter(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/")) or name.endswith("Thumbs.db")
