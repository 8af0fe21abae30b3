"""How much a server bears, and where the time of a request goes.

`run` calls what it is given; `calling` gives a call that sends ready bytes and reads nothing of the reply, so that the
server is loaded and not the client. Asked with `server-timing: 1`, a server tells the milliseconds of its stages in the
syntax of W3C's Server-Timing; TensorFlow Serving does not, and then they are left out.
"""

import contextlib
import http.client
import itertools
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import numpy as np

from shared.serving import ask, protocol, replay, tensors, tls
from shared.serving.client import Call, Client, Inputs, ServerError, channel, request
from shared.serving.records import records

WARM_UP = Path("assets.extra", "tf_serving_warmup_requests")  # in the folder of a version
TRACED = 10  # one request in so many asks the server for its stages
MOST = 256  # requests in flight at a given rate; later ones wait for their turn, and their wait counts
TRACE = ("server-timing", "1")  # asks the server for its stages
STAGES = {"run": "the network ran", "queue": "in the queue", "decode": "decoding", "encode": "encoding"}
Stages = dict[str, float]  # milliseconds by name, and the size of the batch that ran as `batch`


def load(
    model: str,
    values: Mapping[str, str],
    *,
    address: str = "127.0.0.1:8500",
    signature: str = "",
    token: str = "",
    certificate: Sequence[str | Path] = (),
    batch: int = 1,
    concurrency: int = 8,
    seconds: float = 10.0,
    rate: float = 0.0,
    saved_models: Path = Path("saved_models"),
    requests: str = "",
) -> bool:
    """Load a server with requests to a model and print what came of it; whether every request was answered.

    `token` and `certificate` are as for Client. `requests` is the path of a log of requests, which are sent in turn in
    place of one made here, over gRPC, and whose answers are compared with those recorded.

    Raises:
        ValueError: the server refuses the first request, the inputs are not what the model takes, or a file of the
            certificate holds none.
        OSError: no server answers at the address, or a file cannot be read.
    """
    if batch < 1:
        raise ValueError(f"a request needs 1 example or more, not {batch}")
    if requests and (values or signature or batch > 1 or address.startswith(("http://", "https://"))):
        raise ValueError("--requests sends over gRPC what was recorded; give no inputs, --signature or --batch beside "
                         "it, and no REST address")  # fmt: skip
    pace = f"{rate:g} requests/s" if rate else f"{concurrency} at once"
    try:
        if requests:
            recorded, answers = replay.read(Path(requests), model), {}
            print(f"{model} at {address} with the {len(recorded)} requests of {requests}, {pace}, for {seconds:g} s")
            messages = [(one.method, one.body) for one in recorded]
            with _sending(address, messages, token=token, certificate=certificate, answers=answers) as call:
                call(False)
                result = run(call, concurrency=concurrency, seconds=seconds, rate=rate)
            print(f"{describe(result)}\n{'answers':<10} {replay.compared(recorded, answers)}")
            return not result.errors
        found = None if values else warm_up(saved_models / model, signature)
        if not found:
            with Client(address, token=token, certificate=certificate, retries=0) as client:
                which = {"signature": signature or "serving_default"}
                found = _inputs(values, model, client.inputs(model, **which), client.defaults(model, **which))
        inputs, origin = found
        repeated = {
            name: np.repeat(value[:1], batch, axis=0) if value.ndim else value for name, value in inputs.items()
        }
        message = request(model, repeated, signature=signature)
        print(f"{model} at {address} with {origin}, {batch} {'example' if batch == 1 else 'examples'} a request, "
              f"{pace}, for {seconds:g} s")  # fmt: skip
        with calling(address, message, token=token, certificate=certificate) as call:
            call(False)
            result = run(call, concurrency=concurrency, seconds=seconds, rate=rate)
    except ServerError as error:
        raise ask.explained(error, address) from error
    print(describe(result, batch=batch))
    return not result.errors


def _inputs(
    values: Mapping[str, str], model: str, takes: Inputs, defaults: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], str]:
    """What to send to a model that takes such inputs, and where it comes from: the flags, or nothing but zeros.

    Inputs with a default are sent too: a server that batches wants as many rows of each.
    """
    if values:
        return {**defaults, **ask.read(model, values, takes, defaults)}, "the inputs of the flags"
    zeros = {}
    for name, (dtype, shape) in takes.items():
        sizes = [1 if size < 0 else size for size in shape]
        zeros[name] = np.full(sizes, b"", object) if dtype.kind == "O" else np.zeros(sizes, dtype)
    return {**zeros, **defaults}, "zeros and empty strings"


def warm_up(base: Path, signature: str = "") -> tuple[dict[str, np.ndarray], str] | None:
    """The first warm-up request of the newest version below a model's folder, and its path; None: there is none."""
    numbered = {int(path.name): path for path in base.glob("*") if path.name.isdecimal()}
    path = numbered[max(numbered)] / WARM_UP if numbered else base
    if not path.is_file():
        return None
    log = protocol.PredictionLog.FromString(next(records(path), b""))
    sent = log.predict_log.request
    if not sent.inputs or (sent.model_spec.signature_name or "serving_default") != (signature or "serving_default"):
        return None
    return {name: tensors.from_proto(value) for name, value in sent.inputs.items()}, f"the first request of {path}"


@contextlib.contextmanager
def calling(
    address: str,
    message: protocol.PredictRequest,
    *,
    token: str = "",
    certificate: Sequence[str | Path] = (),
    timeout: float = 60.0,
) -> Iterator[Callable[[bool], Stages | None]]:
    """A call for `run` that sends one Predict message to an address as of Client; it raises ServerError.

    Called with True it asks the server for its stages, and returns them where the server tells.
    """
    if address.startswith(("http://", "https://")):
        plain = _headers(token)
        context = tls.client_context(list(map(Path, certificate))) if address.startswith("https://") else None
        with contextlib.ExitStack() as opened:
            yield _rest_call(address, message, plain, [*plain, TRACE], timeout, context, opened)
        return
    messages = [("Predict", message.SerializeToString())]
    with _sending(address, messages, token=token, certificate=certificate, timeout=timeout) as call:
        yield call


def _headers(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")] if token else []


@contextlib.contextmanager
def _sending(
    address: str,
    messages: Sequence[tuple[str, bytes]],
    *,
    token: str,
    certificate: Sequence[str | Path],
    timeout: float = 60.0,
    answers: dict[int, bytes] | None = None,
) -> Iterator[Callable[[bool], Stages | None]]:
    """As `calling`, over gRPC and with several messages in turn, each with the name of its call.

    The last answer to each, by its number, goes to `answers`.
    """
    plain, turn = _headers(token), itertools.count()
    traced = [*plain, TRACE]
    with channel(address.removeprefix("grpc://"), list(map(Path, certificate)), retries=0) as connection:
        # Without serializers: bytes as they are.
        calls = {name: connection.unary_unary(f"/{protocol.PREDICTION}/{name}") for name, _ in messages}

        def call(trace: bool) -> Stages | None:
            number = next(turn) % len(messages)
            name, body = messages[number]
            try:
                if trace:
                    answer, done = calls[name].with_call(body, timeout=timeout, metadata=traced)
                else:
                    answer = calls[name](body, timeout=timeout, metadata=plain)
            except grpc.RpcError as error:
                raise ServerError(error.code(), error.details()) from error
            if answers is not None:
                answers[number] = answer
            if not trace:
                return None
            return stages(dict(done.trailing_metadata() or ()).get("server-timing", ""))

        yield call


def _rest_call(
    address: str,
    message: protocol.PredictRequest,
    plain: list,
    traced: list,
    timeout: float,
    context: ssl.SSLContext | None,
    opened: contextlib.ExitStack,
) -> Callable[[bool], Stages | None]:
    from shared.serving import client_rest

    arrays = {name: tensors.from_proto(value) for name, value in message.inputs.items()}
    sent = client_rest.to_request(Call("Predict", message.model_spec, timeout, arrays))
    target, kept = urlsplit(address), threading.local()

    def call(trace: bool) -> Stages | None:
        # The standard library's connection costs the client a fraction of what httpx2's does.
        try:
            if not hasattr(kept, "connection"):
                if context:
                    kept.connection = http.client.HTTPSConnection(target.netloc, timeout=timeout, context=context)
                else:
                    kept.connection = http.client.HTTPConnection(target.netloc, timeout=timeout)
                opened.callback(kept.connection.close)
            kept.connection.request("POST", sent["url"], sent["content"], dict(traced if trace else plain))
            response = kept.connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            kept.__dict__.pop("connection").close()
            late = isinstance(error, TimeoutError)
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.UNAVAILABLE
            raise ServerError(code, str(error)) from error
        if response.status != 200:
            code = client_rest.CODES.get(response.status, grpc.StatusCode.UNKNOWN)
            raise ServerError(code, content[:200].decode(errors="replace"))
        return stages(response.headers.get("server-timing", "")) if trace else None

    return call


def stages(text: str) -> Stages:
    """Milliseconds by name, of `decode;dur=0.051, run;dur=0.912`."""
    found = {}
    for entry in text.split(","):
        name, *parameters = [part.strip() for part in entry.split(";")]
        for parameter in parameters:
            if parameter.startswith("dur="):
                found[name] = float(parameter.removeprefix("dur=").strip('"'))
    return found


@dataclass(frozen=True)
class Result:
    """What came of a load; times in milliseconds."""

    seconds: float  # that were measured
    latencies: np.ndarray  # of the answered requests: from the call, or from when it was due at a given rate
    errors: dict[str, int]  # name of a status code -> failed requests, those of the warm-up too
    waited: float  # mean of the traced requests: between when a request was due and when it was sent
    took: float  # mean of the traced requests: between when it was sent and when it was answered
    stages: Stages  # means of the traced requests; empty: the server does not say
    client: float  # processor time of this process for each request

    @property
    def throughput(self) -> float:
        """Answered requests a second."""
        return len(self.latencies) / self.seconds

    def percentile(self, percent: float) -> float:
        """Milliseconds within which so many of the requests were answered; NaN without any."""
        return float(np.percentile(self.latencies, percent)) if len(self.latencies) else float("nan")


def run(
    call: Callable[[bool], Stages | None], *, concurrency: int = 8, seconds: float = 10.0, rate: float = 0.0
) -> Result:
    """Call for some seconds, of which the first tenth (at most one second) is warm-up and not counted.

    Without a rate, `concurrency` callers each wait for their answer before they ask again. At a rate of requests a
    second, calls start when they are due whether or not others have been answered, and their latency counts from then:
    a server that stands still is charged for all that it kept waiting (Gil Tene's "coordinated omission"). Ctrl-C ends
    it early, with the result so far.
    """
    if concurrency < 1 or seconds <= 0 or rate < 0:
        raise ValueError(f"a load needs 1 caller or more, seconds above 0 and no rate or one above 0, not "
                         f"{concurrency}, {seconds:g} and {rate:g}")  # fmt: skip
    done: list[tuple[float, float, float, Stages | None]] = []  # due, sent, answered, stages
    errors: Counter[str] = Counter()
    stop, number = threading.Event(), itertools.count()
    begun, worked = time.perf_counter(), time.process_time()
    ends = begun + seconds

    def one(due: float) -> None:
        trace = next(number) % TRACED == 0
        sent = time.perf_counter()
        try:
            found = call(trace)
        except ServerError as error:
            errors[error.code.name] += 1
        else:
            done.append((due, sent, time.perf_counter(), found))

    def caller() -> None:
        while not stop.is_set() and (now := time.perf_counter()) < ends:
            one(now)

    pool = ThreadPoolExecutor(MOST if rate else concurrency)
    try:
        if rate:
            waiting = _schedule(pool, one, begun=begun, rate=rate, seconds=seconds)
        else:
            waiting = [pool.submit(caller) for _ in range(concurrency)]
        for future in waiting:
            future.result()
    except KeyboardInterrupt:
        stop.set()
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
    return _result(list(done), errors, begun, begun + min(1.0, seconds / 10), time.process_time() - worked)


def _schedule(pool: ThreadPoolExecutor, one: Callable[[float], None], *, begun: float, rate: float, seconds: float):
    waiting = []
    for index in range(max(1, int(rate * seconds))):
        due = begun + index / rate
        if (early := due - time.perf_counter()) > 0:
            time.sleep(early)
        waiting.append(pool.submit(one, due))
    return waiting


def _result(done: list, errors: Mapping[str, int], begun: float, warm: float, worked: float) -> Result:
    counted = [entry for entry in done if entry[0] >= warm]
    traced = [entry for entry in counted if entry[3] is not None]
    told = [entry[3] for entry in traced if entry[3]]
    names = dict.fromkeys(name for entry in told for name in entry)
    return Result(
        seconds=max([answered for _, _, answered, _ in counted], default=warm + 1e-9) - warm,
        latencies=np.array([1000 * (answered - due) for due, _, answered, _ in counted]),
        errors=dict(errors),
        waited=_mean(1000 * (sent - due) for due, sent, _, _ in traced),
        took=_mean(1000 * (answered - sent) for _, sent, answered, _ in traced),
        stages={name: _mean(entry.get(name, 0.0) for entry in told) for name in names},
        client=1000 * worked / max(1, len(done) + sum(errors.values())),
    )


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def describe(result: Result, *, batch: int = 1) -> str:
    """A result as a person reads it, with a line at its end that says where the time went."""
    rows = {
        "throughput": f"{result.throughput:,.1f} requests/s"
        + (f", {batch * result.throughput:,.1f} examples/s" if batch > 1 else ""),
        "latency": ", ".join(f"p{percent} {result.percentile(percent):.2f} ms" for percent in (50, 95, 99)),
        "errors": ", ".join(f"{count} {code}" for code, count in sorted(result.errors.items())) or "none",
        "client": f"{result.client:.3f} ms of processor time for each request",
    }
    if "batch" in result.stages:
        rows["batches"] = f"{result.stages['batch']:.1f} examples ran together on average"
    lines = [f"{name:<10} {text}" for name, text in rows.items()]
    return "\n".join([*lines, f"{'time':<10} {_where(result)}"])


def _where(result: Result) -> str:
    if not result.stages:
        return "the server does not say where it went"
    parts: dict[str, float] = {"before it was sent": result.waited} if result.waited >= 0.05 else {}
    own = {name: value for name, value in result.stages.items() if name != "batch"}
    for name in [*STAGES, *sorted(set(own) - set(STAGES))]:
        if name in own:
            parts[STAGES.get(name, name)] = own[name]
    parts["between client and server"] = max(0.0, result.took - sum(own.values()))
    whole = result.waited + result.took
    said = [f"{value:.2f} ms ({100 * value / whole:.0f} %) {name}" for name, value in parts.items()]
    return f"of {whole:.2f} ms on average, {', '.join(said)}"
