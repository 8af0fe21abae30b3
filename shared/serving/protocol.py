"""TensorFlow Serving's messages and services, without TensorFlow.

The official stubs import all of TensorFlow. These are the same messages, from the descriptors in `protocol.binpb`
(`tests/make_protocol.py` takes them out of the stubs, and a test compares), in a pool of their own, so that a process
may hold both. What one writes the other reads: only bytes pass between them.
"""

from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

pool = descriptor_pool.DescriptorPool()
for _file in descriptor_pb2.FileDescriptorSet.FromString(Path(__file__).with_name("protocol.binpb").read_bytes()).file:
    pool.Add(_file)


def message(name: str) -> type:
    """The class of a message by its full name."""
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


def methods(service: str) -> dict[str, tuple[type, type]]:
    """The calls of a service by its full name: name -> (class of the request, class of the reply)."""
    found = pool.FindServiceByName(service).methods
    return {
        method.name: (message(method.input_type.full_name), message(method.output_type.full_name)) for method in found
    }


PREDICTION, MODEL = "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"
PROFILER = "tensorflow.ProfilerService"

BatchingParameters = message("tensorflow.serving.BatchingParameters")
ClassificationRequest = message("tensorflow.serving.ClassificationRequest")
ClassificationResponse = message("tensorflow.serving.ClassificationResponse")
Example = message("tensorflow.Example")
GetModelMetadataRequest = message("tensorflow.serving.GetModelMetadataRequest")
GetModelMetadataResponse = message("tensorflow.serving.GetModelMetadataResponse")
GetModelStatusRequest = message("tensorflow.serving.GetModelStatusRequest")
GetModelStatusResponse = message("tensorflow.serving.GetModelStatusResponse")
Input = message("tensorflow.serving.Input")
ModelServerConfig = message("tensorflow.serving.ModelServerConfig")
ModelSpec = message("tensorflow.serving.ModelSpec")
MonitoringConfig = message("tensorflow.serving.MonitoringConfig")
MultiInferenceRequest = message("tensorflow.serving.MultiInferenceRequest")
MultiInferenceResponse = message("tensorflow.serving.MultiInferenceResponse")
PredictionLog = message("tensorflow.serving.PredictionLog")
PredictRequest = message("tensorflow.serving.PredictRequest")
PredictResponse = message("tensorflow.serving.PredictResponse")
ProfileRequest = message("tensorflow.ProfileRequest")
ProfileResponse = message("tensorflow.ProfileResponse")
RegressionRequest = message("tensorflow.serving.RegressionRequest")
RegressionResponse = message("tensorflow.serving.RegressionResponse")
ReloadConfigRequest = message("tensorflow.serving.ReloadConfigRequest")
ReloadConfigResponse = message("tensorflow.serving.ReloadConfigResponse")
SavedModel = message("tensorflow.SavedModel")
SignatureDef = message("tensorflow.SignatureDef")
SignatureDefMap = message("tensorflow.serving.SignatureDefMap")
SSLConfig = message("tensorflow.serving.SSLConfig")
TensorProto = message("tensorflow.TensorProto")
TerminateRequest = message("tensorflow.TerminateRequest")
XSpace = message("tensorflow.profiler.XSpace")

_DATA_TYPES = pool.FindEnumTypeByName("tensorflow.DataType")


def type_name(number: int) -> str:
    """A data type as TensorFlow writes it in its errors: 1 is `float`, 7 is `string`."""
    value = _DATA_TYPES.values_by_number.get(number)
    return value.name.removeprefix("DT_").lower() if value else f"unknown ({number})"


def add(serialized_file: bytes) -> None:
    """Make another file of descriptors known, which reflection then tells about."""
    pool.AddSerializedFile(serialized_file)
