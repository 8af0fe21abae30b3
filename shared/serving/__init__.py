"""TensorFlow Serving's protocol: a server for SavedModels, a client, and the check that ends every run."""

from shared.serving.check import check

__all__ = ["check"]
