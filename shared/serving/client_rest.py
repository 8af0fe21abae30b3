"""The client's calls over TensorFlow Serving's REST interface: JSON both ways, numbers exact."""

import asyncio
import base64
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import httpx2
import numpy as np
from google.protobuf import json_format

from shared.serving import protocol, tensors, tls
from shared.serving.client import Call, ServerError, defaults, states, to_array

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT, 401: grpc.StatusCode.UNAUTHENTICATED, 403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND, 409: grpc.StatusCode.ABORTED, 413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED, 499: grpc.StatusCode.CANCELLED, 501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE, 504: grpc.StatusCode.DEADLINE_EXCEEDED,
}  # fmt: skip


def connect(name: str, address: str, *, headers: list[tuple[str, str]], files: Sequence[Path]) -> Any:
    """A `Client` or `AsyncClient` of httpx2 that keeps its connections."""
    context = tls.client_context(files) if address.startswith("https://") else False
    return getattr(httpx2, name)(base_url=address, headers=headers, verify=context)


def send(connection: httpx2.Client, call: Call, *, pauses: Iterator[float]) -> Any:
    """The result of a call; again after each pause while the server is unavailable."""
    request, ends = to_request(call), time.monotonic() + call.timeout
    while True:
        try:
            found = connection.request(**request, timeout=max(ends - time.monotonic(), 0.001))
        except httpx2.TransportError as error:
            found = error
        pause = _pause(found, pauses, ends)
        if pause is None:
            return _value(call, found)
        time.sleep(pause)


async def send_async(connection: httpx2.AsyncClient, call: Call, *, pauses: Iterator[float]) -> Any:
    """As `send`."""
    request, ends = to_request(call), time.monotonic() + call.timeout
    while True:
        try:
            found = await connection.request(**request, timeout=max(ends - time.monotonic(), 0.001))
        except httpx2.TransportError as error:
            found = error
        pause = _pause(found, pauses, ends)
        if pause is None:
            return _value(call, found)
        await asyncio.sleep(pause)


def to_request(call: Call) -> dict[str, Any]:
    """A call as an HTTP request: method, url and, where there is one, content."""
    url = f"/v1/models/{quote(call.spec.name, safe='')}"
    if call.spec.HasField("version"):
        url += f"/versions/{call.spec.version.value}"
    elif call.spec.version_label:
        url += f"/labels/{quote(call.spec.version_label, safe='')}"
    if call.method == "GetModelStatus":
        return {"method": "GET", "url": url}
    if call.method == "GetModelMetadata":
        return {"method": "GET", "url": f"{url}/metadata"}
    body: dict[str, Any] = {"signature_name": call.spec.signature_name} if call.spec.signature_name else {}
    if call.method == "Predict":
        # Over REST the server knows no defaults.
        body["inputs"] = {name: array.tolist() for name, array in (defaults(call.definition) | call.content).items()}
    else:
        body["examples"] = [
            {name: to_array(value).tolist() for name, value in features.items()} for features in call.content
        ]
    content = json.dumps(body, default=_binary).encode()
    return {"method": "POST", "url": f"{url}:{call.method.lower()}", "content": content}


def _binary(value: Any) -> dict[str, str]:
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    raise ValueError(f"REST carries no {type(value).__name__}; ask over gRPC")


def _pause(found: httpx2.Response | Exception, pauses: Iterator[float], ends: float) -> float | None:
    """Seconds until another attempt; None: this was the last."""
    answered = isinstance(found, httpx2.Response) and found.status_code != 503
    if answered or isinstance(found, httpx2.TimeoutException):
        return None
    pause = next(pauses, None)
    return None if pause is None or time.monotonic() + pause >= ends else pause


def _value(call: Call, found: httpx2.Response | Exception) -> Any:
    """What the response to a call says.

    Raises:
        ServerError: it says that the call failed, or there is none.
    """
    if isinstance(found, httpx2.TimeoutException):
        raise ServerError(grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer in {call.timeout:g} s") from found
    if isinstance(found, Exception):
        raise ServerError(grpc.StatusCode.UNAVAILABLE, str(found)) from found
    # A string that is no UTF-8 passes through unchanged: what cannot be decoded comes out as it went in.
    text = found.content.decode(errors="surrogateescape")
    try:
        body = json.loads(text)
    except ValueError:
        body = {}
    if found.status_code >= 400 or not body:
        said = body.get("error") if isinstance(body, dict) else None
        code = CODES.get(found.status_code, grpc.StatusCode.UNKNOWN)
        raise ServerError(code, said or f"HTTP status {found.status_code} {text[:200]!r}")
    if call.method == "Predict":
        return _outputs(call, body["outputs"])
    if call.method == "Classify":
        return [[(label, _float32(score)) for label, score in classes] for classes in body["results"]]
    if call.method == "Regress":
        return [_float32(value) for value in body["results"]]
    if call.method == "GetModelStatus":
        return states(json_format.ParseDict(body, protocol.GetModelStatusResponse(), ignore_unknown_fields=True))
    found = body["metadata"]["signature_def"]
    return json_format.ParseDict(found, protocol.SignatureDefMap(), ignore_unknown_fields=True).signature_def


def _outputs(call: Call, found: Any) -> dict[str, np.ndarray]:
    known = call.definition.outputs if call.definition else {}
    if len(known) == 1:  # a signature's only output comes without its name
        found = {next(iter(known)): found}
    if unknown := sorted(set(call.outputs) - set(found)):
        message = f"output tensor alias not found in signature: {unknown[0]}"
        raise ServerError(grpc.StatusCode.INVALID_ARGUMENT, f"{message} Outputs expected to be in {sorted(found)}.")
    return {
        name: _tensor(value, tensors.dtype_of(known[name].dtype) if name in known else None)
        for name, value in found.items()
        if not call.outputs or name in call.outputs
    }


def _tensor(value: Any, dtype: np.dtype | None) -> np.ndarray:
    return np.array(_strings(value) if dtype and dtype.kind == "O" else value, dtype)


def _strings(value: Any) -> Any:
    if isinstance(value, list):
        return [_strings(item) for item in value]
    if isinstance(value, dict):
        return base64.b64decode(value["b64"])
    return value.encode(errors="surrogateescape")


def _float32(value: float) -> float:
    """The number that gRPC would have sent, of which JSON has the shortest form."""
    return float(np.float32(value))
