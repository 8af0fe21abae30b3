"""A client of TensorFlow Serving's gRPC protocol: NumPy in, NumPy out."""

from collections.abc import Mapping

import grpc
import numpy as np
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from shared.serving import tensors

_UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def request(model: str, inputs: Mapping[str, np.ndarray]) -> predict_pb2.PredictRequest:
    """A Predict message for a model's default signature."""
    message = predict_pb2.PredictRequest()
    message.model_spec.name = model
    for name, value in inputs.items():
        message.inputs[name].CopyFrom(tensors.to_proto(value))
    return message


class Client:
    """A connection to one server, for any number of requests; a context manager.

    Errors of the server arrive as `grpc.RpcError` with the protocol's code and text.
    """

    def __init__(self, address: str = "127.0.0.1:8500", *, timeout: float = 60.0):
        self._channel = grpc.insecure_channel(address, options=_UNLIMITED)
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._timeout = timeout

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._channel.close()

    def predict(self, model: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Ask a model: inputs by name, with the batch first -> outputs by name."""
        reply = self._stub.Predict(request(model, inputs), timeout=self._timeout)
        return {name: tensors.from_proto(proto) for name, proto in reply.outputs.items()}

    def inputs(self, model: str) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """What a model's default signature takes: name -> (dtype, shape with -1 for any size)."""
        import tensorflow as tf

        message = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        message.model_spec.name = model
        reply = self._stub.GetModelMetadata(message, timeout=self._timeout)
        found = get_model_metadata_pb2.SignatureDefMap()
        reply.metadata["signature_def"].Unpack(found)
        signature = found.signature_def["serving_default"]
        return {
            name: (
                np.dtype(tf.dtypes.as_dtype(info.dtype).as_numpy_dtype),
                tuple(dim.size for dim in info.tensor_shape.dim),
            )
            for name, info in sorted(signature.inputs.items())
        }
