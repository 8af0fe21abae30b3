"""A client of TensorFlow Serving's protocol, over gRPC or REST: NumPy in, NumPy out, without TensorFlow.

    with Client("127.0.0.1:8500") as client:
        client.predict("adder", {"a": [1.0, 2.0], "b": 0.5})["sum"]

`AsyncClient` has the same methods as coroutines.
"""

import asyncio
import functools
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from shared.serving import protocol, tensors, tls

Inputs = dict[str, tuple[np.dtype, tuple[int, ...]]]  # name -> dtype, shape with -1 for any size
_AT_ONCE = 8  # parts of one large batch that are on their way together
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0  # seconds between attempts; doubled in between
_METHODS = {
    name: (f"/{service}/{name}", request, reply)
    for service in (protocol.PREDICTION, protocol.MODEL)
    for name, (request, reply) in protocol.methods(service).items()
}
_STATES = protocol.pool.FindEnumTypeByName("tensorflow.serving.ModelVersionStatus.State").values_by_number
# The kinds of NumPy dtypes that a plain value may have, for the kind of what an input takes; V is bfloat16.
_TAKES = {"O": "O", "b": "b", "i": "iu", "u": "iu", "f": "iuf", "V": "iuf", "c": "iufc"}


def request(
    model: str,
    inputs: Mapping[str, Any],
    *,
    signature: str = "",
    version: int | None = None,
    label: str = "",
) -> protocol.PredictRequest:
    """A Predict message for a signature of a model; none named: its default one, of the newest version."""
    message = protocol.PredictRequest(model_spec=_spec(model, signature, version, label))
    for name, value in inputs.items():
        tensors.fill(message.inputs[name], to_array(value), content=True)
    return message


def _spec(model: str, signature: str, version: int | None, label: str) -> protocol.ModelSpec:
    if version is not None and label:
        raise ValueError(f"{model} is asked for by version {version} and by label {label}; give one of them")
    spec = protocol.ModelSpec(name=model, signature_name=signature)
    if version is not None:
        spec.version.value = version
    elif label:
        spec.version_label = label
    return spec


def to_array(value: Any) -> np.ndarray:
    """A value as NumPy holds it, with strings as objects."""
    first = value
    while isinstance(first, list | tuple) and first:
        first = first[0]
    if not isinstance(first, str | bytes):
        return np.asarray(value)
    array = np.asarray(value, object)  # NumPy's own strings would lose the zero bytes at their end
    for item in array.flat:
        if not isinstance(item, str | bytes):
            raise ValueError(f"a list that begins with strings holds nothing else, and not {repr(item)[:60]}")
    return array


class ServerError(Exception):
    """A call that failed, over either transport: the canonical status in `code`, what the server says in `details`.

    No server: UNAVAILABLE. No answer in time: DEADLINE_EXCEEDED.
    """

    def __init__(self, code: grpc.StatusCode, details: str):
        super().__init__(f"{code.name}: {details}")
        self.code, self.details = code, details


@dataclass(frozen=True)
class Call:
    """One call as both transports understand it."""

    method: str  # of the protocol's services
    spec: protocol.ModelSpec
    timeout: float  # seconds
    content: Any = None  # arrays by name for Predict, a list of features by name for Classify and Regress
    outputs: Sequence[str] = ()  # those that are wanted; none: all
    definition: protocol.SignatureDef | None = None  # of the signature, where it is known


def _driven(method):
    """Make a public method of a generator that yields lists of calls and is sent their results.

    So every method is written once: `Client` drives it with threads, `AsyncClient` with coroutines.
    """

    @functools.wraps(method)
    def run(self, *arguments, **options):
        return self._drive(method(self, *arguments, **options))

    return run


class _Methods:
    def __init__(
        self,
        address: str = "127.0.0.1:8500",
        *,
        timeout: float = 60.0,
        token: str = "",
        certificate: Sequence[str | Path] = (),
        retries: int = 4,
    ):
        """Connect to a server.

        Args:
            address: HOST:PORT or grpc://HOST:PORT for gRPC, http://HOST:PORT or https://HOST:PORT for REST.
            timeout: seconds that a call may take, its retries included.
            token: sent as `authorization: Bearer TOKEN`.
            certificate: for TLS, files in PEM: the root that the server's certificate is checked against, and for a
                server that asks who calls also the client's key and certificate.
            retries: how often a call is tried again while the server is unavailable; gRPC knows no more than 4.
        """
        if len(certificate) not in (0, 1, 3):
            raise ValueError(f"certificate is (root,) or (root, key, certificate), not {len(certificate)} files")
        self._address = address.removeprefix("grpc://").rstrip("/")
        self._rest = address.startswith(("http://", "https://"))
        if "://" in self._address and not self._rest:
            raise ValueError(f"{address} is no address; HOST:PORT, grpc://HOST:PORT, http://HOST:PORT or https://…")
        if self._rest and certificate and address.startswith("http://"):
            raise ValueError(f"{address} has no TLS that a certificate could serve; https://… has")
        self._timeout, self._token, self._retries = timeout, token, retries
        self._certificate = [Path(path) for path in certificate]
        self._learnt: dict[tuple, Mapping[str, protocol.SignatureDef]] = {}
        self._connection = self._connect()

    @_driven
    def predict(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        signature: str = "",
        version: int | None = None,
        label: str = "",
        batch: int | None = None,
        timeout: float | None = None,
        outputs: Sequence[str] = (),
    ) -> dict[str, np.ndarray]:
        """Ask a model: inputs by name, with the batch first -> outputs by name.

        Inputs that have a default in the signature may be left out.
        Numbers, texts and lists that are no arrays become arrays of the dtype that the signature takes. Arrays are sent
        as they are over gRPC; JSON has no dtypes, so REST leaves it to the server what to make of them.

        Args:
            batch: rows of one request; more are sent as several requests at once, whose answers are put together in
                order. Inputs without dimensions go with each.
            outputs: names of those that are wanted; none: all.
        """
        definition = None
        if self._rest or not all(isinstance(value, np.ndarray | np.generic) for value in inputs.values()):
            found = yield from self._definitions(model, version, label, timeout)
            definition = found.get(signature or "serving_default")  # unknown: the server says so best
        taken = definition.inputs if definition else {}
        arrays = {
            name: _cast(name, value, tensors.dtype_of(taken[name].dtype)) if name in taken else to_array(value)
            for name, value in inputs.items()
        }
        call = functools.partial(Call, "Predict", _spec(model, signature, version, label), timeout or self._timeout,
                                 outputs=outputs, definition=definition)  # fmt: skip
        if batch is None:
            return (yield [call(content=arrays)])[0]
        parts = list(_split(arrays, batch))
        return _join((yield [call(content=part) for _, part in parts]), [rows for rows, _ in parts])

    @_driven
    def classify(
        self,
        model: str,
        examples: Sequence[Mapping[str, Any]],
        *,
        signature: str = "",
        version: int | None = None,
        label: str = "",
        timeout: float | None = None,
    ) -> list[list[tuple[str, float]]]:
        """Examples as features by name -> for each example its classes as (label, score).

        Whole numbers, numbers with a decimal point and strings are features of three kinds: 2 is not 2.0.
        """
        spec = _spec(model, signature, version, label)
        return (yield [Call("Classify", spec, timeout or self._timeout, examples)])[0]

    @_driven
    def regress(
        self,
        model: str,
        examples: Sequence[Mapping[str, Any]],
        *,
        signature: str = "",
        version: int | None = None,
        label: str = "",
        timeout: float | None = None,
    ) -> list[float]:
        """Examples as features by name, as for `classify` -> a value for each."""
        spec = _spec(model, signature, version, label)
        return (yield [Call("Regress", spec, timeout or self._timeout, examples)])[0]

    @_driven
    def inputs(
        self, model: str, *, signature: str = "serving_default", version: int | None = None, label: str = ""
    ) -> Inputs:
        """What a signature of a model takes: name -> (dtype, shape with -1 for any size); ValueError: there is none."""
        return _sizes((yield from self._definition(model, signature, version, label)).inputs)

    @_driven
    def defaults(
        self, model: str, *, signature: str = "serving_default", version: int | None = None, label: str = ""
    ) -> dict[str, np.ndarray]:
        """What stands for the inputs of a signature that `predict` is not given; an input without must be given."""
        return defaults((yield from self._definition(model, signature, version, label)))

    @_driven
    def outputs(
        self, model: str, *, signature: str = "serving_default", version: int | None = None, label: str = ""
    ) -> Inputs:
        """What a signature of a model answers, as `inputs` says what it takes."""
        return _sizes((yield from self._definition(model, signature, version, label)).outputs)

    @_driven
    def signatures(self, model: str, *, version: int | None = None, label: str = "") -> list[str]:
        """The names of a model's signatures."""
        return _public((yield from self._definitions(model, version, label)))

    @_driven
    def status(self, model: str) -> dict[int, tuple[str, str]]:
        """The versions of a model: number -> (state, why it is in that state if by an error)."""
        return (yield [Call("GetModelStatus", protocol.ModelSpec(name=model), self._timeout)])[0]

    def _definition(self, model, signature, version, label):
        found = yield from self._definitions(model, version, label)
        if signature not in found or signature.startswith("__"):
            raise ValueError(f"{model} has no signature {signature}; one of {', '.join(_public(found))}")
        return found[signature]

    def _definitions(self, model, version, label, timeout=None):
        """A model's signatures, asked for once: until a call fails, for then another version may have taken over."""
        key = model, version, label
        found = self._learnt.get(key)
        if found is None:
            spec = _spec(model, "", version, label)
            (found,) = yield [Call("GetModelMetadata", spec, timeout or self._timeout)]
            self._learnt[key] = found
        return found  # not what is learnt: another thread's call may have failed since

    def _metadata(self) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {self._token}")] if self._token else []

    def _connect(self):
        if self._rest:
            from shared.serving import client_rest  # only here: httpx2 takes a while to load

            return client_rest.connect(self._http, self._address, headers=self._metadata(), files=self._certificate)
        return channel(self._address, self._certificate, retries=self._retries, of=self._grpc)


class Client(_Methods):
    """A connection to one server, for any number of requests and threads; a context manager.

    A call that fails raises ServerError, over gRPC as over REST.
    """

    _grpc, _http = grpc, "Client"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._connection.close()

    def _drive(self, steps):
        results = None
        try:
            while True:
                calls = steps.send(results)
                results = [self._send(calls[0])] if len(calls) == 1 else self._send_all(calls)
        except StopIteration as end:
            return end.value
        except Exception:  # also what does not fit: over REST an answer of another version than the one learnt of
            self._learnt.clear()
            raise

    def _send_all(self, calls: list[Call]) -> list:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                return list(pool.map(self._send, calls))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _send(self, call: Call) -> Any:
        if self._rest:
            from shared.serving import client_rest

            return client_rest.send(self._connection, call, pauses=pauses(self._retries))
        try:
            reply = _method(self._connection, call)(to_message(call), timeout=call.timeout, metadata=self._metadata())
        except grpc.RpcError as error:
            raise ServerError(error.code(), error.details()) from error
        return _value(call, reply)


class AsyncClient(_Methods):
    """As Client, with coroutines for methods and `async with`; made in the event loop that it is used in."""

    _grpc, _http = grpc.aio, "AsyncClient"

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await (self._connection.aclose() if self._rest else self._connection.close())

    async def _drive(self, steps):
        results = None
        try:
            while True:
                calls = steps.send(results)
                results = [await self._send(calls[0])] if len(calls) == 1 else await self._send_all(calls)
        except StopIteration as end:
            return end.value
        except Exception:  # also what does not fit: over REST an answer of another version than the one learnt of
            self._learnt.clear()
            raise

    async def _send_all(self, calls: list[Call]) -> list:
        at_once = asyncio.Semaphore(_AT_ONCE)

        async def one(call):
            async with at_once:
                return await self._send(call)

        tasks = [asyncio.create_task(one(call)) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _send(self, call: Call) -> Any:
        if self._rest:
            from shared.serving import client_rest

            return await client_rest.send_async(self._connection, call, pauses=pauses(self._retries))
        send = _method(self._connection, call)
        try:
            reply = await send(to_message(call), timeout=call.timeout, metadata=self._metadata())
        except grpc.RpcError as error:
            raise ServerError(error.code(), error.details()) from error
        return _value(call, reply)


def channel(address: str, certificate: Sequence[Path], *, retries: int, of: types.ModuleType = grpc):
    """A channel to HOST:PORT, with TLS where a certificate is given as for Client; `of` grpc or grpc.aio."""
    options = channel_options(retries)
    if not certificate:
        return of.insecure_channel(address, options=options)
    return of.secure_channel(address, tls.client_credentials(certificate), options=options)


def channel_options(retries: int) -> list[tuple[str, Any]]:
    """For a channel to a server: messages of any size, and retries while it is unavailable."""
    policy = {
        "maxAttempts": 1 + retries,
        "initialBackoff": f"{_FIRST_PAUSE}s",
        "maxBackoff": f"{_LONGEST_PAUSE}s",
        "backoffMultiplier": 2,
        # CANCELLED without having cancelled: the call came in the moment in which a server closed its door.
        "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
    }
    options = [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        # gRPC gives up retrying what outgrows this buffer, by default 256 KiB: less than a picture.
        ("grpc.per_rpc_retry_buffer_size", 2**31 - 1),
        ("grpc.initial_reconnect_backoff_ms", int(1000 * _FIRST_PAUSE)),
        ("grpc.max_reconnect_backoff_ms", int(1000 * _LONGEST_PAUSE)),
    ]
    if retries:
        config = {"methodConfig": [{"name": [{}], "retryPolicy": policy}]}
        options.append(("grpc.service_config", json.dumps(config)))
    return options


def pauses(retries: int) -> Iterator[float]:
    """Seconds to wait before each retry, as in gRPC's policy: random below a bound that doubles."""
    random = np.random.default_rng()
    for number in range(retries):
        yield random.uniform(0, min(_FIRST_PAUSE * 2**number, _LONGEST_PAUSE))


def _cast(name: str, value: Any, dtype: np.dtype) -> np.ndarray:
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    try:
        array = to_array(value)
        if not array.size or array.dtype.kind in _TAKES[dtype.kind]:
            return np.asarray(value, dtype)
    except (ValueError, OverflowError) as error:  # rows of several lengths; a number that is too large
        raise ValueError(f"input {name} takes {dtype}, not {repr(value)[:60]}: {error}") from error
    raise ValueError(f"input {name} takes {'strings' if dtype.kind == 'O' else dtype}, not {repr(value)[:60]}")


def _split(arrays: Mapping[str, np.ndarray], batch: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    rows = {name: len(array) for name, array in arrays.items() if array.ndim}
    if batch < 1 or len(set(rows.values())) != 1:
        raise ValueError(
            f"batch needs 1 row or more, and inputs of one length; batch is {batch}, the lengths are {rows}"
        )
    (count,) = set(rows.values())
    for start in range(0, max(count, 1), batch):
        part = {name: array[start : start + batch] if array.ndim else array for name, array in arrays.items()}
        yield min(batch, count - start), part


def _join(answers: list[dict[str, np.ndarray]], rows: list[int]) -> dict[str, np.ndarray]:
    for answer, count in zip(answers, rows, strict=True):
        for name, value in answer.items():
            if not value.ndim or len(value) != count:
                raise ValueError(f"output {name} of shape {value.shape} has no row for each of {count} examples; "
                                 "ask without batch")  # fmt: skip
    return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}


def _sizes(infos: Mapping[str, Any]) -> Inputs:
    return {
        name: (tensors.dtype_of(info.dtype), tuple(dim.size for dim in info.tensor_shape.dim))
        for name, info in sorted(infos.items())
    }


def defaults(definition: protocol.SignatureDef | None) -> dict[str, np.ndarray]:
    """The values of a signature's inputs that have one by default."""
    found = definition.defaults if definition else {}
    return {name: tensors.from_proto(value) for name, value in found.items()}


def _public(definitions: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in definitions if not name.startswith("__"))


# gRPC: the messages of a call.


def _method(channel: grpc.Channel, call: Call):
    path, sent, received = _METHODS[call.method]
    return channel.unary_unary(
        path, request_serializer=sent.SerializeToString, response_deserializer=received.FromString
    )


def to_message(call: Call) -> Any:
    """The message that asks for a call."""
    message = _METHODS[call.method][1](model_spec=call.spec)
    if call.method == "Predict":
        for name, array in call.content.items():
            tensors.fill(message.inputs[name], array, content=True)
        message.output_filter.extend(call.outputs)
    elif call.method == "GetModelMetadata":
        message.metadata_field.append("signature_def")
    elif call.method in ("Classify", "Regress"):
        for features in call.content:
            example = message.input.example_list.examples.add()
            for name, value in features.items():
                _fill_feature(example.features.feature[name], to_array(value).ravel())
    return message


def _fill_feature(feature: Any, array: np.ndarray) -> None:
    if array.dtype.kind == "O":
        values = [item.encode() if isinstance(item, str) else item for item in array.tolist()]
        feature.bytes_list.value.extend(values)
    elif array.dtype.kind == "f":
        feature.float_list.value.extend(array.tolist())
    else:
        feature.int64_list.value.extend(array.astype(np.int64).tolist())


def _value(call: Call, reply: Any) -> Any:
    """What the reply to a call says."""
    if call.method == "Predict":
        return {name: tensors.from_proto(proto) for name, proto in reply.outputs.items()}
    if call.method == "Classify":
        found = reply.result.classifications
        return [[(one.label, one.score) for one in example.classes] for example in found]
    if call.method == "Regress":
        return [one.value for one in reply.result.regressions]
    if call.method == "GetModelStatus":
        return states(reply)
    found = protocol.SignatureDefMap()
    reply.metadata["signature_def"].Unpack(found)
    return found.signature_def


def states(reply: protocol.GetModelStatusResponse) -> dict[int, tuple[str, str]]:
    """Number of a version -> its state and the error that led there."""
    return {one.version: (_STATES[one.state].name, one.status.error_message) for one in reply.model_version_status}
