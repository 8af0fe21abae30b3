"""Recordings: what is read, how it is brought to one form, what is refused."""

import io
import struct
import tarfile
import wave

import numpy as np
import pytest
import scipy.signal
import tensorflow as tf
from scipy.io import wavfile

from shared.data import sounds

FORM = {"samples": 800, "rate": 8_000}


def tone(rate, seconds, pitch=440.0):
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate)


def packed(samples, *, rate=8_000, code=1, bits=16, channels=1):
    """A WAV file from its bytes, of any kind."""
    align = channels * bits // 8
    form = struct.pack("<HHIIHH", code, channels, rate, rate * align, align, bits)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def test_files_of_other_programs():
    sound = np.round(tone(8_000, 0.1) * 32767).astype("<i2")
    by_scipy, by_python = io.BytesIO(), io.BytesIO()
    wavfile.write(by_scipy, 8_000, sound)
    with wave.open(by_python, "wb") as file:
        file.setparams((1, 2, 8_000, 0, "NONE", ""))
        file.writeframes(sound.tobytes())
    for content in (by_scipy.getvalue(), by_python.getvalue(), sounds.encode(sound / 32768, 8_000)):
        np.testing.assert_allclose(sounds.decode(content, **FORM), sound / 32768, atol=1e-4)


@pytest.mark.parametrize("rate", [4_000, 8_000, 11_025, 44_100, 48_000])
def test_any_rate_sounds_alike(rate):
    content = packed((tone(rate, 1.0) * 32767).astype("<i2").tobytes(), rate=rate)
    found = sounds.decode(content, samples=8_000, rate=8_000).numpy()
    np.testing.assert_allclose(found, tone(8_000, 1.0), atol=1e-3)


def test_resampling_equals_scipy():
    random = np.random.default_rng(1)
    for size in (100, 501, 2_000):
        sound = random.normal(size=size).astype(np.float32)
        found = sounds.resample(tf.constant(sound), 400).numpy()
        # scipy halves or doubles the one bin at the lower Nyquist frequency, which holds no sound of its own.
        np.testing.assert_allclose(found, scipy.signal.resample(sound, 400), atol=0.1)
        smooth = scipy.signal.resample(scipy.signal.resample(sound, 50), size).astype(np.float32)
        np.testing.assert_allclose(
            sounds.resample(tf.constant(smooth), 400), scipy.signal.resample(smooth, 400), atol=1e-4
        )


def test_channels_are_mixed():
    both = np.stack([tone(8_000, 0.1), np.zeros(800)], -1)
    content = packed((both * 32767).astype("<i2").tobytes(), channels=2)
    np.testing.assert_allclose(sounds.decode(content, **FORM), tone(8_000, 0.1) / 2, atol=1e-4)


def test_of_a_long_recording_the_loudest_stretch_is_heard():
    sound = np.concatenate([0.01 * tone(8_000, 60.0), tone(8_000, 0.1), 0.01 * tone(8_000, 1.0)])
    found = sounds.decode(packed((sound * 32767).astype("<i2").tobytes()), **FORM).numpy()
    np.testing.assert_allclose(found, tone(8_000, 0.1), atol=1e-3)


def test_a_short_recording_stands_in_the_middle_of_zeros():
    found = sounds.decode(packed(np.full(100, 16384, "<i2").tobytes()), **FORM).numpy()
    np.testing.assert_allclose(found, np.r_[np.zeros(350), np.full(100, 0.5), np.zeros(350)], atol=1e-4)
    assert sounds.decode(packed(struct.pack("<h", 16384)), **FORM).shape == (800,)


WHOLE = packed((tone(8_000, 0.1) * 32767).astype("<i2").tobytes())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short"),
        (b"not a WAV file, though it is long enough to be one of some kind", "Expected RIFF"),
        (WHOLE[:30], "too short"),
        (WHOLE[:500], "too short"),
        (packed(b"\x80" * 100, bits=8), "Can only read 16-bit WAV files, but received 8"),
        (packed(b"\x80" * 300, bits=24), "Can only read 16-bit WAV files, but received 24"),
        (packed(b"\0" * 400, code=3, bits=32), "Expected 1 .PCM., but got3"),
        (packed(b""), "the WAV file holds no samples"),
        (packed(b"\0\0" * 100, rate=0), "expected 1 to 384 kHz"),
        (packed(b"\0\0" * 100, rate=2_000_000_000), "expected 1 to 384 kHz"),
    ],
)
def test_what_is_refused(content, message):
    decoder = tf.function(lambda one: sounds.decode(one, **FORM), input_signature=[tf.TensorSpec([], tf.string)])
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        decoder(tf.constant(content))


@pytest.fixture
def words(tmp_path):
    """A folder of tones, one sub-folder a pitch."""
    root = tmp_path / "words"
    for word, pitch in {"low": 300, "high": 1_500}.items():
        (root / word).mkdir(parents=True)
        for number in range(4):
            sound = tone(8_000, 0.05 + 0.01 * number, pitch)
            (root / word / f"{number}.wav").write_bytes(packed((sound * 32767).astype("<i2").tobytes()))
    return root


def test_folder_and_archive(words, tmp_path):
    plain = sounds.read(words, **FORM, on_error="fail")
    assert plain.names == ("high", "low")
    assert plain.labels.tolist() == [0] * 4 + [1] * 4
    assert plain.waves.shape == (8, 800)
    assert plain.files[0] == "high/0.wav"
    assert set(plain.splits) == {""}
    with tarfile.open(tmp_path / "words.tar.gz", "w:gz") as archive:
        archive.add(words, "wrapped")
    assert (sounds.read(tmp_path / "words.tar.gz", **FORM, on_error="fail").waves == plain.waves).all()


def test_unreadable_files_are_named_or_left_out(words):
    (words / "low" / "broken.wav").write_bytes(WHOLE[:500])
    (words / "low" / "notes.txt").write_text("no sound")
    with pytest.raises(ValueError, match=r"2 of 10 files .* cannot be read") as caught:
        sounds.read(words, **FORM, on_error="fail")
    assert "low/broken.wav: Data too short" in str(caught.value)
    assert "low/notes.txt: no recording by its ending; expected .wav" in str(caught.value)
    found = sounds.read(words, **FORM, on_error="skip")
    assert len(found.waves) == len(found.labels) == len(found.files) == 8
    assert len(found.unreadable) == 2


def test_folders_that_hold_no_words(words, tmp_path):
    for file in (words / "low").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"class low below .* is empty: no readable recording"):
        sounds.read(words, **FORM, on_error="skip")
    for file in (words / "low").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"class low is empty: no file is below .*; add recordings or remove it"):
        sounds.read(words, **FORM, on_error="fail")
    (words / "low").rmdir()
    with pytest.raises(ValueError, match=r"holds one class only \(high\)"):
        sounds.read(words, **FORM, on_error="fail")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        sounds.read(tmp_path / "nowhere", **FORM, on_error="fail")
