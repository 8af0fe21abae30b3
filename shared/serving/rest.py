"""The REST API of TensorFlow Serving, and what a platform asks a server beside it.

aiohttp takes connections, chunks, compressed bodies and keep-alive; each request is answered in a thread.
"""

import asyncio
import gzip
import io
import json
import logging
import re
import ssl
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote_to_bytes

import grpc
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from shared.serving import openapi, protocol, rest_json, tensors
from shared.serving.core import Core
from shared.serving.grpc_transport import timing
from shared.serving.inference import Stages
from shared.serving.refusal import RefusedError, invalid
from shared.serving.servable import DEFAULT

ASKED = re.compile(r"(?i:/v1/models/([^/:]+)(?:(?:/versions/(\d+))|(?:/labels/([^/:]+)))?:)(classify|regress|predict)")
TOLD = re.compile(r"(?i)/v1/models(?:/([^/:]+))?(?:(?:/versions/(\d+))|(?:/labels/([^/:]+)))?(?:/(metadata))?")
CORS = {"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Methods": "POST, GET",
        "Access-Control-Allow-Headers": "Content-Type"}  # fmt: skip
INFLATED = 100 * 2**20  # bytes of a compressed body, as in TensorFlow Serving
HEALTH = ("/livez", "/readyz")  # which a platform asks for without a token
SLACK = 0.05  # seconds beyond a request's time, in which what it waits for says itself that the time is over
NOT_FOUND = b"<HTML><HEAD>\n<TITLE>404 Not Found</TITLE>\n</HEAD><BODY>\n<H1>Not Found</H1>\n</BODY></HTML>\n"
log = logging.getLogger("cornucopia.serve")


class Rest:
    """An HTTP server for what a Core answers, in a thread of its own."""

    def __init__(
        self,
        core: Core,
        *,
        host: str,
        port: int,
        threads: int,
        seconds: float = 30.0,
        cors: bool = False,
        largest: int = 0,
        metrics_path: str = "",
        patience: float = 60.0,
        context: ssl.SSLContext | None = None,
    ):
        """Open the port.

        `seconds` is what a request may take, `largest` the bytes of a body (0: any), `patience` the seconds in which a
        client must have shaken hands, where there is TLS by a `context`, then sent its headers, and then its body.
        OSError where the port cannot be had.
        """
        self._core, self._seconds, self._cors, self._largest = core, seconds, cors, largest
        self._metrics_path, self._patience, self._context = metrics_path, patience, context
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rest")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rest", daemon=True)
        self._thread.start()
        try:
            self.port = asyncio.run_coroutine_threadsafe(self._open(host, port), self._loop).result()
        except OSError as error:
            self._end()
            raise OSError(f"port {port} of {host} cannot be had: {error.strerror or error}; choose another") from error

    async def _open(self, host: str, port: int) -> int:
        self._web = _Web(self._handle, request_factory=self._request, access_log=None, auto_decompress=False,
                         keepalive_timeout=3600, patience=self._patience, max_line_size=65536,
                         max_field_size=65536)  # fmt: skip
        limits = {f"ssl_{what}_timeout": self._patience for what in ("handshake", "shutdown")} if self._context else {}
        self._listening = await self._loop.create_server(self._web, host, port, backlog=1024, ssl=self._context,
                                                         **limits)  # fmt: skip
        return self._listening.sockets[0].getsockname()[1]

    def stop(self, grace: float) -> None:
        """Take no new requests, let those that have begun be answered within some seconds, close the port."""

        async def close():
            self._listening.close()
            await self._web.drain(grace)
            left = [one.wire for one in self._web.connections]
            await self._web.shutdown(0.1)
            for transport in left:
                transport.abort()  # there is no waiting for a client to read on, nor for it to end TLS too
            left = asyncio.all_tasks() - {asyncio.current_task()}  # handshakes that have not come to their end
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            await asyncio.sleep(0)  # what was aborted is closed at the loop's next turn

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _request(self, message, payload, protocol_, writer, task) -> web.BaseRequest:
        most = self._largest or 2**62
        return web.BaseRequest(message, payload, protocol_, writer, task, self._loop, client_max_size=most)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        request.protocol.in_time()
        begun, status, stages, inside = time.perf_counter(), "CANCELLED", Stages(""), False  # till there is an answer
        headers = dict(CORS) if self._cors else {}
        headers |= {name: request.headers[name] for name in ("X-Request-Id", "traceparent") if name in request.headers}
        code, kind, body = 200, "application/json", b""
        watched = request.raw_path in (*HEALTH, self._metrics_path)  # what must be answered above all under overload
        try:
            if request.headers.get("Expect", "").lower() == "100-continue":
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0
            token = request.headers.get("Authorization", "")
            if not watched:
                self._core.gate.enter(token)
                inside = True
            elif request.raw_path not in HEALTH:
                self._core.gate.check(token)
            sent = await self._body(request)
            until, handed = time.monotonic() + self._seconds if self._seconds > 0 else None, time.perf_counter()
            pool = None if watched else self._pool  # the loop's own
            work = self._loop.run_in_executor(pool, self._answer, request, sent, stages, until, handed)
            code, kind, body = await asyncio.wait_for(asyncio.shield(work), until and self._seconds + SLACK)
            status = "OK"
        except RefusedError as error:
            status, code = error.code.name, rest_json.HTTP_STATUS.get(error.code, 500)
            body = rest_json.write_error(str(error))
            # Frames of the traceback hold the error, and the version with it: the collector may not come for long.
            error.__traceback__ = error.__context__ = error.__cause__ = None
        except TimeoutError:
            status, code = "DEADLINE_EXCEEDED", 504
            body = rest_json.write_error(f"the answer took longer than {self._seconds:g} seconds")
        except ConnectionError:  # the client is gone, and nobody reads an answer
            code = 499
        except Exception as error:
            status, code, body = "INTERNAL", 500, rest_json.write_error(f"{type(error).__name__}: {error}")
            log.exception("%s %s failed", request.method, request.raw_path)
            error.__traceback__ = error.__context__ = error.__cause__ = None
        finally:
            if inside:
                self._core.gate.leave()
            seconds = time.perf_counter() - begun
            if stages.model is not None:
                self._core.metrics.request(stages.model, "REST", status, seconds, stages)
            if (access := self._core.access) is not None:  # new flags may take it away
                ids = (request.headers.get(name, "") for name in ("X-Request-Id", "traceparent"))
                access("REST", stages, status, seconds, *ids)
        if "Server-Timing" in request.headers:
            headers["Server-Timing"] = timing(stages)
        response = web.Response(status=code, body=body, content_type=kind, headers=headers)
        if not request.content.at_eof():  # a body that was not read to its end: what follows it cannot be found
            response.force_close()
        return response

    async def _body(self, request: web.BaseRequest) -> bytes:
        try:
            return await asyncio.wait_for(request.read(), self._patience)
        except TimeoutError:
            text = f"the body did not come within {self._patience:g} seconds"
            raise RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, text) from None
        except web.HTTPRequestEntityTooLarge:
            raise self._too_large() from None
        except (web.RequestPayloadError, HttpProcessingError) as error:
            raise invalid(f"the body cannot be read: {error}") from error

    def _inflated(self, body: bytes) -> bytes:
        """A body that came compressed, of which no more is inflated than may be taken."""
        most = min(self._largest or INFLATED, INFLATED)
        try:
            body = gzip.GzipFile(fileobj=io.BytesIO(body)).read(most + 1)
        except (EOFError, OSError, zlib.error) as error:
            raise invalid(f"the body cannot be read: {error}") from error
        if len(body) <= most:
            return body
        if most == self._largest:
            raise self._too_large()
        # TensorFlow Serving takes such a body for none.
        raise invalid(f"JSON Parse error: The document is empty, for it has more than {INFLATED} bytes uncompressed")

    def _too_large(self) -> RefusedError:
        text = f"the body is larger than the {self._largest} bytes that this server takes"
        return RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, text)

    def _answer(
        self, request: web.BaseRequest, body: bytes, stages: Stages, until: float | None, handed: float
    ) -> tuple[int, str, bytes]:
        """HTTP status, type and body of the answer to what was handed over at a time of `perf_counter`."""
        stages.queue = time.perf_counter() - handed
        method, path = request.method, request.raw_path
        if not path.lower().startswith("/v1/"):
            return self._beside(method, path)
        if method == "OPTIONS":
            if re.search("https?://", request.headers.get("Origin", "")):
                return 200, "application/json", b""
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, "Origin header is missing in CORS preflight")
        found = {"POST": ASKED, "GET": TOLD}.get(method, _NOTHING).fullmatch(path)
        if not found:
            stages.model = ""
            raise invalid(f"Malformed request: {method} {path}")
        name, version, label, verb = found.groups()
        spec = protocol.ModelSpec(name=_decoded(name or ""))
        if version is not None:
            if len(version.lstrip("0")) > 19 or int(version) >= 2**63:
                return 400, "application/json", b""
            spec.version.value = int(version)
        if label is not None:
            spec.version_label = _decoded(label)
        stages.model = self._core.models.known(spec.name)
        if method == "POST":
            if "gzip" in request.headers.get("Content-Encoding", ""):
                body = self._inflated(body)
            return 200, "application/json", self._inference(verb, spec, body, stages, until)
        if not spec.name:
            raise invalid("Missing model name in request.")
        if verb:
            asked = protocol.GetModelMetadataRequest(model_spec=spec, metadata_field=["signature_def"])
            return 200, "application/json", rest_json.write_metadata(self._core.inference.metadata(asked))
        return 200, "application/json", rest_json.write_status(self._core.models.status(spec))

    def _inference(self, verb: str, spec: protocol.ModelSpec, body: bytes, stages: Stages, until: float | None
                   ) -> bytes:  # fmt: skip
        core, stages.api = self._core, verb
        begun = time.perf_counter()
        recorder = core.sample()
        if verb == "predict":
            found = []

            def signature(key: str) -> protocol.SignatureDef:  # asked for after the body was parsed, as upstream does
                found.append(core.models.find(spec))
                return _signature(found[0], key)

            key, inputs, row = rest_json.read_predict(body, signature)
            key = key or DEFAULT
            stages.decode = time.perf_counter() - begun
            aliases, outputs = core.inference.predict(found[0], key, inputs, (), stages, until)
            begun = time.perf_counter()
            named = dict(zip(aliases, outputs, strict=True))
            answer = rest_json.write_predict(named, row=row)
            stages.encode = time.perf_counter() - begun
            if recorder:
                core.record(recorder, "predict_log", *_as_messages(spec, key, inputs, named))
            return answer
        key, given = rest_json.read_examples(body)
        spec.signature_name = key
        kind = protocol.ClassificationRequest if verb == "classify" else protocol.RegressionRequest
        asked = kind(model_spec=spec, input=given)
        stages.decode = time.perf_counter() - begun
        reply = getattr(core.inference, verb)(core.models.find(spec), asked, stages, until)
        if recorder:
            core.record(recorder, f"{verb}_log", asked.SerializeToString(), reply.SerializeToString())
        begun = time.perf_counter()
        write = rest_json.write_classifications if verb == "classify" else rest_json.write_regressions
        answer = write(reply)
        stages.encode = time.perf_counter() - begun
        return answer

    def _beside(self, method: str, path: str) -> tuple[int, str, bytes]:
        """What TensorFlow Serving does not have: health, the list of models, the API's description; and metrics."""
        models = self._core.models
        if method == "GET" and path == "/livez":
            return 200, "text/plain", b"ok\n"
        if method == "GET" and path == "/readyz":
            return (200, "text/plain", b"ok\n") if models.ready() else (503, "text/plain", b"not every model answers\n")
        if method == "GET" and path == "/models":
            listed = {name: {"versions": sorted(served), "latest": max(served, default=None)}
                      for name, served in models.served().items()}  # fmt: skip
            return 200, "application/json", json.dumps(listed, indent=1).encode()
        if method == "GET" and path == "/openapi.json":
            document = openapi.document(models.served(), token=self._core.gate.asks)
            return 200, "application/json", json.dumps(document, indent=1).encode()
        if method == "GET" and self._metrics_path and path == self._metrics_path:
            return 200, "text/plain", self._core.metrics.text(self._gauges()).encode()
        return 404, "text/html", NOT_FOUND

    def _gauges(self) -> dict[str, float]:
        served = self._core.models.served()
        asked = sum(one.asked for one in self._web.connections)
        return {"rest_requests_in_flight": asked, "versions_served": sum(map(len, served.values())),
                "uptime_seconds": time.time() - self._core.started}  # fmt: skip


class _Connection(web.RequestHandler):
    """A connection whose client must send a request's headers in time, or is hung up on.

    The time of the first request's begins with the connection, that of another's with its first byte: in between a
    connection may idle.
    """

    def __init__(self, web_: "_Web", *, patience: float, **named):
        super().__init__(web_, **named)
        self._web, self._patience, self._clock = web_, patience, None
        self.asked = False  # whether a byte of a request has come that has not been answered
        self.lost = asyncio.get_running_loop().create_future()  # done when the last byte of the last answer is away

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.wire = transport
        if self._web.draining:
            transport.abort()
        self._start_clock()

    def data_received(self, data: bytes) -> None:
        if data and not self.asked:
            self.asked = True
            self._start_clock()
        super().data_received(data)

    def connection_lost(self, error: BaseException | None) -> None:
        self.in_time()
        self.lost.set_result(None)
        super().connection_lost(error)

    def _start_clock(self) -> None:
        if not self._clock:
            self._clock = asyncio.get_running_loop().call_later(self._patience, self.wire.abort)

    def in_time(self) -> None:
        """The headers have come."""
        self.asked = True  # also where they came behind those before them
        if self._clock:
            self._clock.cancel()
            self._clock = None

    def log_exception(self, message, *arguments, exc_info=None, **named) -> None:
        """What is no valid HTTP says nothing of this program: a line, and no traceback."""
        if isinstance(exc_info, HttpProcessingError):
            log.warning("%s: no valid HTTP (%s)", message % arguments, exc_info.message.partition("\n")[0])
        else:
            super().log_exception(message, *arguments, exc_info=exc_info, **named)

    async def finish_response(self, request, response, *arguments) -> tuple[web.StreamResponse, bool]:
        if self._web.draining:
            response.force_close()
        try:
            return await super().finish_response(request, response, *arguments)
        finally:
            self.asked = False
            if self._web.draining:  # since the headers were written
                response.force_close()


class _Web(web.Server):
    def __init__(self, handler: Callable, *, patience: float, **named):
        super().__init__(handler, **named)
        self._patience, self.draining = patience, False

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, patience=self._patience, **self._kwargs)

    async def drain(self, grace: float) -> None:
        """Answer, within some seconds, requests of which a byte has come; close the connections, the idle ones now."""
        self.draining = True
        for _ in range(2):
            await asyncio.sleep(0)  # in this time what has come is read
        asked = [one.lost for one in self.connections if one.asked]
        for one in self.connections:
            if not one.asked:
                one.force_close()
        if asked:
            await asyncio.wait(asked, timeout=grace)


_NOTHING = re.compile(r"(?!)")


def _decoded(part: str) -> str:
    """A part of a path, percent-decoded: what it hides is data, and never a path."""
    try:
        return unquote_to_bytes(part).decode()
    except UnicodeDecodeError as error:
        raise invalid(f"Failed to decode model name:{part}") from error


def _signature(servable, key: str):
    definition = servable.definitions.get(key or DEFAULT)
    if definition is None:
        raise invalid(f'Serving signature name: "{key or DEFAULT}" not found in signature def')
    return definition


def _as_messages(spec, key, inputs, outputs) -> tuple[bytes, bytes]:
    request, reply = protocol.PredictRequest(), protocol.PredictResponse()
    for message, name in ((request, "inputs"), (reply, "outputs")):
        message.model_spec.CopyFrom(spec)
        message.model_spec.signature_name = key
        for alias, array in (inputs if name == "inputs" else outputs).items():
            tensors.fill(getattr(message, name)[alias], array)
    return request.SerializeToString(), reply.SerializeToString()
