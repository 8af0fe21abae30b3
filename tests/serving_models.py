"""The small models that the contract is tested on: `python tests/serving_models.py FOLDER` writes them with a config.

With them a real TensorFlow Serving takes the same tests:

    tensorflow_model_server --port=8500 --rest_api_port=8501 --model_config_file=FOLDER/models.config \
        --enable_grpc_healthcheck_service --allow_version_labels_for_unavailable_models
    TF_SERVING_ADDRESS=127.0.0.1:8500 TF_SERVING_REST=127.0.0.1:8501 \
        pytest tests/test_serving.py tests/test_lookup.py tests/test_rest_table.py tests/test_round_trip.py

Without TF_SERVING_REST what is asked over REST is skipped. What is ours alone (flags, batching,
metrics) is in other files, which start the server that they ask.
"""

import sys
from pathlib import Path

import tensorflow as tf

TWO = tf.constant(2.0)


class Adder(tf.Module):
    """Two inputs of different rank, two outputs of different type."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="a"), tf.TensorSpec([], tf.float32, name="b")])
    def __call__(self, a, b):
        return {"sum": a + b, "text": tf.strings.as_string(a)}


class Affine(tf.Module):
    """One input, one output, one variable, by which versions differ."""

    def __init__(self, scale: float = 2.0):
        super().__init__()
        self.scale = tf.Variable(scale)

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])
    def __call__(self, x):
        return {"y": x * self.scale + 1.0}


class Echo(tf.Module):
    """Bytes and integers, as they came."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="content"),
                                  tf.TensorSpec([None], tf.int64, name="number")])  # fmt: skip
    def __call__(self, content, number):
        return {"content_bytes": content, "content": content, "number": number}


class Scaled(tf.Module):
    """An input with a default."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="a")])
    def __call__(self, a, b=TWO):
        return {"y": a * b}


class Narrow(tf.Module):
    """Integers of fewer bits than a message's fields have."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int8, name="signed"),
                                  tf.TensorSpec([None], tf.uint8, name="unsigned")])  # fmt: skip
    def __call__(self, signed, unsigned):
        return {"signed": signed, "unsigned": unsigned}


class Judge(tf.Module):
    """Signatures over serialised Examples with a float feature `x`, to classify and to regress."""

    def __init__(self):
        super().__init__()
        self.names = tf.constant(["low", "high"])

    def _read(self, inputs):
        return tf.io.parse_example(inputs, {"x": tf.io.FixedLenFeature([], tf.float32, 0.0)})["x"]

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def classify(self, inputs):
        x = self._read(inputs)
        return {"classes": tf.tile(self.names[None], [tf.shape(x)[0], 1]), "scores": tf.stack([-x, x], 1)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def regress(self, inputs):
        return {"outputs": self._read(inputs) * 2.0}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def scores(self, inputs):
        return {"scores": self._read(inputs)[:, None]}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def others(self, inputs):
        return {"what": self._read(inputs)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def three(self, inputs):
        return {"classes": self.names, "scores": self._read(inputs), "what": self._read(inputs)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def none(self, inputs):
        return {}


class Uneven(tf.Module):
    """Outputs that no row of an answer can hold, each for another reason."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def __call__(self, x):
        return {"a": x, "b": x[:1]}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def scalar(self, x):
        return {"y": tf.reduce_sum(x)}

    @tf.function(input_signature=[])
    def nothing(self):
        return {"y": tf.constant([1.0])}

    def cast(self, dtype):
        return tf.function(lambda x: {"y": tf.cast(x, dtype)},
                           input_signature=[tf.TensorSpec([None], tf.float32, name="x")])  # fmt: skip


class Same(tf.Module):
    """What comes in goes out, of one type and any shape."""

    def __init__(self, name: str, aliases: str = "x"):
        super().__init__()
        values = [tf.TensorSpec(None, name, name=alias) for alias in aliases]
        self.call = tf.function(lambda *given: dict(zip(aliases, map(tf.identity, given), strict=True)),
                                input_signature=values)  # fmt: skip


DTYPES = ("float", "double", "int32", "uint8", "int16", "int8", "string", "complex64", "int64", "bool", "bfloat16",
          "uint16", "complex128", "half", "uint32", "uint64")  # fmt: skip


def save(module: tf.Module, folder: Path, signatures=None) -> None:
    """Write a version."""
    tf.saved_model.save(module, str(folder), signatures=signatures or module.__call__)


def write(root: Path) -> None:
    """Write all models, and the config that serves them."""
    for version in ("1", "00003"):
        save(Adder(), root / "adder" / version)
    (root / "adder" / "draft").mkdir()
    save(Affine(), root / "affine" / "1")
    save(Echo(), root / "echo" / "1")
    save(Scaled(), root / "scaled" / "1")
    save(Narrow(), root / "narrow" / "1")
    judge = Judge()
    save(judge, root / "judge" / "1", {"serving_default": judge.classify, "regress": judge.regress,
                                       "scores": judge.scores, "others": judge.others,
                                       "three": judge.three, "none": judge.none})  # fmt: skip
    uneven = Uneven()
    save(uneven, root / "uneven" / "1",
         {"serving_default": uneven.__call__, "scalar": uneven.scalar, "nothing": uneven.nothing,
          **{name: uneven.cast(name) for name in ("half", "uint16", "complex64")}})  # fmt: skip
    same = {f"same_{name}": Same(name) for name in DTYPES}
    same |= {f"same_int32_{aliases}": Same("int32", aliases) for aliases in ("a", "ab")}
    for name, module in same.items():
        save(module, root / name / "1", module.call)
    every = 'model_version_policy { all {} } version_labels { key: "stable" value: 1 }'
    blocks = [
        f'  config {{ name: "{name}" base_path: "{root.absolute() / name}" model_platform: "tensorflow"{policy} }}\n'
        for name, policy in (
            ("adder", f" {every}"),
            *((name, "") for name in ("affine", "echo", "judge", "scaled", "narrow", "uneven", *same)),
        )
    ]
    (root / "models.config").write_text(f"model_config_list {{\n{''.join(blocks)}}}\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
