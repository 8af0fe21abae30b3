"""Make shared/serving/protocol.binpb anew: `python tests/make_protocol.py`, after an update of tensorflow-serving-api.

The messages and services come from the official stubs. What these lack is declared below as tensorflow_serving/config/
{monitoring,ssl}_config.proto, servables/tensorflow/session_bundle_config.proto and, as far as it is served here,
tsl/profiler/protobuf/profiler_service.proto have it.
"""

from pathlib import Path

from google.protobuf import descriptor_pb2, wrappers_pb2  # noqa: F401, wrappers is a dependency of what is built
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.tsl.profiler.protobuf import profiler_options_pb2, xplane_pb2
from tensorflow_serving.apis import model_service_pb2, prediction_log_pb2, prediction_service_pb2
from tensorflow_serving.config import model_server_config_pb2

TARGET = Path(__file__).parent.parent / "shared" / "serving" / "protocol.binpb"
INT64 = ".google.protobuf.Int64Value"
FIELDS = {
    "PrometheusConfig": [("enable", 1, "bool"), ("path", 2, "string")],
    "MonitoringConfig": [("prometheus_config", 1, ".tensorflow.serving.PrometheusConfig")],
    "SSLConfig": [
        ("server_key", 1, "string"), ("server_cert", 2, "string"), ("custom_ca", 3, "string"),
        ("client_verify", 4, "bool"),
    ],
    "BatchingParameters": [
        ("max_batch_size", 1, INT64), ("batch_timeout_micros", 2, INT64), ("max_enqueued_batches", 3, INT64),
        ("num_batch_threads", 4, INT64), ("thread_pool_name", 5, ".google.protobuf.StringValue"),
        ("enable_large_batch_splitting", 8, ".google.protobuf.BoolValue"), ("max_execution_batch_size", 9, INT64),
        ("allowed_batch_sizes", 6, "int64*"), ("pad_variable_length_inputs", 7, "bool"),
    ],
}  # fmt: skip
PROFILER = {
    "ProfileToolData": [("name", 1, "string"), ("data", 2, "bytes")],
    "ProfileRequest": [
        ("duration_ms", 1, "uint64"), ("max_events", 2, "uint64"), ("tools", 3, "string*"),
        ("opts", 4, ".tensorflow.ProfileOptions"), ("repository_root", 5, "string"), ("session_id", 6, "string"),
        ("host_name", 7, "string"), ("emit_xspace", 9, "bool"),
    ],
    "ProfileResponse": [
        ("tool_data", 6, ".tensorflow.ProfileToolData*"), ("empty_trace", 7, "bool"),
        ("xspace", 8, ".tensorflow.profiler.XSpace"),
    ],
    "TerminateRequest": [("session_id", 1, "string")],
    "TerminateResponse": [],
}  # fmt: skip


def built() -> descriptor_pb2.FileDescriptorSet:
    """Every file that the protocol needs, each after those that it depends on."""
    files, seen = [], set()

    def add(descriptor):
        if descriptor.name not in seen:
            seen.add(descriptor.name)
            for needed in descriptor.dependencies:
                add(needed)
            files.append(descriptor_pb2.FileDescriptorProto.FromString(descriptor.serialized_pb))

    for module in (prediction_service_pb2, model_service_pb2, prediction_log_pb2, model_server_config_pb2,
                   saved_model_pb2, profiler_options_pb2, xplane_pb2):  # fmt: skip
        add(module.DESCRIPTOR)
    serving = _declared("cornucopia/missing_from_the_stubs.proto", "tensorflow.serving", FIELDS,
                        "google/protobuf/wrappers.proto")  # fmt: skip
    profiler = _declared("cornucopia/profiler_service.proto", "tensorflow", PROFILER,
                         profiler_options_pb2.DESCRIPTOR.name, xplane_pb2.DESCRIPTOR.name)  # fmt: skip
    service = profiler.service.add(name="ProfilerService")
    for call in ("Profile", "Terminate"):
        asked, told = f".tensorflow.{call}Request", f".tensorflow.{call}Response"
        service.method.add(name=call, input_type=asked, output_type=told)
    return descriptor_pb2.FileDescriptorSet(file=[*files, serving, profiler])


def _declared(path: str, package: str, messages: dict[str, list], *needed: str) -> descriptor_pb2.FileDescriptorProto:
    kind = descriptor_pb2.FieldDescriptorProto
    plain = {name: getattr(kind, f"TYPE_{name.upper()}") for name in ("bool", "bytes", "int64", "string", "uint64")}
    file = descriptor_pb2.FileDescriptorProto(name=path, package=package, syntax="proto3", dependency=needed)
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field, number, wanted in fields:
            label = kind.LABEL_REPEATED if wanted.endswith("*") else kind.LABEL_OPTIONAL
            wanted = wanted.removesuffix("*")
            added = message.field.add(name=field, number=number, label=label)
            if wanted in plain:
                added.type = plain[wanted]
            else:
                added.type, added.type_name = kind.TYPE_MESSAGE, wanted
    return file


if __name__ == "__main__":
    TARGET.write_bytes(built().SerializeToString(deterministic=True))
