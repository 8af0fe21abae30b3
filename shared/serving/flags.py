"""The flags of `cornucopia serve`: tensorflow_model_server's names and defaults, and some of its own.

Importing this does not load TensorFlow, so that `--help` and a wrong flag are answered at once.
"""

import argparse
import dataclasses
import os
import shlex
import sys
from pathlib import Path

import tyro


@dataclasses.dataclass(frozen=True)
class Flags:
    """Serve models over TensorFlow Serving's gRPC and REST protocols."""

    models: str = ""  # a folder with a folder NAME/VERSION for each model; the default where no other flag names models
    host: str = "127.0.0.1"  # address to listen at; 0.0.0.0 lets other machines in, as TensorFlow Serving does
    port: int = 8500  # for gRPC; 0: none
    grpc_socket_path: str = ""  # listen for gRPC on this UNIX socket too
    rest_api_port: int = 0  # for REST; 0: none
    rest_api_num_threads: int = 0  # that answer REST requests; 0: four a processor
    rest_api_timeout_in_ms: int = 30_000  # after which a REST request is given up; 0: never
    rest_api_enable_cors_support: bool = False  # let pages of other origins ask
    model_name: str = "default"  # of the one model at --model-base-path
    model_base_path: str = ""  # folder of the one model, with a folder for each version
    model_config_file: str = ""  # ModelServerConfig as text; several models, their version policies and labels
    model_config_file_poll_wait_seconds: int = 0  # read it again so often; 0: once
    file_system_poll_wait_seconds: float = 1.0  # look for new versions so often; 0: once, fewer: never
    num_load_threads: int = 0  # that load versions; 0: one, of its own
    max_num_load_retries: int = 5  # of a version that does not load
    load_retry_interval_micros: int = 60_000_000  # between them
    enable_batching: bool = False  # run requests that wait together
    batching_parameters_file: str = ""  # BatchingParameters as text
    enable_per_model_batching_parameters: bool = False  # take batching_params.pbtxt from a version's folder
    allow_version_labels_for_unavailable_models: bool = False  # a new label may point at a version still to come
    enable_model_warmup: bool = True  # run a version's recorded requests before it answers
    num_request_iterations_for_warmup: int = 1  # times that each is run
    monitoring_config_file: str = ""  # MonitoringConfig as text; without it metrics are at the usual path
    ssl_config_file: str = ""  # SSLConfig as text, for gRPC: key, certificate, the clients' authority
    rest_ssl_config_file: str = ""  # the same for REST, which then is https; may be the same file
    grpc_channel_arguments: str = ""  # options of the gRPC server, as k=v,k=v
    grpc_max_threads: int = 0  # that answer gRPC requests; 0: four a processor, with batching 64
    enable_grpc_healthcheck_service: bool = True  # grpc.health.v1; here always
    enable_profiler: bool = True  # TensorFlow's, on the gRPC port; who asks for a profile gets it
    enforce_session_run_timeout: bool = False  # break off a run at its request's deadline; slower for small models
    enable_signature_method_name_check: bool = False  # refuse to predict, classify or regress by another signature
    enable_serialization_as_tensor_content: bool = False  # answer in tensor_content, not in typed fields
    saved_model_tags: str = "serve"  # of the graph to load, with commas between
    tensorflow_session_parallelism: int = 0  # threads within and between operations; 0: as many as processors
    tensorflow_intra_op_parallelism: int = 0  # threads within an operation
    tensorflow_inter_op_parallelism: int = 0  # threads between operations; 0: the request's own, without a hand-over
    token_file: str = ""  # a file with the bearer token that every request must carry
    max_request_bytes: int = 0  # of a message or body; 0: any
    max_requests_per_second: float = 0.0  # more are refused; 0: any
    max_requests_at_a_time: int = 0  # more are refused; 0: any
    client_header_timeout_seconds: float = 60.0  # for a REST client's handshake, then its headers, then its body
    request_log: str = ""  # write requests and answers to TFRecord files whose names begin so, one a model
    request_log_rate: float = 0.01  # share of the requests that are written
    log_format: str = "text"  # of the log on stderr: text or json
    access_log: bool = False  # a line for every request
    drain_seconds: float = 30.0  # that requests in flight have after SIGTERM
    flagfile: str = ""  # flags in a file, one a line; read again at SIGHUP


# Flags of tensorflow_model_server that mean nothing here, and why.
INERT = {
    "num_unload_threads": "versions are unloaded in a thread of their own",
    "platform_config_file": "there is one platform, tensorflow",
    "tensorflow_session_config_file": "the session has TensorFlow's defaults",
    "per_process_gpu_memory_fraction": "TensorFlow takes the GPU's memory as it needs it",
    "flush_filesystem_caches": "the system's caches are left alone",
    "remove_unused_fields_from_bundle_metagraph": "metadata tells all there is",
    "prefer_tflite_model": "SavedModels are served",
    "num_tflite_pools": "SavedModels are served",
    "num_tflite_interpreters_per_pool": "SavedModels are served",
    "thread_pool_factory_config_file": "the thread pool is the server's",
    "mixed_precision": "a model runs in the precision that it was exported in",
    "xla_cpu_compilation_enabled": "a model is compiled where it was exported so",
    "xla_gpu_compilation_enabled": "a model is compiled where it was exported so",
    "use_alts_credentials": "there is TLS, see --ssl_config_file",
    "skip_initialize_tpu": "there is no TPU",
    "version": "see pip show cornucopia-suite",
}

# What SIGHUP changes without a new start.
RELOADABLE = {"token_file", "max_requests_per_second", "max_requests_at_a_time", "request_log", "request_log_rate",
              "access_log", "model_config_file", "model_base_path", "model_name", "models"}  # fmt: skip


def parse(words: list[str]) -> tuple[Flags, list[str]]:
    """The flags in the spelling of either program (`--name=value`, booleans also `=true`), and warnings about some.

    Raises:
        ValueError: flags that contradict each other.
    """
    kept, warnings = [], []
    for word in _with_file(words):
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        plain = name.removeprefix("no_")
        if word.startswith("--") and plain in INERT:
            warnings.append(f"--{name} has no effect: {INERT[plain]}")
        elif word.startswith("--") and equals and plain in _BOOLEANS:
            if value.lower() not in ("true", "false", "1", "0"):
                raise ValueError(f"--{name} takes true or false, not {value!r}")
            kept.append(f"--{name}" if value.lower() in ("true", "1") else f"--no-{name}")
        else:
            kept.append(word)
    flags = tyro.cli(Flags, args=kept, prog="cornucopia serve")
    _check(flags)
    return flags, warnings


_BOOLEANS = {field.name for field in dataclasses.fields(Flags) if field.type is bool}


def _with_file(words: list[str]) -> list[str]:
    """The words, with those of a flag file before them, so that the command line wins."""
    only = argparse.ArgumentParser("cornucopia serve", add_help=False, allow_abbrev=False)
    only.add_argument("--flagfile", default="")
    path = only.parse_known_args(words)[0].flagfile
    if not path:
        return words
    lines = [line.strip() for line in Path(path).read_text().splitlines()]
    return [word for line in lines if line and not line.startswith("#") for word in shlex.split(line)] + words


def _check(flags: Flags) -> None:
    if not flags.port and not flags.grpc_socket_path:
        raise ValueError("at least one of --port and --grpc_socket_path must be given")
    if flags.rest_api_port > 0 and flags.rest_api_port == flags.port:
        raise ValueError(f"--port and --rest_api_port are both {flags.port}; they must differ")
    if flags.rest_ssl_config_file and not flags.rest_api_port:
        raise ValueError("--rest_ssl_config_file is given without --rest_api_port")
    if flags.batching_parameters_file and not flags.enable_batching:
        raise ValueError("--batching_parameters_file is given without --enable_batching")
    for name in ("models", "model_base_path"):
        if "://" in (path := getattr(flags, name)):
            raise ValueError(f"--{name}={path} is a URI, and the server reads folders; mount it, or copy it")
    named = [name for name in ("models", "model_base_path", "model_config_file") if getattr(flags, name)]
    if len(named) > 1 and "models" in named:
        raise ValueError(f"--{' and --'.join(named)} each say which models to serve; give one")
    if flags.tensorflow_session_parallelism and (flags.tensorflow_intra_op_parallelism
                                                 or flags.tensorflow_inter_op_parallelism):  # fmt: skip
        raise ValueError("--tensorflow_session_parallelism excludes --tensorflow_intra_op_parallelism and "
                         "--tensorflow_inter_op_parallelism")  # fmt: skip
    if not 0 <= flags.request_log_rate <= 1:
        raise ValueError(f"--request_log_rate is a share from 0 to 1, not {flags.request_log_rate}")
    if flags.log_format not in ("text", "json"):
        raise ValueError(f"--log_format is text or json, not {flags.log_format}")


def processors() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
