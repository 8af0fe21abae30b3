"""TensorFlow Serving's protocol: a server for SavedModels, a client, and the check that ends every run.

Nothing is imported here: `client` and what it needs load without TensorFlow.
"""
