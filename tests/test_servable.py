"""A loaded version, and how TensorFlow is asked to run it."""

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
