"""vision.classify as a user meets it: any picture, bad input, another's backbone, its models in other projects."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from apps.vision import classify
from shared import data

SMALL = ("--size=8", "--width=8", "--batch=16", "--epochs=2")


def test_folder_to_served_answer_on_pictures_of_other_programs(pictures, cornucopia, forked, python, serving, tmp_path):
    folder = pictures(count=30, mode="RGB")
    done = forked("train", "vision.classify", f"--data={folder}", *SMALL, "--epochs=6")
    assert "audit      train 75  validation 6  test 9  in 3 classes" in done.stdout
    assert re.search(r"accuracy +1\.0000", done.stdout)  # light, dark and striped are easy to tell apart

    with serving() as address:
        random = np.random.default_rng(7)
        bright = np.clip(random.normal(200, 20, (40, 60, 3)), 0, 255).astype(np.uint8)
        for name, mode in {"a.png": "RGB", "b.png": "L", "c.png": "RGBA", "d.jpg": "RGB", "e.png": "P"}.items():
            Image.fromarray(bright).convert(mode).save(tmp_path / name)
            answer = cornucopia("ask", "vision.classify", f"--image={tmp_path / name}", f"--address={address}")
            assert answer.stdout.startswith("label      light\nscore      0."), name
            assert "top 3" in answer.stdout
        (tmp_path / "no.png").write_text("not a picture")
        refused = cornucopia("ask", "vision.classify", "--image=no.png", f"--address={address}", expect=2)
        assert "the server refuses (INVALID_ARGUMENT)" in refused.stderr
        refused = cornucopia("ask", "vision.classify", "--image=gone.png", f"--address={address}", expect=2)
        assert "gone.png" in refused.stderr

    # The network goes on learning, on other classes, in a project that has none of the suite.
    extra = tmp_path / "saved_models" / "vision.classify" / "1" / "assets.extra"
    python(
        "import sys, keras, numpy as np\n"
        "model = keras.saving.load_model(sys.argv[1])\n"
        "features = keras.Model(model.input, model.layers[-2].output)\n"
        "mine = keras.Sequential([features, keras.layers.Dense(2, activation='softmax')])\n"
        "mine.compile(keras.optimizers.Adam(0.01), 'sparse_categorical_crossentropy', metrics=['accuracy'])\n"
        "random = np.random.default_rng(1)\n"
        "labels = random.integers(0, 2, 200)\n"
        "pictures = random.normal(100, 20, (200, 8, 8, 3))\n"
        "pictures[labels == 1, :, ::2] += 80\n"
        "mine.fit(pictures[:150], labels[:150], epochs=8, verbose=0)\n"
        "accuracy = mine.evaluate(pictures[150:], labels[150:], verbose=0)[1]\n"
        "assert accuracy > 0.9, accuracy\n",
        str(extra / "model.keras"),
    )

    # The saved version on other data of the same classes, and of others; measured by one, whoever trained it.
    record = json.loads((extra / "config.json").read_text())
    record["config"]["strategy"] = "multiworker"
    (extra / "config.json").write_text(json.dumps(record))
    for file in folder.rglob("*.png"):
        Image.open(file).convert("L").resize((30, 24)).save(file)
    folder = folder.rename(tmp_path / "other")
    done = forked("evaluate", "vision.classify", f"--data={folder}")
    assert "all of it" in done.stdout
    assert re.search(r"accuracy +(1\.0|0\.9)", done.stdout)
    shutil.rmtree(folder / "dark")
    for file in sorted((folder / "light").iterdir())[1:]:
        file.unlink()
    done = forked("evaluate", "vision.classify", f"--data={folder}")  # too little of too few classes to learn from
    assert "audit      test 31  in 2 classes of the model's 3\n" in done.stdout
    assert re.search(r"accuracy +(1\.0|0\.9)", done.stdout)
    (folder / "light").rename(folder / "dim")
    done = forked("evaluate", "vision.classify", f"--data={folder}", expect=2)
    assert "are not the model's ['dark', 'light', 'striped']" in done.stderr


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (
            lambda folder: None,
            ["--data=nowhere"],
            "nowhere does not exist; expected a folder or an archive of pictures",
        ),
        (lambda folder: (folder / "dark" / "0.png").write_bytes(b"x"), [], "dark/0.png: "),
        (lambda folder: (folder / "extra").mkdir(), [], "class extra is empty"),
        (lambda folder: None, ["--batch=500"], "48 training examples do not fill one batch of 500: use --batch=48"),
        (lambda folder: None, ["--epochs=many"], "epochs"),
        (lambda folder: None, ["--backbone=nowhere"], "nowhere"),
        (
            lambda folder: None,
            ["--strategy=mirrored", "--batch=15", "--saved-models=/proc/x"],
            "cannot write to /proc/x",
        ),
    ],
)
def test_bad_input_ends_in_advice(pictures, mistaken, spoil, flags, message):
    folder = pictures()
    spoil(folder)
    said = mistaken("train", "vision.classify", f"--data={folder}", *SMALL, *flags)
    assert message in said.err.replace("\n", " ")


def test_corrupt_picture_can_be_skipped(pictures, forked):
    folder = pictures()
    (folder / "dark" / "0.png").write_bytes(b"x")
    done = forked("train", "vision.classify", f"--data={folder}", *SMALL, "--on-error=skip", "--epochs=1")
    assert "unreadable 1, constant 0" in done.stdout
    assert "left out dark/0.png" in done.stdout


def test_backbone_from_a_preset_folder(pictures, tmp_path, forked):
    code = (
        "import keras, keras_hub\n"
        "keras.utils.set_random_seed(1)\n"
        "keras_hub.models.ResNetBackbone(input_conv_filters=[64], input_conv_kernel_sizes=[3],\n"
        "    stackwise_num_filters=[64, 64], stackwise_num_blocks=[1, 1], stackwise_num_strides=[1, 2],\n"
        "    block_type='basic_block', use_pre_activation=True).save_to_preset('preset')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    folder = pictures()
    flags = ("train", "vision.classify", f"--data={folder}", "--batch=16", "--size=32", "--backbone=preset")
    done = forked(*flags, "--epochs=4", "--frozen=2")
    assert "network    backbone" in done.stdout
    assert "over gRPC equal the model in memory" in done.stdout


def test_a_frozen_backbone_stays_as_it_is_and_then_learns():
    backbone = keras.Sequential([keras.Input([2]), keras.layers.Dense(2)])
    model = keras.Sequential([keras.Input([2]), backbone, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    before = backbone.get_weights()[0].copy()
    kernels = []
    record = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: kernels.append(backbone.get_weights()[0].copy()))
    x = np.random.default_rng(1).random((16, 2))
    model.fit(x, x.sum(-1), epochs=3, verbose=0, callbacks=[classify.Unfreeze(backbone, 2), record])
    np.testing.assert_array_equal(kernels[0], before)
    np.testing.assert_array_equal(kernels[1], before)
    assert not np.array_equal(kernels[2], before)


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"augment": "rand_augment"}, {"mix": "mixup"}, {"mix": "cutmix"}])
def test_augmentation_is_a_function_of_the_step(changes, precision):
    keras.mixed_precision.set_global_policy(precision)
    config = classify.Config(flip="yes", **changes)
    pictures = tf.constant(np.random.default_rng(1).integers(0, 255, (16, 12, 12, 3)), tf.float32)
    targets = tf.one_hot(tf.range(16) % 4, 4)
    changed = classify._augmentation(config)
    stream = data.stream(16, batch=16, seed=1, read=lambda indices, step: changed(pictures, targets, step))
    first, again, other = (next(iter(stream(step))) for step in (5, 5, 6))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
    assert first[0].shape == (16, 12, 12, 3)
    assert first[0].dtype == first[1].dtype == tf.float32  # whatever the network computes in
    np.testing.assert_allclose(tf.reduce_sum(first[1], -1), 1, atol=1e-6)
    mixed = (tf.reduce_max(first[1], -1) < 0.999).numpy().any()
    assert mixed == ("mix" in changes)


GOLDEN = Path(__file__).parent / "golden"


def test_golden_model_answers_as_recorded():
    recorded = json.loads((GOLDEN / "answers.json").read_text())
    model = tf.saved_model.load(str(GOLDEN / "vision.classify" / "1"))
    contents = [(GOLDEN / name).read_bytes() for name in recorded["pictures"]]
    answer = model.signatures["serving_default"](image=tf.constant(contents))
    assert [label.decode() for label in answer["label"].numpy()] == recorded["label"]
    # Its network computes in bfloat16, which processors round in other places: two were 8e-4 apart.
    np.testing.assert_allclose(answer["top_scores"], recorded["top_scores"], atol=2e-3)
    one = model.signatures["serving_default"](image=tf.constant(contents[:1]))
    np.testing.assert_allclose(one["score"][0], answer["score"][0], atol=1e-4)
