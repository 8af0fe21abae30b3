"""TensorFlow Serving's protocol: a server for SavedModels, a client, and the check that ends every run."""

from shared.serving.checking import check

__all__ = ["check"]
