"""A server of TensorFlow Serving's protocol without TensorFlow, over gRPC and REST, that fails when it is told to.

It serves two versions of `adder`: a [rows] and b [] -> sum = a + b, text; and `echo`: data, strings -> data_bytes.
"""

import base64
import contextlib
import http.server
import json
import ssl
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from google.protobuf import json_format

from shared.serving import protocol, tensors
from shared.serving.client import channel_options

TIMING = "decode;dur=0.100, queue;dur=0.200, run;dur=0.500, encode;dur=0.100, batch;dur=8"
SIGNATURES = {
    "adder": ({"a": (1, [-1]), "b": (1, [])}, {"sum": (1, [-1]), "text": (7, [-1])}),
    "echo": ({"data": (7, [-1])}, {"data_bytes": (7, [-1])}),
    "typed": ({"a": (9, [-1, 2])}, {"a": (9, [-1, 2]), "shape": (3, [2])}),
}


def definitions(model):
    found = protocol.SignatureDefMap()
    for side, infos in zip(("inputs", "outputs"), SIGNATURES[model], strict=True):
        for name, (dtype, shape) in infos.items():
            info = getattr(found.signature_def["serving_default"], side)[name]
            info.dtype = dtype
            for size in shape:
                info.tensor_shape.dim.add(size=size)
    found.signature_def["__saved_model_init_op"].SetInParent()
    return found


class Refused(Exception):  # noqa: N818, no error of the tests
    def __init__(self, code, text):
        super().__init__(text)
        self.code = code


class StandIn:
    """What both interfaces answer with; `calls` are (method, headers) of those that came."""

    def __init__(self):
        self.calls, self.failures, self.wait, self.timing = [], [], 0.0, TIMING
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def enter(self, method, headers):
        with self._lock:
            self.calls.append((method, dict(headers)))
            failure = self.failures.pop(0) if self.failures else None
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            time.sleep(self.wait)
            if failure:
                raise Refused(failure, "told to fail")
        finally:
            with self._lock:
                self.at_once -= 1

    def predict(self, spec, inputs):
        if spec.name not in SIGNATURES:
            raise Refused(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: Latest({spec.name})")
        if spec.signature_name not in ("", "serving_default"):
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{spec.signature_name}" not found.'
            )
        if spec.version_label not in ("", "stable"):
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT, f"Unrecognized servable version label: {spec.version_label}"
            )
        if spec.name == "echo":
            return {"data_bytes": inputs["data"]}
        if spec.name == "typed":
            return {"a": inputs["a"], "shape": np.array(inputs["a"].shape, np.int32)}
        bonus = 1000 if spec.version.value == 1 else 0
        total = inputs["a"] + inputs["b"] + np.float32(bonus)
        return {"sum": total, "text": np.array([f"{value:.1f} ü".encode() for value in total], object)}


@contextlib.contextmanager
def over_grpc(files=()):
    """Serve for as long as the block lasts; gives (address, StandIn). With files (key, certificate): TLS both ways."""
    stand_in = StandIn()

    def handler(method, answer):
        def run(request, context):
            metadata = dict(context.invocation_metadata())
            try:
                stand_in.enter(method, metadata)
                if "server-timing" in metadata and stand_in.timing:
                    context.set_trailing_metadata([("server-timing", stand_in.timing)])
                return answer(request)
            except Refused as error:
                context.abort(error.code, str(error))

        _, sent, received = METHODS[method]
        return grpc.unary_unary_rpc_method_handler(run, sent.FromString, received.SerializeToString)

    def predict(request):
        reply = protocol.PredictResponse()
        inputs = {name: tensors.from_proto(value) for name, value in request.inputs.items()}
        for name, value in stand_in.predict(request.model_spec, inputs).items():
            if not request.output_filter or name in request.output_filter:
                tensors.fill(reply.outputs[name], value)
        return reply

    def metadata(request):
        reply = protocol.GetModelMetadataResponse()
        if request.model_spec.name not in SIGNATURES:
            raise Refused(
                grpc.StatusCode.NOT_FOUND, f"Servable not found for request: Latest({request.model_spec.name})"
            )
        reply.metadata["signature_def"].Pack(definitions(request.model_spec.name))
        return reply

    def classify(request):
        reply = protocol.ClassificationResponse()
        for example in request.input.example_list.examples:
            feature = example.features.feature
            classes = reply.result.classifications.add().classes
            kinds = "/".join(sorted(f"{name}:{feature[name].WhichOneof('kind')}" for name in feature))
            classes.add(label=kinds, score=feature["x"].float_list.value[0])
        return reply

    def regress(request):
        reply = protocol.RegressionResponse()
        for example in request.input.example_list.examples:
            reply.result.regressions.add(value=example.features.feature["x"].float_list.value[0])
        return reply

    answers = {"Predict": predict, "GetModelMetadata": metadata, "Classify": classify, "Regress": regress}
    server = grpc.server(ThreadPoolExecutor(16), options=[*channel_options(0), ("grpc.so_reuseport", 0)])
    handlers = {method: handler(method, answer) for method, answer in answers.items()}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(protocol.PREDICTION, handlers)])
    handlers = {"GetModelStatus": handler("GetModelStatus", lambda _: statuses())}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(protocol.MODEL, handlers)])
    if files:
        key, certificate = [path.read_bytes() for path in files]
        credentials = grpc.ssl_server_credentials([(key, certificate)], certificate, require_client_auth=True)
        port = server.add_secure_port("127.0.0.1:0", credentials)
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", stand_in
    finally:
        server.stop(0).wait()


METHODS = {
    name: (service, *classes)
    for service in (protocol.PREDICTION, protocol.MODEL)
    for name, classes in protocol.methods(service).items()
}


def statuses():
    reply = protocol.GetModelStatusResponse()
    reply.model_version_status.add(version=2, state=30)
    reply.model_version_status.add(version=1, state=50, status={"error_code": 3, "error_message": "no variables"})
    return reply


@contextlib.contextmanager
def over_rest(files=()):
    """As `over_grpc`."""
    stand_in = StandIn()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self):
            def answer():
                if self.path == "/v1/models/adder":
                    return json_format.MessageToDict(statuses(), preserving_proto_field_name=True)
                name = self.path.split("/")[3]
                found = definitions(name) if name in SIGNATURES else None
                if not found or not self.path.endswith("/metadata"):
                    raise Refused(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: Latest({name})")
                inner = json_format.MessageToDict(found, preserving_proto_field_name=True,
                                                  always_print_fields_with_no_presence=True)  # fmt: skip
                return {"model_spec": {"name": name}, "metadata": {"signature_def": inner}}

            self.answer(answer)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.answer(lambda: self.post(body))

        def post(self, body):
            path, _, verb = self.path.rpartition(":")
            words = path.split("/")
            spec = protocol.ModelSpec(name=words[3], signature_name=body.get("signature_name", ""))
            if words[4:5] == ["versions"]:
                spec.version.value = int(words[5])
            elif words[4:5] == ["labels"]:
                spec.version_label = words[5]
            if verb == "classify":
                return {"results": [[[f"{sorted(one)}", one["x"]]] for one in body["examples"]]}
            if verb == "regress":
                return {"results": [one["x"] for one in body["examples"]]}
            takes = SIGNATURES.get(spec.name, ({},))[0]
            dtypes = {name: tensors.dtype_of(number) for name, (number, _) in takes.items()}
            inputs = {name: from_json(value, dtypes.get(name)) for name, value in body["inputs"].items()}
            found = stand_in.predict(spec, inputs)
            if len(found) == 1:  # without its name
                return {"outputs": [{"b64": base64.b64encode(one).decode()} for one in found["data_bytes"]]}
            return {"outputs": {name: to_json(value) for name, value in found.items()}}

        def answer(self, make):
            status = 200
            try:
                stand_in.enter(self.path, {name.lower(): value for name, value in self.headers.items()})
                body = make()
            except Refused as error:
                status = {grpc.StatusCode.NOT_FOUND: 404, grpc.StatusCode.UNAVAILABLE: 503}.get(error.code, 400)
                body = {"error": str(error)}
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            if "server-timing" in self.headers and stand_in.timing:
                self.send_header("server-timing", stand_in.timing)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *about):
            if not isinstance(sys.exception(), OSError):  # a client that went away
                super().handle_error(*about)

    with Server(("127.0.0.1", 0), Handler) as server:
        if files:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files[1])
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_cert_chain(files[1], files[0])
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"{'https' if files else 'http'}://127.0.0.1:{server.server_port}", stand_in
        finally:
            server.shutdown()
            thread.join()


def from_json(value, dtype):
    if dtype and dtype.kind == "O":
        return np.array(
            [base64.b64decode(one["b64"]) if isinstance(one, dict) else one.encode() for one in value], object
        )
    return np.array(value, dtype)


def to_json(array):
    if array.dtype == object:
        return [one.decode() for one in array]
    return array.tolist()
