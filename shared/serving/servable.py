"""One loaded version of a model: its signatures, run the way TensorFlow Serving runs them.

A SavedModel is loaded into a TensorFlow 1 session, as TensorFlow Serving does: a call of its session is several times
faster than one of a TensorFlow 2 signature, and closing it gives the memory back.
"""

import contextlib
import importlib
import importlib.util
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.python.client import pywrap_tf_session
from tensorflow.python.saved_model import loader_impl

from shared.serving import tensors
from shared.serving.protocol import PredictionLog, SavedModel, SignatureDef, type_name
from shared.serving.records import records
from shared.serving.refusal import LoadError, RefusedError, invalid

DEFAULT = "serving_default"
VARIABLES = {"VarHandleOp", "VariableV2", "Variable"}  # operations
STATUS = {code.value[0]: code for code in grpc.StatusCode}  # canonical number -> gRPC's name for it
MOST_WARM_UPS = 1000  # requests in a warm-up file; TensorFlow Serving refuses more
LONG = 0.0005  # seconds from which a run is worth a change of threads
_importing = threading.Lock()


class Servable:
    """A version that answers. `batching` is what runs its requests together, where anything does."""

    def __init__(self, name: str, version: int, folder: Path, *, tags: Iterable[str] = ("serve",),
                 threads: tuple[int, int] = (0, 0), limited: bool = False):  # fmt: skip
        """Load a version; `threads` are TensorFlow's within operations, 0: one a processor, and between them, 0: none.

        Where it is `limited`, a run is broken off when its request's time is over.

        Raises:
            LoadError: the folder holds no SavedModel that can be loaded; says why.
        """
        self.name, self.version, self.folder = name, version, folder
        self.batching: Any = None
        self._limited = limited
        if not (folder / "saved_model.pb").exists() and not (folder / "saved_model.pbtxt").exists():
            text = f"Could not find SavedModel .pb or .pbtxt at supplied export directory path: {folder}"
            raise LoadError(grpc.StatusCode.NOT_FOUND, text)
        settings = tf.compat.v1.ConfigProto(
            intra_op_parallelism_threads=threads[0], inter_op_parallelism_threads=threads[1], allow_soft_placement=True
        )
        self._session = tf.compat.v1.Session(graph=tf.Graph(), config=settings)
        try:
            self.definitions = _load(self._session, folder, set(tags))
        except (OSError, RuntimeError, ValueError, TypeError, KeyError, tf.errors.OpError) as error:
            self._session.close()
            raise LoadError(_code(error), f"{folder} cannot be loaded: {error}") from error
        # Without a hand-over to the pool between operations: the request's own thread runs them all.
        self._pool = 0 if threads[1] else -1
        self._callables: dict[Any, Any] = {}
        self._fastest: dict[Any, float] = {}  # seconds of the fastest run of late, by what was run and how many rows
        # Aliases of all outputs of a signature, in the order in which `bind` fetches them.
        self.outputs = {key: sorted(definition.outputs) for key, definition in self.definitions.items()}
        for key, definition in self.definitions.items():
            if key.startswith("__") or not definition.outputs or not _takes_arrays(definition):
                continue
            feeds, _, _, fetches = self._callables[key] = _plan(definition)
            self._callables[feeds, fetches] = self._callable(feeds, fetches)  # no first request waits for it
        self._defaults = {key: {alias: tensors.from_proto(proto) for alias, proto in definition.defaults.items()}
                          for key, definition in self.definitions.items()}  # fmt: skip

    def detach(self) -> Callable[[], None]:
        """What gives the memory back, once no request is running; it holds no reference to the version itself."""
        session, callables = self._session, self._callables

        def close():
            callables.clear()
            session.close()

        return close

    def bind(self, key: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str] = ()) -> tuple[tuple, tuple, list]:
        """Check a Predict request's inputs and outputs against a signature.

        Returns:
            The tensors' names to feed; those to fetch, by rising aliases; and the arrays, in the order of the first.

        Raises:
            RefusedError: as TensorFlow Serving refuses.
        """
        try:
            feeds, aliases, dtypes, fetches = self._callables[key]
        except KeyError:
            if key in self.definitions:
                raise invalid(f'Serving signature key "{key}" takes no requests.') from None
            message = f'Serving signature key "{key}" not found.'
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, message) from None
        definition = self.definitions[key]
        if inputs.keys() != aliases.keys():
            inputs = self._complete(key, definition, inputs)
        arrays = [inputs[alias] for alias in aliases]
        for index, (array, dtype) in enumerate(zip(arrays, dtypes, strict=True)):
            if array.dtype != dtype:
                wants, has = (type_name(tensors.number_of(one)) for one in (dtype, array.dtype))
                raise invalid(f"Expects arg[{index}] to be {wants} but {has} is provided")
        if wanted:
            fetches = _filtered(definition, wanted)
        return feeds, fetches, arrays

    def _complete(self, key: str, definition: SignatureDef, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        defaults, sent, known = self._defaults[key], set(inputs), set(definition.inputs)
        if len(sent) > len(known) or (len(sent) < len(known) and not defaults):
            raise invalid(
                f"input size does not match signature: {len(sent)}!={len(known)} len({{{','.join(sorted(sent))}}}) != "
                f"len({{{','.join(sorted(known))}}}). Sent extra: {{{','.join(sorted(sent - known))}}}. "
                f"Missing but required: {{{','.join(sorted(known - sent))}}}."
            )
        complete = {**defaults, **inputs}
        for alias in sorted(known):
            if alias not in complete:
                raise invalid(f"Signature input alias: {alias}(feed name: {definition.inputs[alias].name}) not found "
                              f"in request and no default value provided. Inputs expected to be in the set "
                              f"{{{','.join(sorted(known))}}}.")  # fmt: skip
        if sent - known:  # misspelt, as likely as not, and a default must not stand in for it
            raise invalid(f"Inputs contains invalid name. Used request inputs: {','.join(sorted(sent & known))}, "
                          f"request input: {','.join(sorted(sent))}")  # fmt: skip
        return complete

    def answer(self, feeds: tuple, fetches: tuple, arrays: Sequence[np.ndarray],
               waiting: Callable[[], AbstractContextManager] = contextlib.nullcontext, until: float = math.inf
               ) -> list[np.ndarray]:  # fmt: skip
        """As `run`; a run that takes long is in a block of `waiting`."""
        if self._limited:
            with waiting():
                return self.run(feeds, fetches, arrays, until=until)
        rows = arrays[0].shape[0] if arrays and arrays[0].ndim else 1
        key = (feeds, fetches, rows.bit_length())
        fastest = self._fastest.get(key, 0.0)
        with contextlib.nullcontext() if fastest <= LONG else waiting():
            begun = time.perf_counter()
            outputs = self.run(feeds, fetches, arrays)
            seconds = time.perf_counter() - begun
        self._fastest[key] = min(seconds, fastest * 1.01 or seconds)  # it may not be as fast again
        return outputs

    def run(self, feeds: tuple, fetches: tuple, arrays: Sequence[np.ndarray], *, until: float = math.inf
            ) -> list[np.ndarray]:  # fmt: skip
        """Run the graph, where the version is limited `until` a time on the clock of `time.monotonic`.

        Raises:
            RefusedError: an operation refuses, with its status and text; or the time is over.
        """
        try:
            call = self._callables[feeds, fetches]
        except KeyError:
            call = self._callables[feeds, fetches] = self._callable(feeds, fetches)
        try:
            outputs = call(arrays, until) if self._limited else call(*arrays)
        except tf.errors.OpError as error:
            raise RefusedError(STATUS.get(error.error_code, grpc.StatusCode.UNKNOWN), error.message) from error
        except (TypeError, ValueError) as error:
            raise invalid(str(error)) from error
        return [output if isinstance(output, np.ndarray) else _scalar(output) for output in outputs]

    def _callable(self, feeds: tuple, fetches: tuple) -> Callable:
        """A function arrays -> arrays: the private one is several times faster than the public it falls back to."""
        if self._limited:
            return _limited_callable(self._session, feeds, fetches)
        return (_fast_callable(self._session, feeds, fetches, self._pool)
                or self._session.make_callable(list(fetches), feed_list=list(feeds)))  # fmt: skip

    def warm_ups(self) -> list[PredictionLog]:
        """The requests in the version's warm-up file; none where there is no such file.

        Raises:
            LoadError: there are more than TensorFlow Serving takes, or the file cannot be read.
        """
        path = self.folder / "assets.extra" / "tf_serving_warmup_requests"
        if not path.exists():
            return []
        logs = []
        try:
            for record in records(path):
                logs.append(PredictionLog.FromString(record))
                if len(logs) > MOST_WARM_UPS:
                    text = f"Number of warmup records exceeds the maximum ({MOST_WARM_UPS}) at {path}"
                    raise LoadError(grpc.StatusCode.INVALID_ARGUMENT, text)
        except (OSError, DecodeError) as error:
            raise LoadError(grpc.StatusCode.INVALID_ARGUMENT, f"{path} cannot be read: {error}") from error
        return logs


def _scalar(value) -> np.ndarray:
    """A session gives a tensor without dimensions as a number or as bytes."""
    return np.array(value, object) if isinstance(value, bytes) else np.asarray(value)


def _code(error: Exception) -> grpc.StatusCode:
    """The canonical status of what a load failed with."""
    if isinstance(error, LoadError):
        return error.code
    return STATUS.get(getattr(error, "error_code", None), grpc.StatusCode.UNKNOWN)


def _load(session: tf.compat.v1.Session, folder: Path, tags: set[str]) -> dict[str, SignatureDef]:
    """Load a SavedModel into a session, its operations' libraries first; return its signatures."""
    binary = folder / "saved_model.pb"
    if binary.exists():  # as it is in the file: what GetModelMetadata answers
        try:
            saved = SavedModel.FromString(binary.read_bytes())
        except DecodeError as error:
            raise LoadError(grpc.StatusCode.DATA_LOSS, f"Can't parse {binary} as binary proto") from error
        graphs = [graph for graph in saved.meta_graphs if set(graph.meta_info_def.tags) == tags]
        if not graphs:
            text = f"Could not find meta graph def matching supplied tags: {{ {' '.join(sorted(tags))} }}"
            raise LoadError(grpc.StatusCode.NOT_FOUND, text)
        definitions = {key: SignatureDef.FromString(value.SerializeToString())
                       for key, value in graphs[0].signature_def.items()}  # fmt: skip
        operations = {node.op for node in graphs[0].graph_def.node}
        operations |= {node.op for function in graphs[0].graph_def.library.function for node in function.node_def}
        _import_operations(operations)
        # As in TensorFlow Serving: what has no variables needs no folder of them. Here with variables it needs one.
        bare = not operations & VARIABLES and not (folder / "variables" / "variables.index").exists()
    # The loader for sessions is called deprecated in favour of one that TensorFlow Serving does not use.
    quiet = tf.get_logger()
    quiet.addFilter(_no_news)
    with session.graph.as_default():
        loader = loader_impl.SavedModelLoader(str(folder))
        if binary.exists() and bare:
            loader.load_graph(session.graph, list(tags))
            loader.run_init_ops(session, list(tags))
        else:
            loaded = loader.load(session, list(tags))
    if not binary.exists():
        definitions = {key: SignatureDef.FromString(value.SerializeToString())
                       for key, value in loaded.signature_def.items()}  # fmt: skip
    return definitions


def _no_news(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING or not {"saved_model", "saver"} & set(re.split(r"\W", record.getMessage()))


def _import_operations(operations: set[str]) -> None:
    """TensorFlow Text's operations, which TensorFlow Serving has built in, are a library's here."""
    from tensorflow.python.framework import op_def_registry

    with _importing:
        missing = [name for name in operations if op_def_registry.get(name) is None]
        if missing and importlib.util.find_spec("tensorflow_text") is not None:
            importlib.import_module("tensorflow_text")


def _takes_arrays(definition: SignatureDef) -> bool:
    try:
        return all(tensors.dtype_of(info.dtype) for info in (*definition.inputs.values(), *definition.outputs.values()))
    except ValueError:
        return False


def _plan(definition: SignatureDef) -> tuple[tuple, dict, tuple, tuple]:
    """Of a signature: tensors to feed, their aliases as a dictionary's keys, their dtypes, and tensors to fetch."""
    aliases = dict.fromkeys(sorted(definition.inputs, key=lambda alias: definition.inputs[alias].name))
    feeds = tuple(definition.inputs[alias].name for alias in aliases)
    dtypes = tuple(tensors.dtype_of(definition.inputs[alias].dtype) for alias in aliases)
    return feeds, aliases, dtypes, tuple(definition.outputs[alias].name for alias in sorted(definition.outputs))


def _filtered(definition: SignatureDef, wanted: Sequence[str]) -> tuple:
    for position, alias in enumerate(wanted):
        if alias not in definition.outputs:
            raise invalid(f"output tensor alias not found in signature: {alias} Outputs expected to be in the set "
                          f"{{{','.join(sorted(definition.outputs))}}}.")  # fmt: skip
        if alias in wanted[:position]:
            raise invalid(f"duplicate output tensor alias: {alias}")
    # In one order, whichever they are asked for in: each callable takes memory of its own.
    return tuple(definition.outputs[alias].name for alias in sorted(wanted))


def _fast_callable(session: tf.compat.v1.Session, feeds: tuple, fetches: tuple, pool: int) -> Callable | None:
    options = tf.compat.v1.CallableOptions() if hasattr(tf.compat.v1, "CallableOptions") else None
    if options is None:
        from tensorflow.core.protobuf import config_pb2

        options = config_pb2.CallableOptions()
    options.feed.extend(feeds)
    options.fetch.extend(fetches)
    options.run_options.MergeFrom(tf.compat.v1.RunOptions(inter_op_thread_pool=pool))
    try:
        return session._make_callable_from_options(options)
    except AttributeError:
        return None


def _limited_callable(session: tf.compat.v1.Session, feeds: tuple, fetches: tuple) -> Callable:
    """A function of arrays and of a time on the clock of `time.monotonic`, at which TensorFlow breaks off the run.

    It looks at the clock in a thread other than those that run the operations, so these are handed over to its pool;
    and it ends loops and what waits, but no operation that computes. The public `Session.run` also checks shapes, which
    TensorFlow Serving leaves to the operations.
    """
    feeds, fetches = ([session.graph.get_tensor_by_name(name)._as_tf_output() for name in names]
                      for names in (feeds, fetches))  # fmt: skip

    def call(arrays: Sequence[np.ndarray], until: float) -> list:
        milliseconds = 0  # without a limit
        if until < math.inf:
            milliseconds = math.ceil(1000 * (until - time.monotonic()))
            if milliseconds <= 0:
                raise RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline exceeded")
        text = tf.compat.v1.RunOptions(timeout_in_ms=milliseconds).SerializeToString()
        options = pywrap_tf_session.TF_NewBufferFromString(text)
        try:
            return session._call_tf_sessionrun(options, dict(zip(feeds, arrays, strict=True)), fetches, [], None)
        finally:
            pywrap_tf_session.TF_DeleteBuffer(options)

    return call
