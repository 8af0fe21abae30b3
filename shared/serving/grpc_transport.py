"""The services over gRPC.

What Python adds to a call bounds how many a server answers a second, so the way of a Predict is short: bytes in, bytes
out, and a pool of threads that takes calls from a queue without making a future of each.
"""

import contextlib
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from shared.serving import protocol, tensors
from shared.serving.core import Core
from shared.serving.flags import processors
from shared.serving.gate import Gate
from shared.serving.inference import Stages
from shared.serving.profiling import Profiler
from shared.serving.refusal import RefusedError, invalid
from shared.serving.servable import DEFAULT

MOST_DETAILS = 1024  # bytes of an error; TensorFlow Serving cuts what is longer
SERVICES = (protocol.PREDICTION, protocol.MODEL)
log = logging.getLogger("cornucopia.serve")


class _Here(threading.local):
    waited = 0.0  # seconds that the call which this thread runs was in the queue


class Pool:
    """Threads that run what is submitted; `grpc.server` takes it for an executor.

    Python runs one thread at a time, and the more of them want to, the longer each waits for its turn: for small models
    two threads answer nearly twice as many calls as eight. So as many run as there are processors, and one that is
    about to wait for long, for a large model or a batch, lends its place to another until it is back (`waiting`). Where
    calls wait and none ends while clients have opened calls and send nothing, more threads are added, up to `STUCK`,
    and taken back. `here.waited` tells a call how long it was in the queue; it is to tell when its message has come
    (`heard`).
    """

    STUCK, LOOK = 256, 0.25

    def __init__(self, running: int, most: int):
        self._most, self._count, self.here = most, 0, _Here()
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._lock, self._surplus = threading.Lock(), 0
        self._parked: list[threading.Lock] = []  # of each thread that sleeps, the lock that it sleeps on
        self._ended = 0  # calls
        self._silent: set[int] = set()  # threads that wait for a call's message
        self._relieving = 0  # threads that were added for those
        self._closed = threading.Event()
        threading.Thread(target=self._relieve, name="relieve", daemon=True).start()
        for _ in range(min(running, most)):
            self._add()

    def submit(self, call: Callable, *arguments, **named) -> None:
        """Run a call in some thread; what it returns is lost."""
        self._tasks.put((time.perf_counter(), call, arguments, named))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While this block lasts another thread may run in this one's place."""
        with self._lock:
            lent = True
            if self._surplus:
                self._surplus -= 1
            elif self._parked:
                self._parked.pop().release()
            elif self._count - self._relieving < self._most:
                self._add()
            else:
                lent = False  # all there may be are awake: there is nobody to sleep afterwards
        try:
            yield
        finally:
            if lent:
                with self._lock:
                    self._surplus += 1

    def heard(self) -> None:
        """The message of the call that this thread runs has come."""
        self._silent.discard(threading.get_ident())

    def close(self) -> None:
        """End the threads, each after the call that it runs; no call may be submitted any more."""
        with self._lock:
            self._closed.set()
            while self._parked:
                self._parked.pop().release()
        self._tasks.put(None)

    def _relieve(self) -> None:
        before = 0
        while not self._closed.wait(self.LOOK):
            silent = len(self._silent)
            stuck = self._ended == before and not self._tasks.empty() and silent > self._relieving
            before = self._ended
            with self._lock:
                if stuck and (self._parked or self._count < self.STUCK):
                    self._relieving += 1
                    if self._parked:
                        self._parked.pop().release()
                    else:
                        self._add()
                elif self._relieving > silent:
                    self._relieving -= 1
                    self._surplus += 1

    def _add(self) -> None:
        self._count += 1
        threading.Thread(target=self._work, name="answer", daemon=True).start()

    def _work(self) -> None:
        bed, me = threading.Lock(), threading.get_ident()
        bed.acquire()
        while (task := self._tasks.get()) is not None:
            came, call, arguments, named = task
            self.here.waited = time.perf_counter() - came
            self._silent.add(me)
            try:
                call(*arguments, **named)
            except Exception:  # a call that fails must not take the thread with it
                log.exception("a call failed")
            self._silent.discard(me)
            self._ended += 1
            del task, call, arguments, named  # what a request held goes with it, not with the next
            if self._surplus:
                with self._lock:
                    if park := self._surplus > 0 and not self._closed.is_set():
                        self._surplus -= 1
                        self._parked.append(bed)
                if park:
                    bed.acquire()
        self._tasks.put(None)  # for the next


class _Door(grpc.ServerInterceptor):
    """Asks the gate when a call comes: what waits for a thread is inside, and what is turned away waits for none.

    `calls` are those that the gate is for, by their paths; `answering` makes such a call of a name and what it does.
    """

    def __init__(self, gate: Gate, answering: Callable[[str, Callable], Callable]):
        self._gate, self._answering = gate, answering
        self._turning_away = ThreadPoolExecutor(1, thread_name_prefix="refuse")
        self.calls: dict[str, Callable] = {}

    def intercept_service(
        self, continuation: Callable, details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """What answers a call that has come."""
        call, gate = self.calls.get(details.method), self._gate
        if call is None or gate.open:
            return continuation(details)
        try:
            gate.enter(dict(details.invocation_metadata).get("authorization", ""))
        except RefusedError as error:
            return self._refusal(details.method.rpartition("/")[2], error.code, str(error))

        def inside(messages, context):
            try:
                data = next(messages, None)
                if data is None:  # in gRPC's words
                    text = f'"{details.method}" requires exactly one request message.'
                    context.abort(grpc.StatusCode.UNIMPLEMENTED, text)
                return call(data, context)
            finally:
                gate.leave()

        # As if messages came in a stream: that is begun even where the client is gone, and so it leaves in any case.
        return grpc.stream_unary_rpc_method_handler(inside)

    def _refusal(self, api: str, code: grpc.StatusCode, text: str) -> grpc.RpcMethodHandler:
        def refuse(*_):
            raise RefusedError(code, text)

        def turned_away(messages, context):  # and its message is not awaited
            return self._answering(api, refuse)(b"", context)

        turned_away.experimental_thread_pool = self._turning_away
        return grpc.stream_unary_rpc_method_handler(turned_away)

    def close(self) -> None:
        """Let the thread go."""
        self._turning_away.shutdown(wait=False)


class Grpc:
    """A gRPC server for what a Core answers."""

    def __init__(self, core: Core, *, threads: int, options: dict[str, int | str], largest: int = -1,
                 profiler: bool = False):  # fmt: skip
        """Make a server; `bind` gives it addresses, `start` opens them. `largest`: bytes of a message, -1 for any."""
        self._core, self._pool, self._profiler = core, Pool(processors(), threads), Profiler()
        settings = {
            "grpc.max_send_message_length": -1, "grpc.max_receive_message_length": largest, "grpc.so_reuseport": 0,
            **options,
        }  # fmt: skip
        self._door = _Door(core.gate, lambda api, work: self._inference(api, work))
        self._server = grpc.server(self._pool, options=list(settings.items()), interceptors=[self._door])
        prediction = {
            "Predict": self._inference("Predict", self._predict),
            "Classify": self._inference("Classify", self._of_examples(protocol.ClassificationRequest, "classify")),
            "Regress": self._inference("Regress", self._of_examples(protocol.RegressionRequest, "regress")),
            "MultiInference": self._inference(
                "MultiInference", self._of_examples(protocol.MultiInferenceRequest, "infer")
            ),
            "GetModelMetadata": self._inference("GetModelMetadata", self._metadata),
        }
        model = {
            "GetModelStatus": self._inference("GetModelStatus", self._status),
            "HandleReloadConfigRequest": self._inference("HandleReloadConfigRequest", self._reload),
        }
        services = {protocol.PREDICTION: prediction, protocol.MODEL: model}
        if profiler:
            services[protocol.PROFILER] = self._profiling()
        for service, calls in services.items():
            handlers = {name: grpc.unary_unary_rpc_method_handler(call) for name, call in calls.items()}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
            self._server.add_registered_method_handlers(service, handlers)
            self._door.calls |= {f"/{service}/{name}": call for name, call in calls.items()}
        self.health = health.HealthServicer()
        # Who watches over a busy server is not to wait for a thread behind what keeps it busy.
        self._checking = ThreadPoolExecutor(16, thread_name_prefix="health")
        self.health.Check = functools.partial(self.health.Check)
        self.health.Check.experimental_thread_pool = self._checking
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        for module in (health_pb2, reflection_pb2):
            protocol.add(module.DESCRIPTOR.serialized_pb)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server, pool=protocol.pool)

    def bind(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Take an address; return its port. OSError where it cannot be had."""
        try:
            if credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            host, _, port = address.rpartition(":")
            raise OSError(
                f"port {port} of {host} cannot be had: something else listens there; choose another"
            ) from error

    def start(self) -> None:
        """Open the addresses."""
        for name in ("", *SERVICES, "ModelService", "PredictionService"):
            self.health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._server.start()

    def stop(self, grace: float) -> threading.Event:
        """Take no new calls and let those in flight end within some seconds; the event says when it is done."""
        self.health.enter_graceful_shutdown()
        self._profiler.close()
        return self._server.stop(grace)

    def close(self) -> None:
        """Let the threads go, once what `stop` returns is set."""
        self._pool.close()
        self._door.close()
        self._checking.shutdown(wait=False)

    # Calls: bytes -> bytes.

    def _inference(self, api: str, work: Callable) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        core, record, waiting, here = self._core, self._core.metrics.request, self._pool.waiting, self._pool.here
        heard = self._pool.heard

        def handle(data: bytes, context: grpc.ServicerContext) -> bytes:
            heard()
            begun = time.perf_counter() - here.waited
            stages, code, reply, details = Stages(api, waiting), grpc.StatusCode.OK, None, ""
            stages.queue = here.waited
            sent = {name: value for name, value in context.invocation_metadata() if name in HEADERS}
            try:
                left = context.time_remaining()
                until = None if left is None or left > FAR else time.monotonic() + left
                reply = work(data, stages, until)
                if api in RECORDED and (recorder := core.sample()):
                    core.record(recorder, RECORDED[api], data, reply)
            except RefusedError as error:
                code, details = error.code, str(error)
            except DecodeError:
                code, details = grpc.StatusCode.INTERNAL, f"the message is no {api} request: it cannot be parsed"
            except MemoryError:
                code, details = grpc.StatusCode.RESOURCE_EXHAUSTED, "there is not enough memory for this request"
            except Exception as error:
                code, details = grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}"
                log.exception("%s of %s failed%s", api, stages.model or "no model", told(sent))
            if sent.keys() - USUAL:
                context.set_trailing_metadata(trailing(sent, stages))
            if stages.model is not None:
                record(stages.model, "GRPC", code.name, time.perf_counter() - begun, stages)
            if (access := core.access) is not None:
                ids = (sent.get(name, "") for name in IDS)
                access("GRPC", stages, code.name, time.perf_counter() - begun, *ids)
            if reply is None:
                context.abort(code, _cut(details))
            return reply

        return handle

    def _predict(self, data: bytes, stages: Stages, until: float | None) -> bytes:
        begun = time.perf_counter()
        request = protocol.PredictRequest.FromString(data)
        spec = request.model_spec
        stages.model = self._core.models.known(spec.name)
        if not spec.name and not request.HasField("model_spec"):
            raise invalid("Missing ModelSpec")
        servable = self._core.models.find(spec)
        key = spec.signature_name or DEFAULT
        inputs = {}
        for alias, proto in request.inputs.items():
            try:
                inputs[alias] = tensors.from_proto(proto)
            except ValueError as error:
                raise invalid(f"tensor parsing error: {alias}") from error
        stages.decode = time.perf_counter() - begun
        aliases, outputs = self._core.inference.predict(servable, key, inputs, request.output_filter, stages, until)
        begun = time.perf_counter()
        reply = protocol.PredictResponse()
        answered = reply.model_spec
        answered.name, answered.signature_name, answered.version.value = servable.name, key, servable.version
        content = self._core.as_content
        for alias, output in zip(aliases, outputs, strict=True):
            tensors.fill(reply.outputs[alias], output, content=content)
        data = reply.SerializeToString()
        stages.encode = time.perf_counter() - begun
        return data

    def _of_examples(self, kind: type, name: str) -> Callable:
        answer = getattr(self._core.inference, name)

        def work(data: bytes, stages: Stages, until: float | None) -> bytes:
            begun = time.perf_counter()
            request = kind.FromString(data)
            several = name == "infer"
            if several:  # tasks of one model; where there are none, as upstream, a name is missing, not the spec
                spec = request.tasks[0].model_spec if request.tasks else protocol.ModelSpec()
            else:
                spec = request.model_spec
            stages.model = self._core.models.known(spec.name)
            if not several and not request.HasField("model_spec"):
                raise invalid("Missing ModelSpec")
            servable = self._core.models.find(spec)
            stages.decode = time.perf_counter() - begun
            waited = stages.queue
            reply = answer(servable, request, stages, until).SerializeToString()
            # What is not another stage is encoding: the answer adds to them all while it is made.
            stages.encode = time.perf_counter() - begun - stages.decode - (stages.queue - waited) - stages.run
            return reply

        return work

    def _metadata(self, data: bytes, stages: Stages, until: float | None) -> bytes:
        request = protocol.GetModelMetadataRequest.FromString(data)
        if not request.HasField("model_spec"):
            raise invalid("Missing ModelSpec")
        return self._core.inference.metadata(request).SerializeToString()

    def _status(self, data: bytes, stages: Stages, until: float | None) -> bytes:
        request = protocol.GetModelStatusRequest.FromString(data)
        if not request.HasField("model_spec"):
            raise invalid("Missing ModelSpec")
        return self._core.models.status(request.model_spec).SerializeToString()

    def _reload(self, data: bytes, stages: Stages, until: float | None) -> bytes:
        request = protocol.ReloadConfigRequest.FromString(data)
        if request.config.WhichOneof("config") != "model_config_list":
            raise invalid("ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList is "
                          "currently supported")  # fmt: skip
        before = {name: self._core.metrics.value(name) for name in request.metric_names}
        with stages.waiting():
            self._core.models.configure(request.config, timeout=None if until is None else until - time.monotonic())
        reply = protocol.ReloadConfigResponse()
        reply.status.SetInParent()
        for name, value in before.items():
            reply.metric.add(name=name, int64_value_increase=self._core.metrics.value(name) - value)
        return reply.SerializeToString()

    def _profiling(self) -> dict[str, Callable]:
        def profile(data: bytes, context: grpc.ServicerContext) -> bytes:
            work = functools.partial(self._profiler.profile, context.is_active)
            return self._inference("Profile", work)(data, context)

        return {"Profile": profile, "Terminate": self._inference("Terminate", self._profiler.terminate)}


FAR = 10**8  # seconds; gRPC's way to say that a call has no deadline
IDS = ("x-request-id", "traceparent")
HEADERS = frozenset({"authorization", "server-timing", *IDS})
USUAL = frozenset({"authorization"})
RECORDED = {"Predict": "predict_log", "Classify": "classify_log", "Regress": "regress_log",
            "MultiInference": "multi_inference_log"}  # fmt: skip


def trailing(sent: dict[str, str], stages: Stages) -> tuple[tuple[str, str], ...]:
    """What goes back beside an answer: the request's ids, and, where it was asked for, where its time went."""
    back = [(name, sent[name]) for name in IDS if name in sent]
    if "server-timing" in sent:
        back.append(("server-timing", timing(stages)))
    return tuple(back)


def told(sent: Mapping[str, str]) -> str:
    """The ids that came with a request, as a log's line ends with them; empty where there are none."""
    return "".join(f" {name}={sent[name]}" for name in IDS if sent.get(name))


def timing(stages: Stages) -> str:
    """Milliseconds of each stage in the syntax of the Server-Timing header, and the batch's size."""
    parts = [f"{name};dur={1000 * getattr(stages, name):.3f}" for name in ("decode", "queue", "run", "encode")]
    return ", ".join([*parts, f"batch;dur={stages.batch}"])


def _cut(text: str) -> str:
    raw = text.encode(errors="replace")
    if len(raw) <= MOST_DETAILS:
        return text
    return raw[: MOST_DETAILS - 12].decode(errors="ignore") + "...TRUNCATED"
