"""Keyword spotting: say which word a short recording holds.

Data      a folder, zip or tar with one sub-folder of WAV files a word (any PCM, any rate and channels); `fsdd`
Model     a residual network over a log-mel spectrogram, trained against noise as one more class
Endpoint  audio (WAV bytes) -> label, score, the five best labels with their scores; score is low without speech
"""

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import keras
import numpy as np
import tensorflow as tf

from shared import data, metrics, run, training
from shared.answers import ranked
from shared.data import archives, named, sounds
from shared.data.audit import audit
from shared.data.divide import divide, whole
from shared.metrics import classification, speech


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
    ZERO: ClassVar = (*run.Config.ZERO, "masks")
    PART: ClassVar = ("speaker",)
    epochs: int = 20  # passes over the training examples
    batch: int = 64  # recordings in a step; an eighth as many sounds without speech join them
    patience: int = 20  # epochs without a better validation result before training stops
    sample_rate: int = 8_000  # that recordings are brought to, in Hz
    seconds: float = 1.0  # of a recording that the network hears: the loudest
    bins: int = 40  # mel bands
    width: Annotated[int, run.Range(16, 64, step=8)] = 32  # channels of the first stage
    rate: Annotated[float, run.Range(4e-4, 2e-2, log=True)] = 4e-3  # peak learning rate
    decay: Annotated[float, run.Range(2e-3, 0.2, log=True)] = 0.02  # weight decay
    dropout: Annotated[float, run.Range(0.0, 0.6)] = 0.3  # share of features dropped before the last layer
    smoothing: float = 0.1  # share of the target that is spread over all classes
    shift: float = 0.1  # the most that training recordings move, in seconds
    speed: float = 0.2  # the most that training recordings are drawn out or sped up, as a share
    pitch: float = 0.15  # the most that pitch and formants of training recordings move, as a share
    tilt: float = 1.0  # how far the sound colour of training recordings changes, in nepers of power
    noise: float = 0.5  # share of training recordings with noise under the voice, 4 to 40 dB below it
    masks: int = 2  # bands of time and of frequency that are blanked (SpecAugment)
    # Whom the test holds out, where the data tell speakers apart: one by name; each in turn, for the mean over all; or
    # nobody: the official split.
    speaker: str = "each"


SMOKE = Config(epochs=1, width=8)
EXPECT = {"": {"accuracy": 0.85}, "fsdd": {"accuracy": 0.89, "false_alarm_rate": 0.02}}


def load(config: Config) -> data.Splits:
    recordings, about = _read(config)
    rows = divide(recordings.splits, recordings.labels, recordings.names, seed=config.seed, what="recordings")
    return _splits(config, recordings, rows, about, audited=tuple(rows))


def load_other(config: Config, names: Sequence[str]) -> data.Splits:
    """Other recordings, to measure a saved model of the words `names` on."""
    return _splits(config, *whole(*_read(config), names), audited=("test",))


def _splits(config, recordings: sounds.Recordings, rows, about, *, audited: tuple[str, ...]) -> data.Splits:
    names, waves = recordings.names, recordings.waves
    labels = {split: recordings.labels[at] for split, at in rows.items()}
    parts = {split: (waves[rows[split]], labels[split]) for split in audited}
    audit(parts, names, unreadable=recordings.unreadable)
    classes = len(names) + 1  # the last is no speech
    samples = waves.shape[1]
    passes = max(1, 10 * config.batch // len(rows["train"]))  # an epoch of a small set takes some
    sound = data.gather(waves[rows["train"]])
    targets = tf.one_hot(labels["train"], classes)
    nothing = max(1, config.batch // 8)
    bank = no_speech(Dice(config.seed, -3), 1_000, samples, config.sample_rate)

    def read(indices, step):
        dice = Dice(config.seed, step)
        voices = _noised(config, sound(indices), dice.draw(bank, config.batch), dice)
        spectrum = power(config, tf.concat([voices, dice.draw(bank, nothing)], 0))
        wanted = tf.concat([tf.gather(targets, indices), tf.one_hot([classes - 1] * nothing, classes)], 0)
        return _masked(config, log_mel(config, _warped(config, spectrum, dice)), dice), wanted

    def in_order(split, *, others=0):
        heard, truth = waves[rows[split]], labels[split]
        if others:
            made = no_speech(Dice(config.seed, -1), others, samples, config.sample_rate).numpy()
            heard, truth = np.concatenate([heard, made]), np.concatenate([truth, np.full(others, classes - 1)])
        batches = data.in_order(heard, truth, batch=250)
        return batches.map(lambda wave, label: (log_mel(config, power(config, wave)), tf.one_hot(label, classes)))

    def preprocess(contents):
        return log_mel(config, power(config, sounds.decode_batch(contents, samples=samples, rate=config.sample_rate)))

    asked = [sounds.encode(wave, config.sample_rate) for wave in waves[rows["test"][:8]]]
    return data.Splits(
        stream=data.stream(len(rows["train"]), batch=config.batch, seed=config.seed, read=read),
        steps=passes * (len(rows["train"]) // config.batch),
        train=in_order("train"),
        validation=in_order("validation", others=max(1, len(rows["validation"]) // 8)),
        test=in_order("test"),
        preprocess=preprocess,
        names=names,
        request={"audio": np.array(asked, object)},
        about={**about, "protocol": f"{about['protocol']}, {len(rows['test']):,} recordings"},
    )


def _read(config: Config) -> tuple[sounds.Recordings, dict[str, str]]:
    """Recordings, and what the model card says about them."""
    limits = "Of a long recording only the loudest stretch is heard. Other languages, accents and words get one of the "
    limits += "words, often with a high score: only sounds without speech were trained against."
    if config.data == "fsdd":
        recordings, speakers, takes = _digits(**_form(config))
        splits, protocol = _speakers(config.speaker, speakers, takes)
        about = {**named.about("fsdd"), "protocol": protocol, "limits": limits}
        return dataclasses.replace(recordings, splits=splits), about
    if config.data in named.DATASETS:
        raise ValueError(f"{config.data} holds no words to spot; expected fsdd, or a path to WAV files")
    if config.speaker not in ("", "each"):
        raise ValueError(f"{config.speaker} cannot be held out: only fsdd tells speakers apart; leave --speaker out")
    if config.data:
        recordings = sounds.read(Path(config.data), **_form(config))
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_made_up_words(Path(folder))
            recordings = sounds.read(Path(folder), **_form(config))
    own = "test" in recordings.splits
    about = {"data": config.data or "made-up words", "limits": limits,
             "protocol": "its test split" if own else "every tenth as the seed draws them, stratified"}  # fmt: skip
    return recordings, about


def folds(config: Config) -> run.Folds | None:
    """The runs whose mean is the result: one with each speaker held out."""
    if config.speaker != "each" or config.data != "fsdd":
        return None
    speakers = np.unique(_digits(**_form(config))[1]).tolist()
    protocol = f"mean over {len(speakers)} speakers, each heard in the test only: {', '.join(speakers)}"
    return run.Folds({name: dataclasses.replace(config, speaker=name) for name in speakers}, protocol)


def _form(config: Config) -> dict:
    samples = round(config.seconds * config.sample_rate)
    return {"samples": samples, "rate": config.sample_rate, "on_error": config.on_error}


@functools.lru_cache(maxsize=1)
def _digits(**form) -> tuple[sounds.Recordings, np.ndarray, np.ndarray]:
    """The Free Spoken Digit Dataset with the speaker and the take of each recording, from its file name."""
    (archive,) = named.find("fsdd").values()
    parts = {name: Path(name).stem.split("_") for name in archives.names(archive)}  # DIGIT_SPEAKER_TAKE
    recordings = sounds.take(archive, {name: (part[0], "") for name, part in parts.items()}, **form)
    kept = [parts[name] for name in recordings.files]
    return recordings, np.array([part[1] for part in kept]), np.array([int(part[2]) for part in kept])


def _speakers(speaker: str, speakers: np.ndarray, takes: np.ndarray) -> tuple[np.ndarray, str]:
    """The split of each recording, and the protocol's name."""
    if speaker in ("", "each"):
        test, validation = takes < 5, (takes >= 5) & (takes < 10)
        protocol = "official test split (takes 0 to 4)"
    elif speaker in speakers:
        test, validation = speakers == speaker, (speakers != speaker) & (takes < 5)
        protocol = f"all of {speaker}, who is not heard in training"
    else:
        raise ValueError(f"no speaker {speaker} in the data; one of {', '.join(sorted(set(speakers)))}, or each")
    return np.select([test, validation], ["test", "validation"], "train"), protocol


# Parts of the made-up words: the formants of American English vowels in Hz (Peterson & Barney 1952), and a hiss.
SOUNDS = {"ah": (730, 1090, 2440), "ee": (270, 2290, 3010), "oo": (300, 870, 2240), "s": None}
WORDS = {"ah-ee": ("ah", "ee"), "ee-ah": ("ee", "ah"), "oo-ee": ("oo", "ee"), "oo-ah": ("oo", "ah"),
         "s-ah": ("s", "ah"), "ah-s": ("ah", "s")}  # fmt: skip


def write_made_up_words(folder: Path, *, count: int = 60) -> None:
    """Write words that a buzz and resonances imitate (Klatt 1980), by speakers of many sizes, on noisy lines."""
    from scipy.signal import lfilter

    random = np.random.default_rng(1)
    for word, parts in WORDS.items():
        (folder / word).mkdir()
        for number in range(count):
            rate = int(random.choice([8_000, 16_000]))
            samples = int(random.uniform(0.25, 0.5) * rate)
            time = np.arange(samples) / rate
            size = random.uniform(0.8, 1.25)
            pitch = random.uniform(90, 250) * (1 + random.uniform(-0.2, 0.2) * time / time[-1])
            buzz = np.diff(np.floor(np.cumsum(pitch) / rate), prepend=0)
            turn = 1 / (1 + np.exp((time / time[-1] - random.uniform(0.35, 0.65)) * 20))
            sound = np.zeros(samples)
            for part, share in zip(parts, (turn, 1 - turn), strict=True):
                if SOUNDS[part]:
                    heard = buzz
                    for formant in SOUNDS[part]:
                        turned = 2 * np.cos(2 * np.pi * formant * size / rate)
                        damped = np.exp(-np.pi * 90 / rate)  # 90 Hz wide
                        heard = lfilter([1 - damped], [1, -turned * damped, damped**2], heard)
                else:
                    heard = np.diff(random.normal(size=samples), prepend=0)
                sound += share * heard / heard.std()
            word_at = int(random.uniform(0, 0.5) * rate)
            line = np.zeros(word_at + samples + int(random.uniform(0, 0.5) * rate))
            line[word_at : word_at + samples] = np.hanning(samples) ** 0.3 * sound / sound.std()
            line += random.normal(size=len(line)) * 10 ** (-random.uniform(-0.2, 0.8))
            line *= random.uniform(0.02, 0.9) / np.abs(line).max()
            (folder / word / f"{number}.wav").write_bytes(sounds.encode(line, rate))


class Dice:
    """Random numbers that are a function of the seed, the step and the order of the calls alone."""

    def __init__(self, seed: int, step: tf.Tensor | int):
        self.seed, self.step, self.calls = seed, tf.cast(step, tf.int32), 0

    def _next(self) -> tf.Tensor:
        self.calls += 1
        return tf.stack([tf.constant(1_000 * self.seed + self.calls), self.step])

    def uniform(self, shape, low=0.0, high=1.0) -> tf.Tensor:
        return tf.random.stateless_uniform(shape, self._next(), low, high)

    def normal(self, shape) -> tf.Tensor:
        return tf.random.stateless_normal(shape, self._next())

    def draw(self, rows: tf.Tensor, count: int) -> tf.Tensor:
        return tf.gather(rows, tf.cast(self.uniform([count], 0, rows.shape[0]), tf.int32))


FLOOR = 1e-4  # of mel power, about 40 dB below the loudest parts of a word: what is fainter says more of the room


def power(config: Config, waves: tf.Tensor) -> tf.Tensor:
    """Power spectrograms [batch, frame, bin] of waveforms [batch, sample], made equally loud unless nearly silent."""
    peak = tf.reduce_max(tf.abs(waves), -1, keepdims=True)
    frame = round(0.032 * config.sample_rate)
    spectrum = tf.signal.stft(waves / tf.maximum(peak, 0.003), frame, round(0.010 * config.sample_rate))
    return tf.square(tf.abs(spectrum)) / frame


def log_mel(config: Config, power: tf.Tensor) -> tf.Tensor:
    """Power spectrograms -> log-mel spectrograms [batch, frame, band, 1]."""
    top = 0.45 * config.sample_rate  # above it, bands would be empty where the pitch moves up
    bank = tf.signal.linear_to_mel_weight_matrix(config.bins, power.shape[-1], config.sample_rate, 60.0, top)
    return tf.math.log(tf.matmul(power, bank) + FLOOR)[..., None]


def no_speech(dice: Dice, count: int, samples: int, rate: int) -> tf.Tensor:
    """Sounds [count, sample] that hold no word: silence, noise of any colour, hum; steady or swelling; any level."""
    spectrum = tf.signal.rfft(dice.normal([count, samples]))
    frequency = tf.maximum(tf.range(samples // 2 + 1, dtype=tf.float32), 20.0 * samples / rate)
    colour = tf.pow(frequency, -dice.uniform([count, 1], 0.0, 1.2))  # 0 is white, a half pink, one brown
    noise = tf.signal.irfft(spectrum * tf.cast(colour, tf.complex64), [samples])
    noise /= tf.math.reduce_std(noise, -1, keepdims=True)
    time = tf.range(samples, dtype=tf.float32) / rate
    pitch = dice.uniform([count, 1, 1], 45.0, 400.0) * tf.range(1.0, 9.0)[:, None]  # [count, harmonic, 1]
    weight = dice.uniform([count, 8, 1]) ** 3 * tf.cast(pitch < rate / 2, tf.float32)
    phase = dice.uniform([count, 8, 1])
    hum = tf.zeros_like(noise)
    for at in range(8):
        hum += weight[:, at] * tf.sin(2 * np.pi * (pitch[:, at] * time + phase[:, at]))
    hum /= tf.math.reduce_std(hum, -1, keepdims=True) + 1e-6
    hum += dice.uniform([count, 1], 0.0, 0.5) * noise
    kind = dice.uniform([count, 1])
    sound = tf.where(kind < 0.6, noise, tf.where(kind < 0.9, hum, tf.zeros_like(hum)))
    middle, spread = dice.uniform([count, 1], 0.0, samples / rate), dice.uniform([count, 1], 0.03, 0.5)
    swell = tf.exp(-0.5 * tf.square((time - middle) / spread))
    sound *= tf.where(dice.uniform([count, 1]) < 0.5, tf.ones_like(swell), swell)
    level = tf.pow(10.0, dice.uniform([count, 1], -4.0, -0.7))
    return tf.clip_by_value(sound * level, -1.0, 1.0)


def _noised(config: Config, waves: tf.Tensor, noise: tf.Tensor, dice: Dice) -> tf.Tensor:
    """Recordings, some with noise 4 to 40 dB below the voice."""
    count = noise.shape[0]
    voice, other = (tf.reduce_max(tf.abs(sound), -1, keepdims=True) for sound in (waves, noise))
    below = tf.pow(10.0, -dice.uniform([count, 1], 0.2, 2.0)) * voice / tf.maximum(other, 1e-6)
    return waves + noise * below * tf.cast(dice.uniform([count, 1]) < config.noise, tf.float32)


def _warped(config: Config, power: tf.Tensor, dice: Dice) -> tf.Tensor:
    """Spectrograms, moved and stretched in time, stretched in frequency (Jaitly & Hinton 2013)."""
    count, frames, bins = tf.shape(power)[0], power.shape[1], power.shape[2]
    speed = tf.exp(dice.uniform([count], -config.speed, config.speed))
    pitch = tf.exp(dice.uniform([count], -config.pitch, config.pitch))
    shift = dice.uniform([count], -100 * config.shift, 100 * config.shift) + frames / 2 * (1 - speed)
    zero = tf.zeros([count])
    # A point (bin, frame) of the result comes from (pitch * bin, speed * frame + shift).
    transforms = tf.stack([pitch, zero, zero, zero, speed, shift, zero, zero], -1)
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=power[..., None], transforms=transforms, output_shape=[frames, bins], interpolation="BILINEAR",
        fill_mode="NEAREST", fill_value=0.0,
    )  # fmt: skip
    return tf.ensure_shape(moved[..., 0], [None, frames, bins])


def _masked(config: Config, spectrograms: tf.Tensor, dice: Dice) -> tf.Tensor:
    """Log-mel spectrograms in another sound colour, with bands blanked (Park et al. 2019, SpecAugment)."""
    count, frames, bands = tf.shape(spectrograms)[0], spectrograms.shape[1], spectrograms.shape[2]
    curve = tf.stack([tf.cos(np.pi * wave * tf.range(bands, dtype=tf.float32) / bands) for wave in (1, 2, 3)])
    colour = tf.matmul(dice.uniform([count, 3], -config.tilt, config.tilt), curve)[:, None, :, None]
    spectrograms += colour
    mean = tf.reduce_mean(spectrograms, [1, 2], keepdims=True)
    for size, shape in ((frames, [frames, 1, 1]), (bands, [1, bands, 1])):
        for _ in range(config.masks):
            width = dice.uniform([count, 1], 0.0, 0.15 * size)
            start = dice.uniform([count, 1]) * (size - width)
            place = tf.range(size, dtype=tf.float32)
            hidden = tf.reshape((place >= start) & (place < start + width), [count, *shape])
            spectrograms = tf.where(hidden, mean, spectrograms)
    return spectrograms


def build(config: Config, splits: data.Splits) -> keras.Model:
    frames, bands = splits.train.element_spec[0].shape[1:3]
    inputs = keras.Input([frames, bands, 1], name="spectrogram")

    def convolve(x, channels, stride=1, activation="relu"):
        x = keras.layers.Conv2D(channels, 3, stride, padding="same", use_bias=False, kernel_initializer="he_normal")(x)
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        return keras.layers.Activation(activation)(x) if activation else x

    def block(x, channels):
        straight = keras.layers.AveragePooling2D(2, padding="same")(x)
        straight = keras.layers.Conv2D(channels, 1, use_bias=False)(straight)
        x = convolve(x, channels, stride=2)
        x = convolve(x, channels, activation=None)
        return keras.layers.Activation("relu")(keras.layers.Add()([straight, x]))

    normal = keras.layers.Normalization(axis=2)
    normal.adapt(splits.train.map(lambda spectrogram, target: spectrogram))
    x = normal(inputs)
    x = convolve(x, config.width // 2, stride=2)  # [batch, frame / 2, band / 2, width / 2]
    x = block(x, config.width)
    x = block(x, 2 * config.width)
    x = block(x, 4 * config.width)  # [batch, frame / 16, band / 16, 4 * width]
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(config.dropout)(x)
    logits = keras.layers.Dense(len(splits.names) + 1, dtype="float32", name="logits")(x)
    model = keras.Model(inputs, logits, name="spotter")
    rate = training.cosine(config, splits, rate=config.rate)
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=config.decay),
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=config.smoothing),
        # Of known speakers soon every word is understood. Under another name than accuracy, `fit` goes by the loss.
        metrics=[keras.metrics.CategoricalAccuracy(name="understood")],
    )
    return model


train = training.fit


def measure(config: Config, model: keras.Model, splits: data.Splits) -> dict[str, metrics.Measured]:
    answer = tf.function(lambda spectrograms: _scores(model, spectrograms))
    scores = np.concatenate([answer(spectrograms) for spectrograms, _ in splits.test])
    labels = np.concatenate([np.argmax(targets, -1) for _, targets in splits.test])
    scores, labels = scores[labels < len(splits.names)], labels[labels < len(splits.names)]  # of words alone
    best = scores.argmax(-1)
    classification.plot_confusion(labels, best, splits.names, config.folder / "confusion_matrix.png")
    samples = round(config.seconds * config.sample_rate)
    known = no_speech(Dice(config.seed, -2), 500, samples, config.sample_rate).numpy()
    hear = tf.function(lambda contents: _scores(model, splits.preprocess(contents)))
    scored = [
        np.concatenate([hear(tf.constant(part)) for part in np.array_split(contents, 10)]).max(-1)
        for contents in (
            np.array([sounds.encode(sound, config.sample_rate) for sound in waves], object)
            for waves in (known, unseen_kinds(500, samples, config.sample_rate))
        )
    ]
    right = (best == labels).astype(float)
    return {
        **classification.decisions(labels, best),
        "calibration_error": metrics.measured(classification.calibration_error, right, scores.max(-1)),
        **speech.alarms(scores.max(-1), scored[0]),
        "unseen_false_alarm_rate": speech.alarms(scores.max(-1), scored[1])["false_alarm_rate"],
    }


def unseen_kinds(count: int, samples: int, rate: int) -> np.ndarray:
    """Sounds [count, sample] without speech that no training hears: beeps, sweeps and clicks in a little noise."""
    from scipy.signal import fftconvolve

    random = np.random.default_rng(3)
    time = np.arange(samples) / rate
    made = []
    for number in range(count):
        low, high = random.uniform(300, 0.4 * rate, 2)
        if number % 3 == 0:
            sound = np.sin(2 * np.pi * low * time) * (np.sin(2 * np.pi * random.uniform(2, 10) * time) > 0)
        elif number % 3 == 1:
            sound = np.sin(2 * np.pi * (low * time + (high - low) * time**2 / (2 * time[-1])))
        else:
            ringing = np.exp(-time * random.uniform(50, 500)) * np.sin(2 * np.pi * low * time)
            sound = fftconvolve(random.random(samples) < random.uniform(2, 30) / rate, ringing)[:samples]
        made.append(10 ** random.uniform(-2, -0.3) * (sound + 0.01 * random.normal(size=samples)))
    return np.clip(np.array(made), -1, 1).astype(np.float32)


def _scores(model: keras.Model, spectrograms: tf.Tensor) -> tf.Tensor:
    """Probabilities [batch, word], as they are measured and as they are served; what is missing to 1 is no speech."""
    return tf.nn.softmax(model(spectrograms, training=False))[:, :-1]


def baseline(config: Config, splits: data.Splits) -> dict[str, metrics.Measured]:
    """A support-vector machine with radial kernel on mel-frequency cepstra (Davis & Mermelstein 1980)."""
    from scipy.fft import dct
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    def features(batches):
        """13 coefficients at ten moments between the first and the last frame that is not silent."""
        found, labels = [], []
        for spectrograms, targets in batches:
            words = targets[:, -1].numpy() == 0  # it is not asked to tell words from other sounds
            for spectrogram in spectrograms.numpy()[words, ..., 0]:
                cepstra = dct(spectrogram, norm="ortho")[:, :13]  # [frame, coefficient]
                loud = np.flatnonzero(spectrogram.max(-1) > np.log(FLOOR) + 0.5)
                first, last = (loud[0], loud[-1]) if len(loud) else (0, len(cepstra) - 1)
                moments = np.linspace(first, last, 10)
                found.append([np.interp(moments, np.arange(len(cepstra)), line) for line in cepstra.T])
            labels.append(np.argmax(targets[words], -1))
        return np.array(found).reshape(len(found), -1), np.concatenate(labels)

    machine = make_pipeline(StandardScaler(), SVC())
    machine.fit(*features(splits.train.concatenate(splits.validation)))  # it stops by itself
    found, labels = features(splits.test)
    return classification.decisions(labels, machine.predict(found))


class Endpoint(tf.Module):
    def __init__(self, config: Config, model: keras.Model, splits: data.Splits):
        super().__init__()
        self.model, self.preprocess = model, splits.preprocess
        self.names = tf.constant(splits.names)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="audio")])
    def __call__(self, audio):
        return ranked(self.names, _scores(self.model, self.preprocess(audio)))
