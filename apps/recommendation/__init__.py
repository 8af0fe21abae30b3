"""Recommendation: which items a person takes next.

TensorFlow Recommenders loads only where `tf.keras` is Keras 2, and `tf.keras` is settled by its first use: here, in
the process of a recommendation task. The flag goes again at once, so that no process started from this one sees it.
"""

import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"
try:
    import tensorflow_recommenders  # noqa: F401
finally:
    del os.environ["TF_USE_LEGACY_KERAS"]
