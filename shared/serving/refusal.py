"""What a server answers instead of a result."""

import grpc


class RefusedError(Exception):
    """A request that the protocol answers with an error status; `code` is its canonical status."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message)
        self.code = code


def invalid(message: str) -> RefusedError:
    """The refusal of a request that is wrong in itself."""
    return RefusedError(grpc.StatusCode.INVALID_ARGUMENT, message)


class LoadError(ValueError):
    """A version that cannot be loaded; `code` is the canonical status that TensorFlow Serving tells of it."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message)
        self.code = code
