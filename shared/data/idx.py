"""The IDX format of MNIST and its successors: a header of sizes, then the numbers."""

import gzip
from pathlib import Path

import numpy as np

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read(path: Path) -> np.ndarray:
    """The array in an `.idx` or `.idx.gz` file, in its own shape and type (http://yann.lecun.com/exdb/mnist/).

    Raises:
        ValueError: the file is broken, cut short or not IDX; says which.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is broken or cut short ({error}); get it again") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _TYPES:
        raise ValueError(f"{path} is not an IDX file: it begins with {content[:4]!r}")
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    body = np.frombuffer(content, _TYPES[content[2]], offset=4 + 4 * dimensions)
    if body.size != shape.prod():
        raise ValueError(f"{path} is cut short: its header promises {shape.prod():,} numbers, it holds {body.size:,}")
    return body.reshape(shape)
