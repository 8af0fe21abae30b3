"""Which versions of which models are served: read from disk, loaded, swapped and unloaded while requests go on.

A request holds a reference to the version that answers it, and nothing else keeps one that was replaced: when the
last request in flight has its answer, Python's reference count says so, and the version is closed. So a lookup takes
no lock.
"""

import ctypes
import gc
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from shared.serving.protocol import (
    GetModelStatusResponse,
    ModelServerConfig,
    ModelSpec,
    message,
)
from shared.serving.refusal import LoadError, RefusedError, invalid
from shared.serving.servable import Servable

START, LOADING, AVAILABLE, UNLOADING, END = 10, 20, 30, 40, 50  # ModelVersionStatus.State
ModelConfig = message("tensorflow.serving.ModelConfig")
log = logging.getLogger("cornucopia.serve")


@dataclass
class Version:
    """What is known of one version of a model."""

    number: int
    folder: Path
    state: int = START
    servable: Servable | None = None
    failed: str = ""
    code: grpc.StatusCode = grpc.StatusCode.OK  # of what failed
    tries: int = 0
    again_at: float = 0.0  # when a load that failed is tried again


@dataclass
class Model:
    """A configured model; `served` and `labels` are replaced whole, so that a reader sees the old or the new."""

    config: ModelConfig
    versions: dict[int, Version] = field(default_factory=dict)
    served: dict[int, Servable] = field(default_factory=dict)  # what answers, by number
    latest: Servable | None = None
    labels: dict[str, int] = field(default_factory=dict)
    aspired: set[int] = field(default_factory=set)
    polled: bool = False


class Models:
    """Keeps what is served as configuration and disk say; `load` makes a version ready, with its warm-up."""

    def __init__(
        self,
        config: ModelServerConfig,
        load: Callable[[str, int, Path], Servable],
        *,
        poll: float = 1.0,
        retries: int = 5,
        retry_seconds: float = 60.0,
        threads: int = 0,
        labels_before_versions: bool = False,
    ):
        """Start to load what is configured; `wait` returns when it is ready.

        Raises:
            ValueError: the configuration is wrong.
        """
        self._load, self._poll, self._retries, self._retry_seconds = load, poll, retries, retry_seconds
        self._labels_before_versions = labels_before_versions
        self._models: dict[str, Model] = {}
        self._gone: dict[str, Model] = {}  # no longer configured; their versions' ends stay to be asked for
        self._lock = threading.RLock()  # of everything but lookups
        self._changed = threading.Condition(self._lock)
        # One is as fast as two, for most of a load is Python's; and memory holds one new version at a time. TensorFlow
        # Serving's 0 is the thread that looks after all versions: there one that fails holds up the others.
        self._pool = ThreadPoolExecutor(threads or 1, thread_name_prefix="load")
        self._unused: queue.SimpleQueue = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._configure(config, first=True)
        self._threads = [threading.Thread(target=self._watch, name="watch", daemon=True),
                         threading.Thread(target=self._bury, name="unload", daemon=True)]  # fmt: skip
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Load and watch no more; what is loaded goes with this object."""
        with self._lock:  # so not between a look at this and a load that begins
            self._stopping.set()
        self._unused.put(None)
        self._pool.shutdown(wait=True, cancel_futures=True)
        for thread in self._threads:
            thread.join()

    # Requests.

    def find(self, spec: ModelSpec) -> Servable:
        """The version that a request names, or the newest; RefusedError as TensorFlow Serving refuses."""
        name = spec.name
        if not name:
            raise invalid("ModelSpec has no name specified.")
        model = self._models.get(name)
        choice = spec.WhichOneof("version_choice")
        if choice is None:
            servable = model.latest if model else None  # once: the next moment it may be another, or none
            if servable is None:
                raise RefusedError(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: Latest({name})")
            return servable
        if choice == "version_label":
            number = model.labels.get(spec.version_label) if model else None
            if number is None:
                raise invalid(f"Unrecognized servable version label: {spec.version_label}")
        else:
            number = spec.version.value
        servable = model.served.get(number) if model else None
        if servable is None:
            text = f"Servable not found for request: Specific({name}, {number})"
            raise RefusedError(grpc.StatusCode.NOT_FOUND, text)
        return servable

    def known(self, name: str) -> str:
        """The name under which a request for a model is counted: its own where it is configured, else ""."""
        return name if name in self._models else ""

    def served(self) -> dict[str, dict[int, Servable]]:
        """Every version that answers now: name -> number -> version."""
        return {name: dict(model.served) for name, model in sorted(self._models.items())}

    def ready(self) -> bool:
        """Whether every configured model has a version that answers."""
        return all(model.latest is not None for model in self._models.values())

    def status(self, spec: ModelSpec) -> GetModelStatusResponse:
        """State of the versions of a model, newest first."""
        reply = GetModelStatusResponse()
        with self._lock:
            model = self._models.get(spec.name) or self._gone.get(spec.name)
            versions = dict(model.versions) if model else {}
        if spec.HasField("version"):
            if spec.version.value not in versions:
                text = f"Could not find version {spec.version.value} of model {spec.name}"
                raise RefusedError(grpc.StatusCode.NOT_FOUND, text)
            versions = {spec.version.value: versions[spec.version.value]}
        if not versions:
            raise RefusedError(grpc.StatusCode.NOT_FOUND, f"Could not find any versions of model {spec.name}")
        for number in sorted(versions, reverse=True):
            version = reply.model_version_status.add(version=number, state=versions[number].state)
            version.status.SetInParent()
            if versions[number].failed:
                version.status.error_code = versions[number].code.value[0]
                version.status.error_message = versions[number].failed
        return reply

    # Configuration.

    def configure(self, config: ModelServerConfig, *, timeout: float | None = None, awaited: bool = True) -> None:
        """Take a new configuration in place of the old, and, where that is wanted, wait until what is new answers.

        Raises:
            RefusedError: the configuration is wrong, or a new model cannot be loaded.
        """
        with self._lock:
            before = set(self._models)
            self._configure(config, first=False)
            new = set(self._models) - before
        self.refresh()
        if awaited:
            self.wait(new, timeout=timeout)
        with self._lock:
            for model in self._models.values():
                self._label(model)

    def _configure(self, config: ModelServerConfig, *, first: bool) -> None:
        if not first and self._listed and not config.HasField("model_config_list"):
            # A file that is being written may be read while it is empty: it must not unload every model.
            text = ("Cannot transition to requested config. It is only legal to transition from one ModelConfigList to "
                    "another.")  # fmt: skip
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, text)
        names = [one.name for one in config.model_config_list.config]
        for one in config.model_config_list.config:
            if names.count(one.name) > 1:
                raise invalid(f"Illegal to list model {one.name} multiple times in config list")
            if not one.name:
                raise invalid("A model in the config list has no name")
            if "://" in one.base_path:
                raise invalid(f"Model {one.name} has base_path {one.base_path}, but this server reads no URIs; mount "
                              "what is there, or copy it, and give the folder's absolute path")  # fmt: skip
            if not one.base_path.startswith("/"):
                raise invalid(f"Expected model {one.name} to have an absolute path or URI; got base_path()="
                              f"{one.base_path}")  # fmt: skip
            if not one.model_platform and not one.model_type:
                raise invalid(f"Illegal setting neither ModelServerConfig::model_type nor ModelServerConfig::"
                              f"model_platform for model {one.name}")  # fmt: skip
            if one.model_platform not in ("", "tensorflow"):
                raise invalid(f"Servable {one.name} requests unsupported platform {one.model_platform}")
            if one.HasField("logging_config"):  # TensorFlow Serving's words, and what to do
                raise invalid(f"No request-logger-creator provided. Model {one.name} has a logging_config; take it out "
                              "and give --request_log, which writes down requests to all models")  # fmt: skip
        kept = {}
        for one in config.model_config_list.config:
            model = self._models.get(one.name) or self._gone.get(one.name) or Model(one)
            for label, number in one.version_labels.items():
                early = self._labels_before_versions and model.labels.get(label) in (None, number)
                if number not in model.served and not early and not first:
                    raise RefusedError(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        f"Request to assign label to version {number} of model {one.name}, which is not currently "
                        f"available for inference",
                    )
            kept[one.name] = model
        if first:
            self._refuse_early_labels(kept)
        for one in config.model_config_list.config:  # nothing is wrong with any: now all are taken
            kept[one.name].config = one
            self._gone.pop(one.name, None)
        for name, model in self._models.items():
            if name not in kept:
                model.aspired = set()
                self._reconcile(name, model)
                self._gone[name] = model
        self._models, self._listed = kept, config.HasField("model_config_list")
        for model in kept.values():
            self._label(model)

    def _refuse_early_labels(self, models: dict[str, Model]) -> None:
        if not self._labels_before_versions:
            for name, model in models.items():
                for number in model.config.version_labels.values():
                    raise RefusedError(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        f"Request to assign label to version {number} of model {name}, which is not currently "
                        f"available for inference",
                    )

    def _label(self, model: Model) -> None:
        """Point labels at their versions: those that are served, and, where that is allowed, those still to come."""
        model.labels = {
            label: number for label, number in model.config.version_labels.items()
            if number in model.served or self._labels_before_versions or model.labels.get(label) == number
        }  # fmt: skip

    # Disk.

    def refresh(self) -> None:
        """Look at the disk now, and begin what follows from it."""
        with self._lock:
            for name, model in self._models.items():
                try:
                    folders = _on_disk(model.config)
                except OSError as error:  # nothing changes for this one; TensorFlow Serving gives up the round for all
                    log.error("the disk cannot be read: %s", error)
                    continue
                wanted = _aspired(model.config, folders)
                for number in wanted:
                    known = model.versions.get(number)
                    left = known is not None and known.state in (UNLOADING, END) and number not in model.aspired
                    if known is None or left:
                        model.versions[number] = Version(number, folders[number])
                model.aspired, model.polled = wanted, True
                self._reconcile(name, model)

    def _reconcile(self, name: str, model: Model) -> None:
        """Begin loads and unloads: a version that answers goes only when one that is wanted answers, or none is."""
        if self._stopping.is_set():
            return  # the pool takes no more
        for number, version in model.versions.items():
            if version.state == LOADING and version.again_at and number not in model.aspired:
                version.state = END  # gone while it waited for its next try
                self._changed.notify_all()
        now = time.monotonic()
        for number in sorted(model.aspired, reverse=True):
            version = model.versions[number]
            if version.state == START or (version.state == LOADING and 0 < version.again_at <= now):
                version.state, version.again_at = LOADING, 0.0
                version.tries += 1
                self._pool.submit(self._bring, name, model, version)
        unwanted = [number for number in sorted(model.served) if number not in model.aspired]
        if model.aspired and not model.aspired & set(model.served):
            unwanted = unwanted[:-1]  # one stays, until what is to replace it answers
        for number in unwanted:
            self._drop(name, model, model.versions[number])

    def _bring(self, name: str, model: Model, version: Version) -> None:
        try:
            servable = self._load(name, version.number, version.folder)
        except Exception as error:  # whatever a model does while it loads, the server goes on
            with self._lock:
                version.failed = str(error)
                version.code = error.code if isinstance(error, LoadError) else grpc.StatusCode.UNKNOWN
                if version.tries <= self._retries and version.number in model.aspired:
                    version.again_at = time.monotonic() + self._retry_seconds
                else:
                    version.state = END
                self._changed.notify_all()
            log.error("%s version %d: %s", name, version.number, error)
            return
        with self._lock:
            if version.number not in model.aspired:  # it left while it was loading
                version.state = END
                self._changed.notify_all()
                return
            version.servable, version.state, version.failed = servable, AVAILABLE, ""
            self._serve(model)
            self._label(model)
            log.info("%s version %d answers", name, version.number)
            self._reconcile(name, model)
            self._changed.notify_all()

    def _serve(self, model: Model) -> None:
        served = {number: version.servable for number, version in model.versions.items() if version.state == AVAILABLE}
        model.served, model.latest = served, served[max(served)] if served else None

    def _drop(self, name: str, model: Model, version: Version) -> None:
        version.state = UNLOADING
        self._serve(model)
        servable, version.servable = version.servable, None
        # The last reference goes here, or with the last request in flight; then what is behind it is closed.
        weakref.finalize(servable, self._unused.put, (name, version, servable.detach())).atexit = False

    def _bury(self) -> None:
        while (one := self._unused.get()) is not None:
            name, version, close = one
            close()
            del one, close
            gc.collect()
            _trim()
            with self._lock:
                version.state = END
                self._changed.notify_all()
            log.info("%s version %d is unloaded", name, version.number)

    def _watch(self) -> None:
        """Look at the disk from time to time; 0 seconds: once; fewer: never."""
        if self._poll >= 0:
            self.refresh()
        polled = time.monotonic()
        while not self._stopping.wait(min(self._poll, 0.2) if self._poll > 0 else 0.2):
            if self._poll > 0 and time.monotonic() - polled >= self._poll:
                self.refresh()
                polled = time.monotonic()
            else:
                with self._lock:  # loads that failed may be due again
                    for name, model in self._models.items():
                        self._reconcile(name, model)

    def wait(self, names: Iterable[str] | None = None, *, timeout: float | None = None) -> None:
        """Return when the named models, or all, answer; a model without a version on disk is waited for.

        Raises:
            RefusedError: a version that was wanted could not be loaded, or the time is over.
        """
        until = None if timeout is None else time.monotonic() + timeout
        told: set[str] = set()
        with self._changed:
            while not self._stopping.is_set():
                models = {name: model for name, model in self._models.items() if names is None or name in names}
                failed = {name: model.versions[number] for name, model in models.items()
                          if model.aspired and all(model.versions[one].state == END for one in model.aspired)
                          for number in sorted(model.aspired)}  # fmt: skip
                if failed:
                    # Word for word TensorFlow Serving's: at the start servables are awaited, after that models.
                    text = f"{len(failed)} {'servable' if names is None else 'model'}(s) did not become available: {{"
                    for name, version in failed.items():
                        why = f" due to error: {version.code.name}: {version.failed}" if version.failed else ""
                        text += f"{{{{name: {name} version: {version.number}}}{why}}}, "
                    raise RefusedError(grpc.StatusCode.UNKNOWN, text + "}")
                if all(model.polled and model.aspired and model.latest for model in models.values()):
                    return
                for name in sorted(name for name, model in models.items() if model.polled and not model.aspired):
                    if name not in told:
                        told.add(name)
                        log.warning("waiting for a version of %s below %s", name, models[name].config.base_path)
                if until is not None and time.monotonic() > until:
                    late = sorted(name for name, model in models.items() if not model.latest)
                    raise RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, f"{', '.join(late)} did not answer in time")
                self._changed.wait(0.2)


def _on_disk(config: ModelConfig) -> dict[int, Path]:
    """Number -> folder of the versions below a base path; OSError where it cannot be read."""
    base = Path(config.base_path)
    found: dict[int, Path] = {}
    for child in sorted(base.iterdir()):
        if child.name.isdecimal() and child.name.isascii() and int(child.name) < 2**63 and child.is_dir():
            if int(child.name) in found:
                log.warning("%s and %s are one version; the second counts", found[int(child.name)], child)
            found[int(child.name)] = child
    return found


def _aspired(config: ModelConfig, found: dict[int, Path]) -> set[int]:
    """The versions that a policy wants, of those on disk."""
    policy = config.model_version_policy
    kind = policy.WhichOneof("policy_choice")
    if kind == "all":
        return set(found)
    if kind == "specific":
        for number in sorted(set(policy.specific.versions) - set(found)):
            log.warning("version %d of %s is wanted and not below %s", number, config.name, config.base_path)
        return set(policy.specific.versions) & set(found)
    return set(sorted(found)[-(policy.latest.num_versions or 1) :])


def _trim() -> None:
    """Give freed memory back to the system, where the C library can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
