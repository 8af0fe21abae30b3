"""A loaded version, and how TensorFlow is asked to run it."""

import itertools

import numpy as np
import pytest
import serving_models
import tensorflow as tf

from shared.serving.servable import Servable


@pytest.mark.parametrize(("between", "pool"), [(0, -1), (2, 0)])  # -1: the thread that asks; 0: TensorFlow's pool
def test_threads_between_operations(tmp_path, monkeypatch, between, pool):
    asked = []
    make = tf.compat.v1.Session._make_callable_from_options

    def note(session, options):
        asked.append(options.run_options.inter_op_thread_pool)
        return make(session, options)

    monkeypatch.setattr(tf.compat.v1.Session, "_make_callable_from_options", note)
    serving_models.save(serving_models.Affine(), tmp_path / "1")
    version = Servable("affine", 1, tmp_path / "1", threads=(0, between))
    (y,) = version.run(*version.bind("serving_default", {"x": np.ones((1, 2), np.float32)}))
    assert y.tolist() == [[3.0, 3.0]]
    assert asked == [pool]


def test_outputs_in_any_order_run_alike(tmp_path):
    class Three(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
        def __call__(self, x):
            return {"c": x + 3, "a": x + 1, "b": x + 2}

    serving_models.save(Three(), tmp_path / "1")
    version = Servable("three", 1, tmp_path / "1")
    inputs = {"x": np.zeros(1, np.float32)}
    for wanted in itertools.permutations("abc", 2):
        bound = version.bind("serving_default", inputs, wanted)
        assert [float(one[0]) for one in version.run(*bound)] == ["_abc".index(name) for name in sorted(wanted)]
    # One of the signature as a whole, and one of each two: not one of each order.
    assert len([key for key in version._callables if isinstance(key, tuple)]) == 1 + 3
