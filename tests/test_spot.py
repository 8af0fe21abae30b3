"""speech.spot as a user meets it: any recording, sounds without speech, speakers held out."""

import dataclasses
import io
import re
import tarfile

import grpc
import numpy as np
import pytest
import scipy.signal
import tensorflow as tf
from scipy.io import wavfile

from apps.speech import spot
from shared.data import named, sounds
from shared.serving.client import Client, ServerError

QUIET = spot.Config(shift=0.0, speed=0.0, pitch=0.0, tilt=0.0, noise=0.0, masks=0)


def word(name, random, rate=8_000):
    """A rising or a falling chirp."""
    time = np.arange(round(rate * random.uniform(0.3, 0.6))) / rate
    low, high = random.uniform(300, 600), random.uniform(1_500, 2_500)
    first, last = (low, high) if name == "up" else (high, low)
    sound = scipy.signal.chirp(time, first, time[-1], last) * random.uniform(0.1, 0.9)
    return np.clip(sound + 0.01 * random.normal(size=len(time)), -1, 1)


@pytest.fixture
def words(tmp_path):
    random = np.random.default_rng(1)
    for name in ("up", "down"):
        (tmp_path / "words" / name).mkdir(parents=True)
        for number in range(40):
            content = sounds.encode(word(name, random), 8_000)
            (tmp_path / "words" / name / f"{number}.wav").write_bytes(content)
    return tmp_path / "words"


def packed(samples, rate=8_000, form="<i2"):
    """A WAV file as SciPy writes it."""
    file = io.BytesIO()
    wavfile.write(file, rate, (samples * 32767).astype(form) if form == "<i2" else samples.astype(form))
    return file.getvalue()


def test_folder_to_served_answer_on_recordings_of_other_programs(words, cornucopia, serving, tmp_path):
    flags = (f"--data={words}", "--width=8", "--batch=16", "--epochs=8", "--pitch=0.05")
    done = cornucopia("train", "speech.spot", *flags)
    assert "audit      train 66  validation 6  test 8  in 2 classes" in done.stdout
    assert re.search(r"\n +accuracy +1\.0000", done.stdout)  # up and down are easy to tell apart

    with serving() as address:
        with Client(address) as client:

            def ask(*contents):
                return client.predict("speech.spot", {"audio": np.array(contents, object)})

            random = np.random.default_rng(7)
            for name in ("up", "down"):
                sound = word(name, random, rate=48_000)
                long = np.concatenate([np.zeros(100_000), sound, np.zeros(200_000)])
                files = [packed(samples, 48_000) for samples in (sound, np.stack([sound, sound / 2], -1), long)]
                answer = ask(*files, packed(sound, 48_000, form="<f4"))
                assert answer["label"].tolist() == [name.encode()] * 4
                assert (answer["score"] > 0.5).all()
            silence, noise = packed(np.zeros(8_000)), packed(0.1 * random.normal(size=8_000))
            answer = ask(silence, noise, packed(np.zeros(1)))
            assert (answer["score"] < 0.5).all(), answer
            law = noise[:20] + b"\7" + noise[21:]  # the format code of mu-law
            for content, message in {law: "has format 7 of 16 bits", noise[:1_000]: "Data too short"}.items():
                with pytest.raises(ServerError, match=message) as refused:
                    ask(silence, content)
                assert refused.value.code == grpc.StatusCode.INVALID_ARGUMENT
        (tmp_path / "noise.wav").write_bytes(noise)
        answer = cornucopia("ask", "speech.spot", "--audio=noise.wav", f"--address={address}").stdout
        assert re.search(r"^score +0\.[0-4]", answer, re.MULTILINE)

    done = cornucopia("evaluate", "speech.spot", f"--data={words}")
    assert "all of it" in done.stdout
    assert re.search(r"accuracy +1\.0000", done.stdout)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data=nowhere"], "nowhere does not exist; expected a folder or an archive"),
        (["--data=fashion-mnist"], "fashion-mnist holds no words to spot; expected fsdd, or a path to WAV files"),
        (["--speaker=george"], "george cannot be held out: only fsdd tells speakers apart"),
    ],
)
def test_bad_input_ends_in_advice(cornucopia, flags, message):
    done = cornucopia("train", "speech.spot", *flags, expect=2)
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_a_held_out_speaker_is_in_the_test_alone():
    speakers = np.repeat(["ann", "bob", "cy"], 20)
    takes = np.tile(np.arange(20), 3)
    rows, protocol = spot._speakers("bob", speakers, takes)
    assert set(speakers[rows["test"]]) == {"bob"}
    assert len(rows["test"]) == 20
    assert set(speakers[rows["train"]]) == set(speakers[rows["validation"]]) == {"ann", "cy"}
    assert protocol == "all of bob, who is not heard in training"
    official, _ = spot._speakers("", speakers, takes)
    assert set(takes[official["test"]]) == set(range(5))
    for found in (rows, official):
        assert sorted(np.concatenate(list(found.values()))) == list(range(60))
    with pytest.raises(ValueError, match="no speaker dan in the data; one of ann, bob, cy, or each"):
        spot._speakers("dan", speakers, takes)


def test_folds_are_the_speakers_of_the_file_names(tmp_path, monkeypatch):
    random = np.random.default_rng(1)
    with tarfile.open(tmp_path / "digits.tar.gz", "w:gz") as archive:
        for name in ("1_ann_0", "1_bob_7", "2_ann_12", "2_bob_3"):
            content = sounds.encode(word("up", random), 8_000)
            member = tarfile.TarInfo(f"recordings/{name}.wav")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(named, "find", lambda name: {"digits.tar.gz": tmp_path / "digits.tar.gz"})
    spot._digits.cache_clear()
    config = spot.Config(data="fsdd")
    try:
        recordings, speakers, takes = spot._digits(**spot._form(config))
        assert recordings.names == ("1", "2")
        found = sorted(zip(recordings.labels.tolist(), speakers.tolist(), takes.tolist(), strict=True))
        assert found == [(0, "ann", 0), (0, "bob", 7), (1, "ann", 12), (1, "bob", 3)]
        assert {name: fold.speaker for name, fold in spot.folds(config).configs.items()} == {"ann": "ann", "bob": "bob"}
    finally:
        spot._digits.cache_clear()
    assert spot.folds(dataclasses.replace(config, speaker="ann")) is None
    assert spot.folds(spot.Config()) is None


def test_loudness_does_not_matter_but_silence_does():
    waves = tf.constant(np.stack([word("up", np.random.default_rng(1))[:2_400]] * 2) * [[1.0], [0.05]], tf.float32)
    loud, quiet = spot.log_mel(QUIET, spot.power(QUIET, waves))
    np.testing.assert_allclose(loud, quiet, atol=1e-3)
    assert loud.shape == (27, 40, 1)
    silence = spot.log_mel(QUIET, spot.power(QUIET, tf.zeros([1, 2_400])))
    np.testing.assert_allclose(silence, np.log(spot.FLOOR), atol=1e-4)


def test_augmentation_of_nothing_changes_nothing():
    waves = tf.constant(np.random.default_rng(1).normal(size=(4, 8_000)), tf.float32)
    spectrum = spot.power(QUIET, waves)
    dice = spot.Dice(1, 5)
    np.testing.assert_array_equal(spot._noised(QUIET, waves, waves[::-1], dice), waves)
    np.testing.assert_allclose(spot._warped(QUIET, spectrum, dice), spectrum, rtol=1e-4)
    bands = spot.log_mel(QUIET, spectrum)
    np.testing.assert_array_equal(spot._masked(QUIET, bands, dice), bands)


def test_pitch_and_speed_move_what_they_say():
    time = np.arange(8_000) / 8_000
    wave = np.where((time > 0.4) & (time < 0.6), np.sin(2 * np.pi * 1_000 * time), 0).astype(np.float32)
    spectrum = spot.power(QUIET, tf.constant(np.stack([wave] * 64)))
    config = dataclasses.replace(QUIET, pitch=0.3)
    peaks = np.argmax(np.sum(spot._warped(config, spectrum, spot.Dice(1, 1)), 1), -1) * 8_000 / 256
    assert 700 < peaks.min() < 850
    assert 1_200 < peaks.max() < 1_400
    config = dataclasses.replace(QUIET, speed=0.3)
    loud = np.sum(spot._warped(config, spectrum, spot.Dice(1, 1)), -1)  # [recording, frame]
    lengths = (loud > loud.max() / 4).sum(-1)
    steady = (np.sum(spectrum, -1)[0] > loud.max() / 4).sum()
    assert lengths.min() < 0.85 * steady < 1.15 * steady < lengths.max()


def test_the_stream_is_a_function_of_the_step():
    splits = spot.load(spot.SMOKE)
    first, again, other = (next(iter(splits.stream(step))) for step in (5, 5, 6))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
    assert first[0].shape == (72, 97, 40, 1)
    assert np.isfinite(first[0]).all()
    assert np.sum(first[1][:, -1]) == 8  # an eighth as many sounds hold no speech


def test_training_and_serving_hear_the_same():
    splits = spot.load(spot.SMOKE)
    (heard, _) = next(iter(splits.test))
    np.testing.assert_allclose(splits.preprocess(splits.request["audio"]), heard[:8], atol=0.05)
    assert splits.preprocess(tf.constant([], tf.string)).shape == (0, 97, 40, 1)


@pytest.mark.parametrize("make", [lambda n: spot.no_speech(spot.Dice(1, 0), n, 8_000, 8_000).numpy(),
                                  lambda n: spot.unseen_kinds(n, 8_000, 8_000)])  # fmt: skip
def test_sounds_without_speech(make):
    made = make(60)
    assert made.shape == (60, 8_000)
    assert np.isfinite(made).all()
    assert np.abs(made).max() <= 1
    assert len({wave.tobytes() for wave in made}) > 50  # silence is silence
