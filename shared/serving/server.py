"""A gRPC server for SavedModels that speaks TensorFlow Serving's protocol.

Of `PredictionService` it answers Predict and GetModelMetadata, of `ModelService` GetModelStatus, with TensorFlow
Serving's status codes and messages. The other calls answer UNIMPLEMENTED.
"""

import contextlib
import importlib.util
import logging
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from shared import export
from shared.serving import tensors

_UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1),
              ("grpc.so_reuseport", 0)]  # fmt: skip
log = logging.getLogger("cornucopia.serve")


def _load(folder: Path):
    """A SavedModel; one with operations of TensorFlow Text, which TensorFlow Serving has built in, loads them first."""
    try:
        return tf.saved_model.load(str(folder))
    except (OSError, RuntimeError, tf.errors.NotFoundError) as error:
        if "Op type not registered" not in str(error) or importlib.util.find_spec("tensorflow_text") is None:
            raise
        importlib.import_module("tensorflow_text")
        return tf.saved_model.load(str(folder))


class RefusedError(Exception):
    """A request that the protocol answers with an error status."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message)
        self.code = code


class Model:
    """One version of a model, loaded, with its warm-up requests run."""

    def __init__(self, folder: Path):
        """Load a version.

        Raises:
            ValueError: the folder holds no SavedModel that can be loaded, or its warm-up fails; says why.
        """
        if not (folder / "saved_model.pb").exists():
            raise ValueError(f"{folder} holds no saved_model.pb")
        try:
            self._loaded = _load(folder)
            self.signatures = dict(self._loaded.signatures)
            graphs = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
            self.definitions = graphs.meta_graphs[0].signature_def
            self._warm_up(folder / "assets.extra" / "tf_serving_warmup_requests")
        except (OSError, RuntimeError, tf.errors.OpError, RefusedError) as error:
            raise ValueError(f"{folder} cannot be loaded: {error}") from error

    def _warm_up(self, path: Path) -> None:
        from tensorflow_serving.apis import prediction_log_pb2

        if path.exists():
            for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
                message = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
                self.predict(message)

    def predict(self, message: predict_pb2.PredictRequest) -> tuple[str, dict[str, tf.Tensor]]:
        """Run one request; return the signature that ran and the outputs that were asked for."""
        key = message.model_spec.signature_name or "serving_default"
        if key not in self.signatures:
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{key}" not found.')
        signature, definition = self.signatures[key], self.definitions[key]
        self._check_names(message, definition)
        arguments = {}
        for name, proto in message.inputs.items():
            expected = tf.dtypes.as_dtype(definition.inputs[name].dtype)
            try:
                array = tensors.from_proto(proto)
            except ValueError as error:
                raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"tensor parsing error: {name}") from error
            if proto.dtype != expected.as_datatype_enum:
                index, wanted = sorted(definition.inputs).index(name), _name(expected.as_datatype_enum)
                text = f"Expects arg[{index}] to be {wanted} but {_name(proto.dtype)} is provided"
                raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, text)
            arguments[name] = tf.constant(array, dtype=expected)
        try:
            outputs = signature(**arguments)
        except tf.errors.OpError as error:
            code = getattr(grpc.StatusCode, _CODES.get(error.error_code, "UNKNOWN"))
            raise RefusedError(code, error.message) from error
        except (TypeError, ValueError) as error:
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
        wanted = list(message.output_filter) or list(outputs)
        return key, {name: outputs[name] for name in wanted}

    @staticmethod
    def _check_names(message: predict_pb2.PredictRequest, definition) -> None:
        sent, known, wanted = set(message.inputs), set(definition.inputs), list(message.output_filter)
        refuse = None
        if len(sent) != len(known):
            refuse = (
                f"input size does not match signature: {len(sent)}!={len(known)} len({{{','.join(sorted(sent))}}}) != "
                f"len({{{','.join(sorted(known))}}}). Sent extra: {{{','.join(sorted(sent - known))}}}. "
                f"Missing but required: {{{','.join(sorted(known - sent))}}}."
            )
        elif sent != known:
            absent = min(known - sent)
            feed = definition.inputs[absent].name
            refuse = (f"Signature input alias: {absent}(feed name: {feed}) not found in request and no default value "
                      f"provided. Inputs expected to be in the set {{{','.join(sorted(known))}}}.")  # fmt: skip
        for position, name in enumerate(wanted):
            if name not in definition.outputs:
                outputs = ",".join(sorted(definition.outputs))
                refuse = (f"output tensor alias not found in signature: {name} "
                          f"Outputs expected to be in the set {{{outputs}}}.")  # fmt: skip
            elif name in wanted[:position]:
                refuse = f"duplicate output tensor alias: {name}"
        if refuse:
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, refuse)


def _name(dtype: int) -> str:
    return types_pb2.DataType.Name(dtype).removeprefix("DT_").lower()


_CODES = {code: name for name, code in vars(tf.errors).items() if isinstance(code, int)}


class Server(prediction_service_pb2_grpc.PredictionServiceServicer, model_service_pb2_grpc.ModelServiceServicer):
    """Serves one version each of some models; a context manager that stops what it started.

    `models` is name -> folder of a version, whose number is the folder's name; `port` 0 takes a free one.
    """

    def __init__(self, models: Mapping[str, Path], *, host: str = "127.0.0.1", port: int = 0):
        """Load all models, then open the port: an open port means ready.

        Raises:
            ValueError: a model cannot be loaded.
            OSError: the port is taken.
        """
        self._models: dict[tuple[str, int], Model] = {}
        for name, folder in models.items():
            number = int(folder.name) if folder.name.isdecimal() else 0
            self._models[name, number] = Model(folder)
            log.info("loaded %s version %d", name, number)
        self._grpc = grpc.server(ThreadPoolExecutor(4), options=_UNLIMITED)
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(self, self._grpc)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(self, self._grpc)
        try:
            self.port = self._grpc.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise OSError(
                f"port {port} of {host} cannot be had: something else listens there; choose another"
            ) from error
        self.address = f"{host}:{self.port}"
        self._grpc.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self, grace: float = 10.0) -> None:
        """Take no new requests, let those in flight finish within `grace` seconds, close the port."""
        self._grpc.stop(grace).wait()

    def _find(self, spec: model_pb2.ModelSpec) -> tuple[int, Model]:
        if not spec.name:
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "ModelSpec has no name specified.")
        if spec.version_label:
            message = f"Unrecognized servable version label: {spec.version_label}"
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, message)
        if spec.HasField("version"):
            number, text = spec.version.value, f"Specific({spec.name}, {spec.version.value})"
        else:
            number = max((number for name, number in self._models if name == spec.name), default=-1)
            text = f"Latest({spec.name})"
        if (spec.name, number) not in self._models:
            raise RefusedError(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {text}")
        return number, self._models[spec.name, number]

    def Predict(self, request, context):  # noqa: N802, the protocol's name
        reply = predict_pb2.PredictResponse()
        with _refusing(context):
            if not request.HasField("model_spec"):
                raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "Missing ModelSpec")
            number, model = self._find(request.model_spec)
            key, outputs = model.predict(request)
            reply.model_spec.name, reply.model_spec.signature_name = request.model_spec.name, key
            reply.model_spec.version.value = number
            for name, value in outputs.items():
                reply.outputs[name].CopyFrom(tensors.to_proto(value.numpy()))
        return reply

    def GetModelMetadata(self, request, context):  # noqa: N802, the protocol's name
        reply = get_model_metadata_pb2.GetModelMetadataResponse()
        with _refusing(context):
            if not request.HasField("model_spec"):
                raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "Missing ModelSpec")
            if not request.metadata_field:
                message = "GetModelMetadataRequest must specify at least one metadata_field"
                raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, message)
            for field in request.metadata_field:
                if field != "signature_def":
                    raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"Metadata field {field} is not supported")
            number, model = self._find(request.model_spec)
            reply.model_spec.name = request.model_spec.name
            reply.model_spec.version.value = number
            found = get_model_metadata_pb2.SignatureDefMap(signature_def=model.definitions)
            reply.metadata["signature_def"].Pack(found)
        return reply

    def GetModelStatus(self, request, context):  # noqa: N802, the protocol's name
        reply = get_model_status_pb2.GetModelStatusResponse()
        with _refusing(context):
            spec = request.model_spec
            if not spec.name:
                raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "Missing ModelSpec")
            numbers = sorted((number for name, number in self._models if name == spec.name), reverse=True)
            if not numbers:
                message = f"Could not find any versions of model {spec.name}"
                raise RefusedError(grpc.StatusCode.NOT_FOUND, message)
            if spec.HasField("version"):
                numbers = [number for number in numbers if number == spec.version.value]
                if not numbers:
                    message = f"Could not find version {spec.version.value} of model {spec.name}"
                    raise RefusedError(grpc.StatusCode.NOT_FOUND, message)
            for number in numbers:
                version = reply.model_version_status.add(version=number)
                version.state = get_model_status_pb2.ModelVersionStatus.AVAILABLE
                version.status.error_code = 0
        return reply


@contextlib.contextmanager
def _refusing(context: grpc.ServicerContext):
    try:
        yield
    except RefusedError as error:
        text = str(error)
        context.abort(error.code, text if len(text) <= 1024 else text[: 1024 - 12] + "...TRUNCATED")


def newest(folder: Path) -> dict[str, Path]:
    """The newest version of each model below a folder in TensorFlow Serving's layout: name -> folder of a version.

    Raises:
        FileNotFoundError: no model is there.
    """
    found = {}
    for base in sorted(folder.glob("*")):
        if base.is_dir() and (versions := export.versions(base)):
            found[base.name] = versions[max(versions)]
    if not found:
        raise FileNotFoundError(f"no model is below {folder}; train one first, e.g. make vision.classify")
    return found


def serve(folder: Path, *, host: str, port: int) -> None:
    """Serve the newest version of every model below a folder until SIGINT or SIGTERM, then finish what is in flight."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    models = newest(folder)
    with Server(models, host=host, port=port) as server:
        for name, path in models.items():
            print(f"serving {name} version {path.name}")
        print(f"gRPC on {server.address}; Ctrl-C ends", flush=True)
        stop.wait()
