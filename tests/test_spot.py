"""speech.spot as a user meets it: any recording, sounds without speech, speakers held out."""

import dataclasses
import io
import os
import re
import tarfile
from pathlib import Path

import grpc
import numpy as np
import pytest
import tensorflow as tf
from conftest import word
from scipy.io import wavfile

from apps.speech import spot
from shared.data import named, sounds
from shared.serving.client import Client, ServerError

QUIET = spot.Config(shift=0.0, speed=0.0, pitch=0.0, tilt=0.0, noise=0.0, masks=0)


def packed(samples, rate=8_000, form="<i2"):
    """A WAV file as SciPy writes it."""
    file = io.BytesIO()
    wavfile.write(file, rate, (samples * 32767).astype(form) if form == "<i2" else samples.astype(form))
    return file.getvalue()


def test_folder_to_served_answer_on_recordings_of_other_programs(words, cornucopia, forked, serving, tmp_path):
    flags = (f"--data={words}", "--width=8", "--batch=16", "--epochs=8", "--pitch=0.05")
    done = forked("train", "speech.spot", *flags)
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

    done = forked("evaluate", "speech.spot", f"--data={words.rename(tmp_path / 'other')}")
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
def test_bad_input_ends_in_advice(mistaken, flags, message):
    assert message in mistaken("train", "speech.spot", *flags).err.replace("\n", " ")


def test_a_held_out_speaker_is_in_the_test_alone():
    speakers = np.repeat(["ann", "bob", "cy"], 20)
    takes = np.tile(np.arange(20), 3)
    splits, protocol = spot._speakers("bob", speakers, takes)
    assert set(speakers[splits == "test"]) == {"bob"}
    assert (splits == "test").sum() == 20
    assert set(speakers[splits == "train"]) == set(speakers[splits == "validation"]) == {"ann", "cy"}
    assert protocol == "all of bob, who is not heard in training"
    official, _ = spot._speakers("", speakers, takes)
    assert set(takes[official == "test"]) == set(range(5))
    assert {*splits, *official} == {"train", "validation", "test"}
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


@pytest.mark.skipif(not Path(os.environ.get("CORNUCOPIA_DATA", "/nowhere")).is_dir(), reason="no public data here")
def test_spoken_digits_have_their_published_sizes():
    config = spot.Config(data="fsdd")
    recordings, speakers, takes = spot._digits(**spot._form(config))
    assert recordings.waves.shape == (3_000, 8_000)
    assert recordings.names == tuple("0123456789")
    of_each = {(label, speaker) for label in range(10) for speaker in np.unique(speakers)}
    assert len(of_each) == 60
    for label, speaker in of_each:
        assert sorted(takes[(recordings.labels == label) & (speakers == speaker)]) == list(range(50))
    splits, _ = spot._speakers("", speakers, takes)
    assert ((splits != "test").sum(), (splits == "test").sum()) == (2_700, 300)


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


def test_shift_moves_by_at_most_what_it_says():
    time = np.arange(8_000) / 8_000
    wave = np.where((time > 0.4) & (time < 0.6), np.sin(2 * np.pi * 1_000 * time), 0).astype(np.float32)
    spectrum = spot.power(QUIET, tf.constant(np.stack([wave] * 256)))
    config = dataclasses.replace(QUIET, shift=0.1)
    moved = np.sum(spot._warped(config, spectrum, spot.Dice(1, 1)), -1)  # [recording, frame], 10 ms apart
    frames = np.arange(moved.shape[1])
    still = np.sum(spectrum, -1)[0] @ frames / np.sum(spectrum, -1)[0].sum()
    seconds = (moved @ frames / moved.sum(-1) - still) / 100
    assert -0.1 <= seconds.min() < -0.09
    assert 0.09 < seconds.max() <= 0.1
    assert abs(seconds.mean()) < 0.015  # 4.2 standard errors


def test_noise_lies_below_the_voice_as_far_as_it_says():
    random = np.random.default_rng(1)
    voices, others = (
        (random.uniform(0.01, 1, (1_000, 1)) * random.uniform(-1, 1, (1_000, 400))).astype("f4") for _ in range(2)
    )
    config = dataclasses.replace(QUIET, noise=0.5)
    added = spot._noised(config, voices, others, spot.Dice(1, 1)).numpy() - voices
    noisy = np.abs(added).max(-1) > 0
    assert 0.43 < noisy.mean() < 0.57  # 4.4 standard errors
    added, voices, others = added[noisy], voices[noisy], others[noisy]
    below = 20 * np.log10(np.abs(voices).max(-1) / np.abs(added).max(-1))
    assert 3.9 < below.min() < 5
    assert 39 < below.max() < 40.1
    likeness = np.sum(added * others, -1) / (np.linalg.norm(added, axis=-1) * np.linalg.norm(others, axis=-1))
    np.testing.assert_allclose(likeness, 1, atol=1e-3)  # it is the noise that it was given


def test_masks_blank_with_the_mean_as_much_as_they_say():
    bands = np.random.default_rng(1).normal(size=(500, 97, 40, 1)).astype("f4")
    masked = spot._masked(dataclasses.replace(QUIET, masks=1), bands, spot.Dice(1, 1)).numpy()[..., 0]
    blanked = masked != bands[..., 0]
    times, pitches = blanked.all(2), blanked.all(1)  # [recording, frame], [recording, band]
    np.testing.assert_array_equal(blanked, times[:, :, None] | pitches[:, None])
    np.testing.assert_allclose(masked, np.where(blanked, bands.mean((1, 2))[:, None], bands[..., 0]), atol=1e-5)
    for hidden, most in ((times, 0.15 * 97), (pitches, 0.15 * 40)):
        widths = hidden.sum(-1)
        assert most - 2 < widths.max() <= np.ceil(most)
        assert widths.min() == 0
        assert (np.abs(np.diff(np.pad(hidden, [(0, 0), (1, 1)]).astype(int))).sum(-1) <= 2).all()  # of one piece
        assert hidden[:, 1:].any(0).all()  # anywhere but at the first, for which a start of just 0 must be drawn
    two = spot._masked(dataclasses.replace(QUIET, masks=2), bands, spot.Dice(1, 1)).numpy()[..., 0] != bands[..., 0]
    assert two.all(2).sum() > 1.5 * times.sum()


def test_tilt_colours_all_frames_alike_and_smoothly():
    bands = np.random.default_rng(1).normal(size=(500, 97, 40, 1)).astype("f4")
    coloured = spot._masked(dataclasses.replace(QUIET, tilt=0.5), bands, spot.Dice(1, 1))
    colour = (coloured - bands).numpy()[..., 0]  # [recording, frame, band]
    np.testing.assert_allclose(colour, np.broadcast_to(colour[:, :1], colour.shape), atol=1e-5)
    curve = np.cos(np.pi * np.outer([1, 2, 3], np.arange(40)) / 40)
    weights = colour[:, 0] @ np.linalg.pinv(curve)  # [recording, wave]
    np.testing.assert_allclose(weights @ curve, colour[:, 0], atol=1e-5)
    assert (weights.min(0) >= -0.5001).all()
    assert (weights.max(0) <= 0.5001).all()
    assert (weights.min(0) < -0.45).all()
    assert (weights.max(0) > 0.45).all()


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
