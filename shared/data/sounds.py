"""Recordings with a class each, as WAV files: a folder or archive with one sub-folder a class."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import tensorflow as tf

from shared.data import folders, reading

SUFFIXES = (".wav",)
# Format code (1: integers, 3: floating point) and bits of a sample -> how its bytes become a number in -1 to 1.
FORMATS = {
    (1, 8): lambda data: (tf.cast(tf.io.decode_raw(data, tf.uint8), tf.float32) - 128) / 2**7,
    (1, 16): lambda data: tf.cast(tf.io.decode_raw(data, tf.int16), tf.float32) / 2**15,
    (1, 24): lambda data: tf.cast(_widened(tf.io.decode_raw(data, tf.uint8)), tf.float32) / 2**31,
    (1, 32): lambda data: tf.cast(tf.io.decode_raw(data, tf.int32), tf.float32) / 2**31,
    (3, 32): lambda data: tf.io.decode_raw(data, tf.float32),
    (3, 64): lambda data: tf.cast(tf.io.decode_raw(data, tf.float64), tf.float32),
}
EXTENSIBLE = 0xFFFE  # the format code that says: the code stands further behind
UNKNOWN = 0x7FFF0000  # bytes: who writes to a pipe names such a size or a larger one (sox, ffmpeg), or 0
CHUNKS = 1_000  # in which the samples are looked for; programs write some five


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
        tf.errors.InvalidArgumentError: as of `decode_wav`, or its floating-point samples are no sound.
    """
    channels, found = decode_wav(content)
    wave = tf.reduce_mean(channels, -1)
    sound = tf.reduce_all(tf.abs(wave) <= 2.0**31)  # which NaN is not, either
    tf.debugging.Assert(sound, ["the WAV file holds NaN, infinite or very large numbers"])
    span = tf.cast(tf.round(samples * tf.cast(found, tf.float64) / rate), tf.int32)
    return resample(loudest(wave, span), samples)


def decode_wav(content: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Samples [sample, channel], float32 in -1 to 1, and the sample rate in Hz, int64, of one WAV file.

    `tf.audio.decode_wav` reads 16-bit samples behind the plainest header alone; this reads what other programs write.
    A file is a row of chunks, each with a name, a size, and a byte more where the size is odd (IBM & Microsoft 1991).

    Raises:
        tf.errors.InvalidArgumentError: the bytes are no WAV file with samples as in `FORMATS`, or a truncated or
            an empty one, or its sample rate is none that a recorder has.
    """
    length = tf.cast(tf.strings.length(content), tf.int64)  # in bytes, as all below
    riff, of_file, wave = (tf.strings.substr(content, tf.minimum(length, place), 4) for place in (0, 4, 8))

    def more(end, name, size, form):
        return (end + 8 <= length) & (name != b"data")

    def chunk(end, name, size, form):
        name, size = tf.strings.substr(content, end, 4), _size(tf.strings.substr(content, end + 4, 4))
        start = end + 8
        end = tf.where(name == b"data", start, start + size + size % 2)
        return end, name, size, tf.where(name == b"fmt ", tf.strings.substr(content, start, 26), form)

    nothing = tf.constant(12, tf.int64), tf.constant(b""), tf.constant(0, tf.int64), tf.constant(b"")
    start, name, size, form = tf.while_loop(more, chunk, nothing, maximum_iterations=CHUNKS)
    there = tf.maximum(length - start, 0)
    # The size of an honestly empty recording is 0 too, but then the file's, which stands behind RIFF, is right.
    streamed = (size >= UNKNOWN) | ((size == 0) & (_size(of_file) + 8 != length))
    size = tf.where(streamed, there, size)
    words = _words(form, 13)
    code, channels, rate, align, bits = words[0], words[1], words[2] + 2**16 * words[3], words[6], words[7]
    code = tf.where(code == EXTENSIBLE, words[12], code)
    known = tf.reduce_all(tf.constant(list(FORMATS), tf.int64) == tf.stack([code, bits]), -1)
    told = tf.strings.format
    faults = [
        (length < 12, "too short for a WAV file"),
        ((riff != b"RIFF") | (wave != b"WAVE"), "Expected RIFF and WAVE at the beginning of a WAV file"),
        (name != b"data", "too short, or no data chunk is in it"),
        (~tf.reduce_any(known), told("Expected integers (format 1) of 8, 16, 24 or 32 bits or floating point (format "
                                     "3) of 32 or 64, the WAV file has format {} of {} bits", (code, bits))),
        ((align < 1) | (8 * align != channels * bits),
         told("Expected another size of samples than {} bytes for {} channels of {} bits", (align, channels, bits))),
        ((rate < 1_000) | (rate > 384_000), told("expected 1 to 384 kHz, the WAV file has {} Hz", rate)),
        (size > there, told("Data too short: expected {} bytes of samples, the WAV file has {}", (size, there))),
        (size < align, "the WAV file holds no samples"),
        (True, ""),
    ]  # fmt: skip
    conditions, texts = (tf.stack(part) for part in zip(*faults, strict=True))
    fault = texts[tf.argmax(conditions)]  # the first
    fine = tf.debugging.Assert(fault == b"", [fault])
    with tf.control_dependencies([] if fine is None else [fine]):
        data = tf.strings.substr(content, start, size // align * align)
    decoders = [functools.partial(decoder, data) for decoder in FORMATS.values()]
    samples = tf.switch_case(tf.argmax(known, output_type=tf.int32), decoders)
    return tf.reshape(samples, tf.stack([-1, channels])), rate


def _words(data: tf.Tensor, count: int) -> tf.Tensor:
    """The first unsigned 16-bit numbers [count], int64, of some bytes; zeros where they end."""
    return tf.cast(tf.io.decode_raw(data, tf.uint16, fixed_length=2 * count), tf.int64)


def _size(data: tf.Tensor) -> tf.Tensor:
    low, high = tf.unstack(_words(data, 2))
    return low + 2**16 * high


def _widened(data: tf.Tensor) -> tf.Tensor:
    """Three bytes a number -> int32 [number], with a lowest byte of zero before them."""
    return tf.bitcast(tf.pad(tf.reshape(data, [-1, 3]), [[0, 0], [1, 0]]), tf.int32)


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
