"""Recordings with a class each, as WAV files: a folder or archive with one sub-folder a class."""

import dataclasses
from pathlib import Path

import numpy as np
import tensorflow as tf

from shared.data import folders, reading

SUFFIXES = (".wav",)


@dataclasses.dataclass(frozen=True)
class Recordings:
    """Waveforms of one length with their labels, and what could not be read."""

    waves: np.ndarray  # float32 [recording, sample] in -1 to 1
    labels: np.ndarray  # int64 [recording]
    splits: np.ndarray  # [recording], "train", "validation", "test", or "" where the data names none
    files: tuple[str, ...]  # where each comes from
    names: tuple[str, ...]  # classes
    unreadable: tuple[str, ...]  # "path: reason"


def decode(content: tf.Tensor, *, samples: int, rate: int) -> tf.Tensor:
    """The loudest `samples` of one WAV file at `rate` Hz, channels mixed, in the middle of zeros where it is shorter.

    Plain TensorFlow operations, so that a served graph can hold it.

    Raises:
        tf.errors.InvalidArgumentError: the bytes are no WAV file of 16-bit PCM, a truncated or an empty one, or one
            with a sample rate that no recorder has.
    """
    sound, found = tf.audio.decode_wav(content)  # [sample, channel]
    checks = [
        tf.debugging.assert_positive(tf.size(sound), "the WAV file holds no samples"),
        tf.debugging.Assert((found >= 1_000) & (found <= 384_000), ["expected 1 to 384 kHz, the WAV file has", found]),
    ]
    with tf.control_dependencies([check for check in checks if check is not None]):
        wave = tf.reduce_mean(sound, -1)
    span = tf.cast(tf.round(samples * tf.cast(found, tf.float64) / rate), tf.int32)
    return resample(loudest(wave, span), samples)


def loudest(wave: tf.Tensor, span: tf.Tensor) -> tf.Tensor:
    """The stretch of `span` samples with the most energy, [span]; a shorter wave stands in the middle of zeros."""
    missing = tf.maximum(span - tf.size(wave), 0)
    wave = tf.pad(wave, [[missing // 2, missing - missing // 2]])
    energy = tf.pad(tf.cumsum(tf.square(tf.cast(wave, tf.float64))), [[1, 0]])
    start = tf.argmax(energy[span:] - energy[:-span], output_type=tf.int32)
    return wave[start : start + span]


def resample(wave: tf.Tensor, samples: int) -> tf.Tensor:
    """A wave [any] in `samples` samples, by cutting or padding its Fourier transform, as `scipy.signal.resample`."""
    bins = samples // 2 + 1
    spectrum = tf.signal.rfft(wave)[:bins]
    spectrum = tf.pad(spectrum, [[0, bins - tf.size(spectrum)]])
    scale = samples / tf.size(wave)
    return tf.ensure_shape(tf.signal.irfft(spectrum, [samples]) * tf.cast(scale, tf.float32), [samples])


def decode_batch(contents: tf.Tensor, *, samples: int, rate: int) -> tf.Tensor:
    """WAV files [batch], string -> waveforms [batch, samples]. For training and serving."""
    return tf.map_fn(
        lambda content: decode(content, samples=samples, rate=rate),
        contents,
        fn_output_signature=tf.TensorSpec([samples], tf.float32),
    )


def encode(wave: np.ndarray, rate: int) -> bytes:
    """A 16-bit WAV file of a waveform [sample] in -1 to 1."""
    return tf.audio.encode_wav(tf.constant(wave, tf.float32)[:, None], rate).numpy()


def read(path: Path, *, samples: int, rate: int, on_error: str) -> Recordings:
    """Decode all recordings below a path.

    Args:
        path: folder, zip or tar with one sub-folder a class.
        samples, rate: length and sample rate to bring them to.
        on_error: "fail" ends with the list of what cannot be read, "skip" leaves it out.

    Raises:
        FileNotFoundError, ValueError: nothing is there, no classes, one class only, an empty class, unreadable files.
    """
    return take(
        path,
        folders.classes(path, kind="recordings", suffixes=SUFFIXES),
        samples=samples,
        rate=rate,
        on_error=on_error,
    )


def take(path: Path, files: dict[str, tuple[str, str]], *, samples: int, rate: int, on_error: str) -> Recordings:
    """Decode the named files below a path: name -> (class, split); arguments, errors as of `read`."""
    names = sorted({label for label, _ in files.values()})
    if len(names) < 2:
        raise ValueError(f"{path} holds one class only ({', '.join(names)}); a classifier needs two or more")
    waves = {}

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
    def decoder(content):
        return decode(content, samples=samples, rate=rate)

    def put(name: str, content: bytes) -> None:
        waves[name] = decoder(content).numpy()

    kept, bad = reading.take(path, files, put, what="recording", suffixes=SUFFIXES, on_error=on_error)
    empty = set(names) - {files[name][0] for name in kept}
    if empty:
        raise ValueError(f"class {', '.join(sorted(empty))} below {path} is empty: no readable recording is in it")
    return Recordings(
        waves=np.stack([waves[name] for name in kept]),
        labels=np.array([names.index(files[name][0]) for name in kept]),
        splits=np.array([files[name][1] for name in kept]),
        files=tuple(kept),
        names=tuple(names),
        unreadable=tuple(bad),
    )
