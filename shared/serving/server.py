"""A server for SavedModels that speaks TensorFlow Serving's protocols: gRPC and REST, one process, no Docker."""

import contextlib
import dataclasses
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
from google.protobuf import text_format

from shared.serving import batching, protocol, tensors, tls
from shared.serving.core import Core
from shared.serving.flags import RELOADABLE, Flags, parse, processors
from shared.serving.gate import Gate, Recorder
from shared.serving.grpc_transport import Grpc, told
from shared.serving.inference import Inference, Stages
from shared.serving.models import Models
from shared.serving.refusal import LoadError, RefusedError
from shared.serving.rest import Rest
from shared.serving.servable import DEFAULT, Servable
from shared.serving.watching import Metrics

METRICS = "/monitoring/prometheus/metrics"
SWITCH_SECONDS = 0.002  # a thread that computes in Python gives way to one that answers so soon
log = logging.getLogger("cornucopia.serve")


class Server:
    """Serves what the flags say; a context manager that stops it.

    All models are loaded before a port opens: an open port means ready. Port 0 in a flag opens none; -1 a free one.
    """

    def __init__(self, flags: Flags):
        """Load and open.

        Raises:
            ValueError: a model cannot be loaded, or a file that a flag names is wrong.
            OSError: a port is taken.
        """
        self.flags = flags
        self._rules = batching.rules(_read(flags.batching_parameters_file, protocol.BatchingParameters),
                                     threads=processors()) if flags.enable_batching else None  # fmt: skip
        self._slots = batching.Slots(self._rules.threads) if self._rules else None  # that all versions share
        self._metrics, self._rest, self._grpc = Metrics(), None, None
        self._configuring, self._known = threading.Lock(), self._config(flags)  # what was configured last, but by gRPC
        path, rest_path = flags.ssl_config_file, flags.rest_ssl_config_file
        self._credentials = tls.server_credentials(_read(path, protocol.SSLConfig), path) if path else None
        self._context = tls.server_context(_read(rest_path, protocol.SSLConfig), rest_path) if rest_path else None
        for port in (flags.port, flags.rest_api_port):
            _check_free(flags.host.strip("[]"), port)  # now, not when all models are loaded
        sys.setswitchinterval(SWITCH_SECONDS)
        self._stopped, self.core = False, None
        with _starting():
            self._models = Models(
                self._known,
                self._load,
                poll=flags.file_system_poll_wait_seconds,
                retries=flags.max_num_load_retries,
                retry_seconds=flags.load_retry_interval_micros / 1e6,
                threads=flags.num_load_threads,
                labels_before_versions=flags.allow_version_labels_for_unavailable_models,
            )
        self._stopping = threading.Event()
        try:
            if flags.file_system_poll_wait_seconds < 0:
                self._models.refresh()
            with _starting():
                self._models.wait()
            self.core = Core(
                models=self._models,
                inference=Inference(self._models, check_methods=flags.enable_signature_method_name_check),
                metrics=self._metrics,
                gate=Gate(**_gate(flags)),
                recorder=_recorder(flags),
                access=_access if flags.access_log else None,
                as_content=flags.enable_serialization_as_tensor_content,
            )
            self._open()
        except BaseException:
            self.stop(0)
            raise
        self._watcher = threading.Thread(target=self._watch, name="config", daemon=True)
        self._watcher.start()

    def _open(self) -> None:
        flags, core = self.flags, self.core
        host = flags.host.strip("[]")  # an IPv6 address comes with or without brackets
        shown = f"[{host}]" if ":" in host else host
        options = {key: int(value) if value.lstrip("-").isdecimal() else value for key, _, value in
                   (pair.partition("=") for pair in flags.grpc_channel_arguments.split(",") if pair)}  # fmt: skip
        threads = flags.grpc_max_threads or (64 if flags.enable_batching else 4 * processors())
        self._grpc = Grpc(core, threads=threads, options=options, largest=flags.max_request_bytes or -1,
                          profiler=flags.enable_profiler)  # fmt: skip
        if flags.port:
            self.port = self._grpc.bind(f"{shown}:{max(flags.port, 0)}", self._credentials)
            self.address = f"{shown}:{self.port}"
        if flags.grpc_socket_path:
            self._grpc.bind(f"unix:{flags.grpc_socket_path}", self._credentials)
        if flags.rest_api_port:
            monitoring = _read(flags.monitoring_config_file, protocol.MonitoringConfig).prometheus_config
            wanted = monitoring.enable or not flags.monitoring_config_file
            self._rest = Rest(
                core,
                host=host,
                port=max(flags.rest_api_port, 0),
                threads=flags.rest_api_num_threads or 4 * processors(),
                seconds=flags.rest_api_timeout_in_ms / 1000,
                cors=flags.rest_api_enable_cors_support,
                largest=flags.max_request_bytes,
                metrics_path=(monitoring.path or METRICS) if wanted else "",
                patience=flags.client_header_timeout_seconds,
                context=self._context,
            )
            self.rest_address = f"{shown}:{self._rest.port}"
        self._grpc.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self, grace: float = 10.0) -> None:
        """Take no new requests, let those in flight finish within `grace` seconds, close the ports."""
        if self._stopped:
            return
        self._stopped = True
        self._stopping.set()
        ended = self._grpc.stop(grace) if self._grpc else None
        if self._rest:
            self._rest.stop(grace)
        if ended:
            ended.wait()
            self._grpc.close()
        self._models.stop()
        if self.core and self.core.recorder:
            self.core.recorder.close()

    def _load(self, name: str, number: int, folder: Path) -> Servable:
        """A version, loaded and warmed up."""
        flags = self.flags
        both = flags.tensorflow_session_parallelism
        threads = (both or flags.tensorflow_intra_op_parallelism, both or flags.tensorflow_inter_op_parallelism)
        servable = Servable(name, number, folder, tags=flags.saved_model_tags.split(","), threads=threads,
                            limited=flags.enforce_session_run_timeout)  # fmt: skip
        rules = self._rules
        own = folder / "batching_params.pbtxt"
        if flags.enable_batching and flags.enable_per_model_batching_parameters and own.exists():
            rules = batching.rules(_read(str(own), protocol.BatchingParameters), threads=processors())
        if rules is not None:
            slots = self._slots if rules is self._rules else None
            servable.batching = batching.Batching(rules, self._metrics.batch, slots)
        if flags.enable_model_warmup:
            begun = time.perf_counter()
            if self._warm_up(servable):
                self._metrics.warm_up(name, time.perf_counter() - begun)
        return servable

    def _warm_up(self, servable: Servable) -> int:
        """Run a version's recorded requests; return how many. LoadError where one fails: the version is bad."""
        inference, logs = Inference(None), servable.warm_ups()
        for position, record in enumerate(logs):
            kind = record.WhichOneof("log_type")
            try:
                for _ in range(max(1, self.flags.num_request_iterations_for_warmup)):
                    if kind == "predict_log":
                        request = record.predict_log.request
                        inputs = {alias: tensors.from_proto(proto) for alias, proto in request.inputs.items()}
                        key = request.model_spec.signature_name or DEFAULT
                        inference.predict(servable, key, inputs, request.output_filter, Stages("Warmup"))
                    elif kind == "classify_log":
                        inference.classify(servable, record.classify_log.request, Stages("Warmup"))
                    elif kind == "regress_log":
                        inference.regress(servable, record.regress_log.request, Stages("Warmup"))
                    elif kind == "multi_inference_log":
                        inference.infer(servable, record.multi_inference_log.request, Stages("Warmup"))
                    elif kind is not None:  # an empty record does nothing, in TensorFlow Serving neither
                        text = f"Unsupported log_type for warmup: {kind}"
                        raise RefusedError(grpc.StatusCode.UNIMPLEMENTED, text)
            except (RefusedError, ValueError) as error:
                code = error.code if isinstance(error, RefusedError) else grpc.StatusCode.INVALID_ARGUMENT
                text = f"{servable.folder} cannot be loaded: warm-up request {position} fails: {error}"
                raise LoadError(code, text) from error
        return len(logs)

    # What changes while the server runs.

    def _config(self, flags: Flags) -> protocol.ModelServerConfig:
        if flags.model_config_file:
            return _read(flags.model_config_file, protocol.ModelServerConfig)
        config = protocol.ModelServerConfig()
        config.model_config_list.SetInParent()  # also a tree without models is a list
        if flags.model_base_path:
            found = {flags.model_name: Path(flags.model_base_path)}
        else:
            found = tree(Path(flags.models or "saved_models"))
        for name, base in found.items():
            path = str(base.absolute())
            config.model_config_list.config.add(name=name, base_path=path, model_platform="tensorflow")
        return config

    def _watch(self) -> None:
        """Follow the configuration file, or the tree of models, where it changes."""
        while not self._stopping.wait(self._pause() or 1.0):
            if not self._pause():
                continue  # nothing is followed, until new flags say so
            try:
                with self._configuring:
                    # What was refused is not known, and so is tried again: a label's version may answer by then.
                    if (config := self._config(self.flags)) != self._known:
                        self.reconfigure(config)
            except (ValueError, OSError) as error:
                log.error("the new configuration is not taken: %s", error)

    def _pause(self) -> float:
        """Seconds between two looks at what says which models there are; 0 where it is read once."""
        flags = self.flags
        if flags.model_config_file:
            return max(0.0, flags.model_config_file_poll_wait_seconds)
        return 0.0 if flags.model_base_path else max(0.0, flags.file_system_poll_wait_seconds)

    def reconfigure(self, config: protocol.ModelServerConfig) -> None:
        """Serve what a new configuration says; ValueError where it is wrong, and then nothing changes."""
        try:
            # Not awaited: a model that does not come would hold up the next correction, and the end.
            self._models.configure(config, awaited=False)
        except RefusedError as error:
            raise ValueError(str(error)) from error
        self._known = config

    def reload(self, flags: Flags) -> None:
        """Take new flags, as far as that goes without a new start; ValueError or OSError where one is wrong."""
        changed = {name for name, value in dataclasses.asdict(flags).items() if value != getattr(self.flags, name)}
        for name in sorted(changed - RELOADABLE):
            log.warning("--%s takes effect at the next start", name)
        flags = dataclasses.replace(self.flags, **{name: getattr(flags, name) for name in changed & RELOADABLE})
        # What may be refused comes first, so that then nothing is taken.
        core, gate = self.core, _gate(flags)
        logs = changed & {"request_log", "request_log_rate"}
        named = flags.model_config_file or changed & {"model_config_file", "model_base_path", "model_name", "models"}
        with self._configuring:
            config = self._config(flags) if named else None
            recorder = _recorder(flags) if logs else None
            if config is not None:
                try:
                    self.reconfigure(config)
                except ValueError as error:
                    if config != self._known:
                        raise
                    log.error("the configuration is not taken again: %s", error)  # the other flags are taken
            self.flags = flags
        core.gate.set(**gate)
        core.access = _access if flags.access_log else None
        if logs:
            before, core.recorder = core.recorder, recorder
            if before:
                before.close()


def _check_free(host: str, port: int) -> None:
    """OSError where something listens at a port above 0, or there is no such port; nothing is opened."""
    if port > 65535:  # the system would take what is left of its upper bits
        raise OSError(f"port {port} of {host} cannot be had: the last one is 65535; choose another")
    if port > 0:
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what ended just now is no matter
                probe.bind(address)
        except OSError as error:
            text = f"port {port} of {host} cannot be had: {error.strerror or error}; choose another"
            raise OSError(text) from error


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    try:
        yield
    except RefusedError as error:
        raise ValueError(f"Failed to start server. Error: {error}") from error


def tree(folder: Path) -> dict[str, Path]:
    """The models below a folder in TensorFlow Serving's layout, name -> base path.

    Raises:
        FileNotFoundError: no model is there.
    """
    found = {base.name: base for base in sorted(folder.glob("*")) if base.is_dir() and not base.name.startswith(".")
             and any(child.name.isdecimal() and child.is_dir() for child in base.iterdir())}  # fmt: skip
    if not found:
        raise FileNotFoundError(f"no model is below {folder}; train one first, e.g. make vision.classify")
    return found


def _gate(flags: Flags) -> dict:
    token = Path(flags.token_file).read_text().strip() if flags.token_file else ""
    if flags.token_file and not token:
        raise ValueError(f"--token_file={flags.token_file} is empty; put a token in it")
    return {"token": token, "rate": flags.max_requests_per_second, "most": flags.max_requests_at_a_time}


def _recorder(flags: Flags) -> Recorder | None:
    return Recorder(flags.request_log, flags.request_log_rate) if flags.request_log else None


def _text(path: str) -> str:
    return Path(path).read_text()


def _read(path: str, kind: type):
    return _parse(_text(path), kind, path) if path else kind()


def _parse(text: str, kind: type, path: str):
    try:
        return text_format.Parse(text, kind(), descriptor_pool=protocol.pool)
    except text_format.ParseError as error:
        name = kind.DESCRIPTOR.full_name
        raise ValueError(f"Error parsing text-format {name}: {path}: {error}") from error


def _access(
    entrypoint: str, stages: Stages, status: str, seconds: float, request_id: str, traceparent: str = ""
) -> None:
    ids = {"x-request-id": request_id, "traceparent": traceparent}
    fields = {"entrypoint": entrypoint, "api": stages.api, "model": stages.model or "", "status": status,
              "milliseconds": round(1000 * seconds, 3), "batch": stages.batch, "id": request_id,
              "traceparent": traceparent}  # fmt: skip
    log.info("%s %s %s %s %.3f ms%s", entrypoint, stages.api, stages.model or "-", status, 1000 * seconds, told(ids),
             extra={"request": fields})  # fmt: skip


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname.lower()}
        if hasattr(record, "request"):
            return json.dumps({**line, **record.request})
        line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def serve(words: list[str]) -> int:
    """Run a server until SIGINT or SIGTERM, then finish what is in flight; return the process's exit code."""
    flags, warnings = parse(words)
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(_JsonLines() if flags.log_format == "json" else plain)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    for warning in warnings:
        log.warning(warning)
    stop, hang_up, ready = threading.Event(), threading.Event(), False

    def end(*_):
        stop.set()
        if not ready:  # there is nothing to finish, and what is loading may take for ever: Python would wait for it
            os._exit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    signal.signal(signal.SIGHUP, lambda *_: hang_up.set())
    with Server(flags) as server:
        ready = True
        gc.collect()
        gc.freeze()  # the models stay, as what is imported does: to look it through stops every thread
        told = [f"gRPC on {server.address}"] if flags.port else []
        told += [f"gRPC on unix:{flags.grpc_socket_path}"] if flags.grpc_socket_path else []
        scheme = "https" if flags.rest_ssl_config_file else "http"
        told += [f"REST on {scheme}://{server.rest_address}"] if flags.rest_api_port else []
        for name, versions in server.core.models.served().items():
            print(f"serving {name} version {', '.join(map(str, sorted(versions)))}")
        print(f"{'; '.join(told)}; Ctrl-C ends", flush=True)
        while not stop.wait(0.2):
            if hang_up.is_set():
                hang_up.clear()
                try:
                    server.reload(parse(words)[0])
                    log.info("flags are read again")
                except (ValueError, OSError, SystemExit) as error:
                    log.error("the new flags are not taken: %s", error)
        log.info("no new requests; those in flight have %g seconds", flags.drain_seconds)
        server.stop(flags.drain_seconds)
    return 0
