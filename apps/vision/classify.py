"""Picture classification: say what a picture shows.

Data      a folder, zip or tar with one sub-folder of pictures a class; a table of files and labels; `fashion-mnist`
Model     a residual network from scratch, or any KerasHub image backbone from a preset folder
Endpoint  image (PNG or JPEG bytes) -> label, score, the five best labels with their scores
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import keras
import numpy as np
import tensorflow as tf

from shared import data, metrics, run, training
from shared.answers import ranked
from shared.data import idx, images, named
from shared.data.audit import audit
from shared.data.divide import divide, whole
from shared.metrics import classification


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
    epochs: int = 12  # passes over the training examples; over a small set several passes make an epoch
    size: int = 0  # side of the square that the network sees, in pixels; 0: the pictures' own, within 16 to 96
    colour: Literal["auto", "grey", "rgb"] = "auto"  # what the network sees; auto: as the pictures are
    rate: Annotated[float, run.Range(0.02, 1.0, log=True)] = 0.2  # peak learning rate; with a backbone a fiftieth of it
    decay: Annotated[float, run.Range(5e-5, 5e-3, log=True)] = 5e-4  # weight decay, as an L2 penalty on the kernels
    smoothing: float = 0.1  # share of the target that is spread over all classes
    width: Annotated[int, run.Range(16, 128, step=16)] = 64  # channels of the first residual stage
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = "auto"  # see CONTRIBUTING.md
    flip: Literal["auto", "yes", "no"] = "auto"  # mirror training pictures; auto: yes, but not the digits
    mirror: bool = True  # where training flips: answer with the mean over a picture and its mirror image
    shift: float = 0.05  # the most that training pictures move, as a share of their side
    erase: float = 0.25  # share of training pictures with a random patch replaced by noise
    augment: Literal["none", "rand_augment"] = "none"  # further changes to training pictures
    # Blend pairs of training pictures and their targets.
    mix: Annotated[Literal["none", "mixup", "cutmix"], run.Choices(("none", "mixup", "cutmix"))] = "none"
    backbone: str = ""  # folder of a KerasHub preset (made by save_to_preset) to start from
    frozen: int = 0  # epochs that train only the head, before the backbone learns too


SMOKE = Config(epochs=1, batch=64, size=8, width=8)
EXPECT = {"": {"accuracy": 0.97}, "fashion-mnist": {"accuracy": 0.937}}


def load(config: Config) -> data.Splits:
    pictures, about = _read(config)
    rows = divide(pictures.splits, pictures.labels, pictures.names, seed=config.seed, what="pictures")
    return _splits(config, pictures, rows, about, audited=tuple(rows))


def load_other(config: Config, names: Sequence[str]) -> data.Splits:
    """Other pictures, to measure a saved model of the classes `names` on."""
    return _splits(config, *whole(*_read(config), names), audited=("test",))


def _splits(config, pictures: images.Pictures, rows, about, *, audited: tuple[str, ...]) -> data.Splits:
    names, labels = pictures.names, pictures.labels
    parts = {split: (pictures.pixels[at], labels[at]) for split, at in rows.items()}
    audit({split: parts[split] for split in audited}, names, unreadable=pictures.unreadable)
    size, channels = pictures.pixels.shape[2:]
    changed = _augmentation(config)
    passes = max(1, 20 * config.batch // len(rows["train"]))  # of a small set in an epoch, or that is over too soon
    pixels = data.gather(parts["train"][0])
    targets = tf.one_hot(parts["train"][1], len(names))

    def read(indices, step):
        return changed(tf.cast(pixels(indices), tf.float32), tf.gather(targets, indices), step)

    def in_order(split):
        batches = data.in_order(*parts[split], batch=500)
        return batches.map(lambda picture, label: (picture, tf.one_hot(label, len(names))))

    def preprocess(contents):
        return images.decode_batch(contents, size=size, channels=channels)

    return data.Splits(
        stream=data.stream(len(rows["train"]), batch=config.batch, seed=config.seed, read=read),
        steps=passes * (len(rows["train"]) // config.batch),
        train=in_order("train"),
        validation=in_order("validation"),
        test=in_order("test"),
        preprocess=preprocess,
        names=names,
        request={"image": np.array([tf.io.encode_png(one).numpy() for one in parts["test"][0][:8]], object)},
        about={**about, "protocol": f"{about['protocol']}, {len(rows['test']):,} pictures"},
        settled={
            "size": size,
            "colour": {1: "grey", 3: "rgb"}[channels],
            "flip": "yes" if _flips(config) else "no",
        },
    )


def _read(config: Config) -> tuple[images.Pictures, dict[str, str]]:
    channels = {"auto": 0, "grey": 1, "rgb": 3}[config.colour]
    limits = "Pictures unlike the training set's (other backgrounds, views, sizes) get confident wrong answers; every "
    limits += "picture gets one of the classes. The orientation that a camera notes in a JPEG is not followed."
    if not config.data:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        splits = np.full(len(pixels), "")
        about = {"data": "digits", "protocol": "every tenth as the seed draws them, stratified",
                 "source": "scikit-learn's copy of the test set of UCI Optical Recognition of Handwritten Digits",
                 "licence": "CC BY 4.0", "citation": "Alpaydin & Kaynak 1998",
                 "limits": f"{limits} These digits fill the picture: cut yours out to its edges."}  # fmt: skip
        names = tuple(str(name) for name in digits.target_names)
        return _sized(config, pixels, digits.target, splits, names, channels), about
    if config.data == "fashion-mnist":
        files = named.find(config.data)
        pixels = np.concatenate([idx.read(files[f"{part}-images-idx3-ubyte.gz"]) for part in ("train", "t10k")])
        labels = np.concatenate([idx.read(files[f"{part}-labels-idx1-ubyte.gz"]) for part in ("train", "t10k")])
        splits = np.array(["train"] * 60_000 + ["test"] * 10_000)
        about = {**named.about(config.data), "protocol": "official test split", "limits": limits}
        return _sized(config, pixels[..., None], labels, splits, FASHION, channels), about
    if not Path(config.data).exists():
        raise FileNotFoundError(
            f"{config.data} does not exist; expected a folder or an archive of pictures, a table of them, or the name "
            f"of a public data set (fashion-mnist)"
        )
    pictures = images.read(Path(config.data), size=config.size, channels=channels, on_error=config.on_error)
    own = "test" in pictures.splits
    about = {"data": config.data, "protocol": "its test split" if own else "every tenth as the seed draws them, "
             "stratified", "limits": limits}  # fmt: skip
    return pictures, about


# The labels' meaning, from the data set's README.
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def _sized(config, pixels, labels, splits, names, channels) -> images.Pictures:
    """Pictures that come as arrays, brought to the size and colour that were asked for."""
    size = config.size or int(np.clip(pixels.shape[1], 16, 96))
    if size != pixels.shape[1]:
        pixels = np.concatenate(
            [images.resize(part, size=size) for part in np.array_split(pixels, 1 + len(pixels) // 4096)]
        )
    pixels = np.repeat(pixels, max(channels, 1), axis=-1)
    return images.Pictures(pixels, labels.astype(np.int64), splits, names, ())


class StepSeed(keras.random.SeedGenerator):
    """Random numbers for Keras's augmentation layers that are a function of the seed and the step alone."""

    def __init__(self, seed: int):
        self.seed = seed

    def at(self, step: tf.Tensor) -> None:
        self.step, self.calls = tf.cast(step, tf.int32), 0

    def next(self, ordered: bool = True):
        self.calls += 1
        return tf.stack([tf.constant(1_000 * self.seed + self.calls), self.step])


def _flips(config: Config) -> bool:
    return config.flip == "yes" or (config.flip == "auto" and config.data != "")


def _augmentation(config: Config):
    """A function (pictures [batch, height, width, channel] in 0 to 255, targets, step) -> the same, changed."""
    # In float32 whatever the network computes in; in whole pixels, for interpolation would blur what the network
    # learns from, but not what it is asked about.
    kept = {"dtype": "float32"}
    whole = {"fill_mode": "nearest", "interpolation": "nearest", **kept}
    layers = []
    if _flips(config):
        layers.append(keras.layers.RandomFlip("horizontal", **kept))
    if config.shift:
        layers.append(keras.layers.RandomTranslation(config.shift, config.shift, **whole))
    if config.augment == "rand_augment":
        layers.append(keras.layers.RandAugment(value_range=(0, 255), **kept))
    if config.erase:
        share = (config.erase, config.erase)
        layers.append(keras.layers.RandomErasing(share, scale=(0.02, 0.2), value_range=(0, 255), **kept))
    if config.mix != "none":
        layers.append({"mixup": keras.layers.MixUp, "cutmix": keras.layers.CutMix}[config.mix](**kept))
    seed = StepSeed(config.seed)
    for layer in layers:
        layer.generator = seed

    def changed(pictures, targets, step):
        seed.at(step)
        both = {"images": pictures, "labels": targets}
        for layer in layers:
            both = layer(both, training=True)
        return both["images"], both["labels"]

    return changed


def build(config: Config, splits: data.Splits) -> keras.Model:
    size, channels = splits.train.element_spec[0].shape[2:]
    pictures = keras.Input([size, size, channels], name="picture")
    features = _backbone(config, pictures) if config.backbone else _residual(config, splits, pictures)
    logits = keras.layers.Dense(len(splits.names), dtype="float32", name="logits")(features)
    model = keras.Model(pictures, logits, name="backbone" if config.backbone else "residual")
    rate = training.cosine(config, splits, rate=config.rate / (50 if config.backbone else 1), warm_up=0.2)
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=config.smoothing),
        # By an object: one that is only named is made while Keras traces the step, which TensorFlow then traces again.
        metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")],
    )
    return model


def _residual(config: Config, splits: data.Splits, pictures):
    """Three stages of residual blocks (He et al. 2016), each at half the resolution and twice the width."""
    penalty = keras.regularizers.L2(config.decay / 2)

    def convolve(x, channels, side=3, stride=1, activation="relu"):
        x = keras.layers.Conv2D(
            channels, side, stride, padding="same", use_bias=False, kernel_initializer="he_normal",
            kernel_regularizer=penalty,
        )(x)  # fmt: skip
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        return keras.layers.Activation(activation)(x) if activation else x

    def block(x, channels, stride=1):
        straight = x
        if stride > 1:
            straight = keras.layers.AveragePooling2D(stride, padding="same")(straight)
        if x.shape[-1] != channels:
            straight = convolve(straight, channels, side=1, activation=None)
        x = convolve(x, channels, stride=stride)
        x = convolve(x, channels, activation=None)
        return keras.layers.Activation("relu")(keras.layers.Add()([straight, x]))

    normal = keras.layers.Normalization(dtype="float32")
    normal.adapt(splits.train.map(lambda picture, target: picture))
    x = normal(pictures)
    x = convolve(x, config.width // 2)  # [batch, size, size, width / 2]
    x = convolve(x, config.width, stride=2)  # [batch, size / 2, size / 2, width]
    x = block(x, config.width)
    x = block(x, 2 * config.width, stride=2)  # [batch, size / 4, size / 4, 2 * width]
    x = block(x, 2 * config.width)
    return keras.layers.GlobalAveragePooling2D()(x)


def _backbone(config: Config, pictures):
    """Features of a KerasHub image backbone, fed as its preset says."""
    import keras_hub

    backbone = keras_hub.models.Backbone.from_preset(config.backbone)
    x = pictures
    if pictures.shape[-1] == 1:
        x = keras.layers.Concatenate()([x, x, x])
    if (Path(config.backbone) / "image_converter.json").exists():  # else it takes 0 to 255 at any size
        converter = keras_hub.layers.ImageConverter.from_preset(config.backbone)
        if converter.image_size:
            x = keras.layers.Resizing(*converter.image_size)(x)
        if converter.scale is not None:
            x = keras.layers.Rescaling(converter.scale, converter.offset or 0.0)(x)
    features = backbone(x)
    if isinstance(features, dict):
        features = features["pooled_output"] if "pooled_output" in features else list(features.values())[-1]
    return keras.layers.GlobalAveragePooling2D()(features) if len(features.shape) == 4 else features


class Unfreeze(keras.callbacks.Callback):
    """Keeps a backbone as it is for some epochs, while the head learns to use it."""

    def __init__(self, backbone: keras.Model, epochs: int):
        super().__init__()
        self.backbone, self.epochs = backbone, epochs

    def on_epoch_begin(self, epoch, logs=None):
        if self.backbone.trainable != (epoch >= self.epochs):
            self.backbone.trainable = epoch >= self.epochs
            self.model.make_train_function(force=True)


def train(config: Config, model: keras.Model, splits: data.Splits) -> dict[str, float]:
    inner = [layer for layer in model.layers if isinstance(layer, keras.Model)]
    callbacks = (Unfreeze(inner[0], config.frozen),) if inner and config.frozen else ()
    return training.fit(config, model, splits, callbacks=callbacks)


def measure(config: Config, model: keras.Model, splits: data.Splits) -> dict[str, metrics.Measured]:
    answer = tf.function(lambda pictures: _scores(config, model, pictures))
    scores, labels = [], []
    for pictures, targets in splits.test:
        scores.append(answer(pictures))
        labels.append(np.argmax(targets, -1))
    scores, labels = np.concatenate(scores), np.concatenate(labels)
    classification.plot_confusion(labels, scores.argmax(-1), splits.names, config.folder / "confusion_matrix.png")
    return classification.classification(labels, scores)


def _scores(config: Config, model: keras.Model, pictures: tf.Tensor) -> tf.Tensor:
    """Probabilities [batch, class], as they are measured and as they are served."""
    scores = tf.nn.softmax(model(pictures, training=False))
    if _flips(config) and config.mirror:
        scores = (scores + tf.nn.softmax(model(pictures[:, :, ::-1], training=False))) / 2
    return scores


def baseline(config: Config, splits: data.Splits) -> dict[str, metrics.Measured]:
    """A linear SVM on histograms of oriented gradients (Dalal & Triggs 2005)."""
    from skimage.feature import hog
    from sklearn.linear_model import SGDClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    cell = max(4, splits.train.element_spec[0].shape[1] // 8)  # about eight cells a side

    def describe(picture):
        return hog(picture.mean(-1), pixels_per_cell=(cell, cell), cells_per_block=(2, 2))

    def features(batches):
        pictures = (picture for batch, _ in batches.as_numpy_iterator() for picture in batch)
        first = describe(next(iter(batches))[0][0].numpy())
        rows = np.dtype((np.float32, first.shape))  # row by row into one array: there may be many
        found = np.fromiter(map(describe, pictures), rows)  # [picture, feature]
        return found, np.concatenate([np.argmax(targets, -1) for _, targets in batches.as_numpy_iterator()])

    machine = SGDClassifier(alpha=1e-5, average=True, max_iter=20, tol=None, random_state=config.seed, n_jobs=-1)
    machine = make_pipeline(StandardScaler(copy=False), machine)
    machine.fit(*features(splits.train))
    found, labels = features(splits.test)
    return classification.decisions(labels, machine.predict(found))


class Endpoint(tf.Module):
    def __init__(self, config: Config, model: keras.Model, splits: data.Splits):
        super().__init__()
        self.config, self.model, self.preprocess = config, model, splits.preprocess
        self.names = tf.constant(splits.names)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image")])
    def __call__(self, image):
        return ranked(self.names, _scores(self.config, self.model, self.preprocess(image)))
