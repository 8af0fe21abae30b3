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


def chunk(name, content, size=None):
    told = len(content) if size is None else size
    return name + struct.pack("<I", told) + content + b"\0" * (len(content) % 2)


def packed(samples, *, rate=8_000, code=1, bits=16, channels=1, extensible=False, before=b"", after=b"", **size):
    """A WAV file from its bytes, of any kind."""
    align = channels * bits // 8
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else code, channels, rate, rate * align, align, bits)
    if extensible:  # as Microsoft's "Multiple channel audio data and WAVE files" has it
        form += struct.pack("<HHIH", 22, bits, 0, code) + bytes.fromhex("000000001000800000aa00389b71")
    chunks = before + chunk(b"fmt ", form) + chunk(b"data", samples, **size) + after
    return b"RIFF" + struct.pack("<I", size.get("size", 4 + len(chunks))) + b"WAVE" + chunks


SAMPLES = np.random.default_rng(1).uniform(-1, 1, (801, 3))  # [sample, channel]
SCALED = np.round(SAMPLES * (2**31 - 1)).astype("<i4")
BYTES = SCALED.view(np.uint8).reshape(801, 3, 4)
WRITTEN = {  # bytes of samples by format code and bits, and the numbers that they mean
    (1, 8): (BYTES[..., 3] ^ 0x80, (SCALED >> 24) / 2**7),
    (1, 16): (BYTES[..., 2:], (SCALED >> 16) / 2**15),
    (1, 24): (BYTES[..., 1:], (SCALED >> 8) / 2**23),
    (1, 32): (BYTES, SCALED / 2**31),
    (3, 32): (SAMPLES.astype("<f4"), SAMPLES),
    (3, 64): (SAMPLES.astype("<f8"), SAMPLES),
}


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("form", WRITTEN)
def test_samples_of_every_format(form, extensible):
    code, bits = form
    content, expected = WRITTEN[form]
    for channels in (1, 3):
        file = packed(content[:, :channels].tobytes(), code=code, bits=bits, channels=channels, extensible=extensible)
        found, rate = sounds.decode_wav(tf.constant(file))
        assert rate == 8_000
        np.testing.assert_array_equal(found, expected[:, :channels].astype(np.float32))
        if form == (1, 16) and not extensible:
            np.testing.assert_array_equal(found, tf.audio.decode_wav(file)[0])


@pytest.mark.parametrize("kind", ["u1", "<i2", "<i4", "<f4", "<f8"])
def test_files_of_scipy(kind):
    content, expected = WRITTEN[3 if "f" in kind else 1, 8 * np.dtype(kind).itemsize]
    file = io.BytesIO()
    wavfile.write(file, 44_100, np.ascontiguousarray(content).view(kind).reshape(801, 3))
    found, rate = sounds.decode_wav(tf.constant(file.getvalue()))
    assert rate == 44_100
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_files_of_python(width):
    content, expected = WRITTEN[1, 8 * width]
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((3, width, 44_100, 0, "NONE", ""))
        writer.writeframes(content.tobytes())
    np.testing.assert_array_equal(sounds.decode_wav(tf.constant(file.getvalue()))[0], expected.astype(np.float32))


SOUND = WRITTEN[1, 16][0][:, :1].tobytes()
NOTE = chunk(b"LIST", b"odd")
HIDDEN = chunk(b"JUNK", b"data" + struct.pack("<I", 2))  # what looks like samples


@pytest.mark.parametrize(
    "content",
    [
        packed(SOUND, before=NOTE),
        packed(SOUND, before=HIDDEN + NOTE * 3, after=NOTE),
        packed(SOUND, after=NOTE * 2),
        packed(SOUND + b"\1"),  # half a sample at the end
        *(packed(SOUND, before=NOTE, size=size) for size in (0, 0x7FFFF000, 0x80000000, 0xFFFFFFFF)),  # to a pipe
        packed(SOUND + b"\1", size=0xFFFFFFFF)[:-1],  # broken off within a sample
    ],
)
def test_chunks_of_every_kind(content):
    found, _ = tf.function(sounds.decode_wav)(tf.constant(content))
    np.testing.assert_array_equal(found, WRITTEN[1, 16][1][:, :1].astype(np.float32))


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
        (WHOLE[:46], "Data too short: expected 1600 bytes of samples, the WAV file has 2"),
        (WHOLE[:36] + NOTE, "no data chunk"),
        (packed(b"\0\0", before=chunk(b"", b"") * 2_000), "no data chunk"),
        (WHOLE[:12] + WHOLE[36:], "Expected integers .* has format 0 of 0 bits"),
        (packed(b"\x80" * 100, code=7, bits=8), "Expected integers .* has format 7 of 8 bits"),
        (packed(b"\x80" * 100, code=7, bits=8, extensible=True), "has format 7 of 8 bits"),
        (packed(b"\x80" * 100, bits=12), "has format 1 of 12 bits"),
        (packed(b"\x80" * 100, code=3, bits=16), "has format 3 of 16 bits"),
        (WHOLE[:32] + b"\4" + WHOLE[33:], "size of samples than 4 bytes for 1 channels of 16 bits"),
        (packed(b"", channels=0), "size of samples than 0 bytes for 0 channels of 16 bits"),
        (packed(np.full(9, np.nan, "<f4").tobytes(), code=3, bits=32), "NaN, infinite or very large"),
        (packed(np.full(9, 1e300).tobytes(), code=3, bits=64), "NaN, infinite or very large"),
        (packed(b""), "the WAV file holds no samples"),
        (packed(b"", after=NOTE), "the WAV file holds no samples"),
        (packed(b"", size=0xFFFFFFFF), "the WAV file holds no samples"),
        (packed(b"\0"), "the WAV file holds no samples"),
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
