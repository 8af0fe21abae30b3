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


def request(model: str, inputs: Mapping[str, np.ndarray], *, signature: str = "") -> predict_pb2.PredictRequest:
    """A Predict message for a signature of a model; none named: its default one."""
    message = predict_pb2.PredictRequest()
    message.model_spec.name, message.model_spec.signature_name = model, signature
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

    def predict(self, model: str, inputs: Mapping[str, np.ndarray], *, signature: str = "") -> dict[str, np.ndarray]:
        """Ask a model: inputs by name, with the batch first -> outputs by name."""
        reply = self._stub.Predict(request(model, inputs, signature=signature), timeout=self._timeout)
        return {name: tensors.from_proto(proto) for name, proto in reply.outputs.items()}

    def inputs(self, model: str, *, signature: str = "serving_default") -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """What a signature of a model takes: name -> (dtype, shape with -1 for any size); ValueError: there is none."""
        import tensorflow as tf

        message = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        message.model_spec.name = model
        reply = self._stub.GetModelMetadata(message, timeout=self._timeout)
        found = get_model_metadata_pb2.SignatureDefMap()
        reply.metadata["signature_def"].Unpack(found)
        if signature not in found.signature_def:
            known = ", ".join(sorted(name for name in found.signature_def if not name.startswith("__")))
            raise ValueError(f"{model} has no signature {signature}; one of {known}")
        return {
            name: (
                np.dtype(tf.dtypes.as_dtype(info.dtype).as_numpy_dtype),
                tuple(dim.size for dim in info.tensor_shape.dim),
            )
            for name, info in sorted(found.signature_def[signature].inputs.items())
        }
