"""Pictures with a class each: a folder or archive with one sub-folder a class, or a table of files and labels.

Where the upper folders are splits, `train` and `test` or `validation` (`val`), they are taken so; what they leave out
is drawn by the seed, with every class in each part.
"""

import dataclasses
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tensorflow as tf

from shared.data import archives, folders, reading, tables

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")  # what tf.io.decode_image reads
IN_MEMORY = 1 << 30  # bytes of decoded pictures that stay in memory; more go to a file that is mapped


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Decoded pictures of one size with their labels, and what could not be read."""

    pixels: np.ndarray  # uint8 [picture, height, width, channel]
    labels: np.ndarray  # int64 [picture]
    splits: np.ndarray  # [picture], "train", "validation", "test", or "" where the data names none
    names: tuple[str, ...]  # classes
    unreadable: tuple[str, ...]  # "path: reason"


def decode(content: tf.Tensor, *, channels: int) -> tf.Tensor:
    """Pixels of one encoded PNG, JPEG, BMP or GIF picture (of a GIF the first frame): uint8 [height, width, channel].

    Raises:
        tf.errors.InvalidArgumentError: the bytes are no picture, or a damaged one.
    """
    pixels = tf.io.decode_image(content, channels=channels, expand_animations=False)
    return tf.ensure_shape(pixels, [None, None, channels or None])


def resize(pixels: tf.Tensor, *, size: int) -> tf.Tensor:
    """Pictures [..., height, width, channel] squeezed to a square of `size` pixels, in uint8."""
    smaller = tf.image.resize(pixels, [size, size], antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(smaller), 0, 255), tf.uint8)


def decode_batch(contents: tf.Tensor, *, size: int, channels: int) -> tf.Tensor:
    """Encoded pictures [batch], string -> pixels [batch, size, size, channel], uint8. For training and serving."""
    return tf.map_fn(
        lambda content: resize(decode(content, channels=channels), size=size),
        contents,
        fn_output_signature=tf.TensorSpec([size, size, channels], tf.uint8),
    )


def read(path: Path, *, size: int, channels: int, on_error: str) -> Pictures:
    """Decode all pictures below a path.

    Args:
        path: folder, zip or tar with one sub-folder a class; or a CSV/TSV file with columns `image`, `label` and
            perhaps `split`.
        size: side in pixels; 0: the middle one of the first pictures' shorter sides, within 16 to 96.
        channels: 1 or 3; 0: as the first pictures have.
        on_error: "fail" ends with the list of what cannot be read, "skip" leaves it out.

    Raises:
        FileNotFoundError, ValueError: nothing is there, no classes, one class only, an empty class, unreadable files.
    """
    if path.suffix.lower() in (".csv", ".tsv") and path.is_file():
        root, files = _listed(path)
    else:
        root, files = path, folders.classes(path, kind="pictures", suffixes=SUFFIXES)
    names = sorted({label for label, _ in files.values()})
    if len(names) < 2:
        raise ValueError(f"{path} holds one class only ({names[0]}); a classifier needs two or more")
    wanted = [name for name in files if name.lower().endswith(SUFFIXES)]
    size, channels = _measure(archives.contents(root, wanted, broken={}), size=size, channels=channels)
    pixels = _room(len(wanted), size, channels)
    rows = {name: row for row, name in enumerate(wanted)}

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
    def decoder(content):
        return resize(decode(content, channels=channels), size=size)

    def put(name: str, content: bytes) -> None:
        pixels[rows[name]] = decoder(content).numpy()

    kept, bad = reading.take(root, files, put, what="picture", suffixes=SUFFIXES, on_error=on_error)
    empty = set(names) - {files[name][0] for name in kept}
    if empty:
        raise ValueError(f"class {', '.join(sorted(empty))} below {path} is empty: no readable picture is in it")
    return Pictures(
        pixels=pixels if len(kept) == len(wanted) else pixels[[rows[name] for name in kept]],
        labels=np.array([names.index(files[name][0]) for name in kept]),
        splits=np.array([files[name][1] for name in kept]),
        names=tuple(names),
        unreadable=tuple(bad),
    )


def _listed(path: Path) -> tuple[Path, dict[str, tuple[str, str]]]:
    """Folder of a table of pictures, and file name -> (class, split)."""
    rows = tables.labelled(path, "image")
    missing = [row[0] for row in rows if not (path.parent / row[0]).is_file()]
    if missing:
        raise FileNotFoundError(f"{path} lists {missing[0]}, which is not in {path.parent} ({len(missing)} missing)")
    if not rows:
        raise ValueError(f"{path} lists no picture")
    return path.parent, {name: (label, split) for name, label, split in rows}


def _measure(contents: Iterable[tuple[str, bytes]], *, size: int, channels: int) -> tuple[int, int]:
    """Size and channels, where they are not given, from the first hundred readable pictures."""
    if size and channels:
        return size, channels
    shapes = []
    for _, content in contents:
        try:
            shapes.append(tf.io.decode_image(content, expand_animations=False).shape)
        except tf.errors.InvalidArgumentError:
            continue  # `read` names it
        if len(shapes) == 100:
            break
    sides = [min(shape[:2]) for shape in shapes] or [16]
    colour = any(shape[2] >= 3 for shape in shapes)
    return size or int(np.clip(np.median(sides), 16, 96)), channels or (3 if colour else 1)


def _room(count: int, size: int, channels: int) -> np.ndarray:
    """Space for pictures: in memory, or mapped from a file that vanishes with the process."""
    shape = (count, size, size, channels)
    if np.prod(shape, dtype=np.int64) <= IN_MEMORY:
        return np.zeros(shape, np.uint8)
    with tempfile.TemporaryFile(prefix="cornucopia-pixels-") as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)
