"""TFRecord files without TensorFlow."""

from collections.abc import Iterator
from pathlib import Path


def records(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: length in 8 bytes, its checksum in 4, the record, its checksum in 4.

    Raises:
        ValueError: the file ends within a record.
    """
    with path.open("rb") as file:
        while head := file.read(12):
            length = int.from_bytes(head[:8], "little")
            body = file.read(length + 4)
            if len(head) < 12 or len(body) < length + 4:
                raise ValueError(f"{path} ends within a record; export the model anew")
            yield body[:length]
