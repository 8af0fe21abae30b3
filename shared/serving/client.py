"""A client of TensorFlow Serving's gRPC protocol: NumPy in, NumPy out."""

from collections.abc import Mapping

import grpc
import numpy as np

from shared.serving import protocol, tensors

_UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def request(model: str, inputs: Mapping[str, np.ndarray], *, signature: str = ""):
    """A Predict message for a signature of a model; none named: its default one."""
    message = protocol.PredictRequest()
    message.model_spec.name, message.model_spec.signature_name = model, signature
    for name, value in inputs.items():
        tensors.fill(message.inputs[name], np.asarray(value))
    return message


class Client:
    """A connection to one server, for any number of requests; a context manager."""

    def __init__(self, address: str = "127.0.0.1:8500", *, timeout: float = 60.0):
        self._channel = grpc.insecure_channel(address, options=_UNLIMITED)
        self._timeout = timeout

    def _call(self, name, message):
        reply = protocol.methods(protocol.PREDICTION)[name][1]
        call = self._channel.unary_unary(f"/{protocol.PREDICTION}/{name}",
                                         request_serializer=type(message).SerializeToString,
                                         response_deserializer=reply.FromString)
        return call(message, timeout=self._timeout)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._channel.close()

    def predict(self, model: str, inputs: Mapping[str, np.ndarray], *, signature: str = "") -> dict[str, np.ndarray]:
        """Ask a model: inputs by name, with the batch first -> outputs by name."""
        reply = self._call("Predict", request(model, inputs, signature=signature))
        return {name: tensors.from_proto(proto) for name, proto in reply.outputs.items()}
