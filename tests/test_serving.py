"""The contract of TensorFlow Serving, row by row, through the official stubs and plain HTTP.

The same tests run against a real one: see tests/serving_models.py.
"""

import base64
import gzip
import json
import socket

import grpc
import numpy as np
import pytest
import tensorflow as tf
from conftest import REAL
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)


def refused(call, *arguments, **named):
    with pytest.raises(grpc.RpcError) as error:
        call(*arguments, **named)
    return error.value.code().name, error.value.details()


# Predict.


def message(model="adder", **inputs):
    """A request to add; an input given replaces its default, None leaves it out."""
    if model == "adder":
        inputs = {"a": np.array([1, 2], np.float32), "b": np.float32(0.5), **inputs}
    built = predict_pb2.PredictRequest()
    built.model_spec.name = model
    for name, value in inputs.items():
        if value is not None:
            built.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return built


def changed(**spec):
    built = message()
    for name, value in spec.items():
        if name == "version":
            built.model_spec.version.value = value
        else:
            setattr(built.model_spec, name, value)
    return built


def filtered(*names):
    built = message()
    built.output_filter.extend(names)
    return built


def without_spec():
    built = message()
    built.ClearField("model_spec")
    return built


def cut():
    built = message()
    built.inputs["a"].tensor_content = built.inputs["a"].tensor_content[:5]
    return built


def test_predict(prediction):
    reply = prediction.Predict(message())
    assert list(reply.outputs["sum"].float_val) == [1.5, 2.5]  # in the typed field, where clients look
    assert reply.outputs["sum"].tensor_content == b""
    assert list(reply.outputs["text"].string_val) == [b"1.000000", b"2.000000"]
    assert (reply.model_spec.name, reply.model_spec.version.value) == ("adder", 3)  # the newest by number
    assert reply.model_spec.signature_name == "serving_default"
    assert prediction.Predict(changed(version=1)).model_spec.version.value == 1
    assert prediction.Predict(changed(signature_name="serving_default")).model_spec.version.value == 3


def test_predict_repeats_the_last_of_too_few_values_and_filters(prediction):
    built = filtered("sum")
    built.inputs["a"].tensor_content = b""
    built.inputs["a"].float_val.append(7)
    reply = prediction.Predict(built)
    assert list(reply.outputs["sum"].float_val) == [7.5, 7.5]
    assert set(reply.outputs) == {"sum"}


def test_an_input_with_a_default(prediction, rest):
    assert list(prediction.Predict(message("scaled", a=np.float32([3]))).outputs["y"].float_val) == [6]
    sent = message("scaled", a=np.float32([3]), b=np.float32(5))
    assert list(prediction.Predict(sent).outputs["y"].float_val) == [15]
    for misspelt in ({"a": np.float32([3]), "bb": np.float32(5)}, {"a": np.float32([3]), "b": 5.0, "c": 1.0}):
        with pytest.raises(grpc.RpcError) as refused:  # no default stands in for it
            prediction.Predict(message("scaled", **misspelt))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "input size does not match signature: 3!=2" in refused.value.details()
    with pytest.raises(grpc.RpcError) as refused:
        prediction.Predict(message("scaled", a=np.float32([3]), bb=np.float32(5)))
    text = "Inputs contains invalid name. Used request inputs: a, request input: a,bb"
    assert refused.value.details() == text
    # REST knows no defaults.
    assert json.loads(rest("POST", "/v1/models/scaled:predict", {"inputs": {"a": [3], "b": 5}})[2]) == {"outputs": [15]}
    status, _, body = rest("POST", "/v1/models/scaled:predict", {"inputs": {"a": [3]}})
    assert (status, json.loads(body)) == (400, {"error": "Missing named input: b in 'inputs' object."})
    status, _, body = rest("POST", "/v1/models/scaled:predict", {"instances": [{"a": 3}]})
    assert status == 400
    assert "keys must be equal to: a,b" in json.loads(body)["error"]


def test_narrow_integers_keep_their_lowest_bits(prediction, rest):
    sent = message("narrow", signed=np.zeros(3, np.int8), unsigned=np.zeros(3, np.uint8))
    for proto in sent.inputs.values():
        proto.tensor_content = b""
        proto.int_val[:] = [300, -1, 70_000]
    reply = prediction.Predict(sent)
    assert list(reply.outputs["signed"].int_val) == [44, -1, 112]
    assert list(reply.outputs["unsigned"].int_val) == [44, 255, 112]
    inputs = {name: [300, -1, 70_000] for name in ("signed", "unsigned")}
    answer = json.loads(rest("POST", "/v1/models/narrow:predict", {"inputs": inputs})[2])
    assert answer == {"outputs": {"signed": [44, -1, 112], "unsigned": [44, 255, 112]}}
    status, _, body = rest("POST", "/v1/models/narrow:predict", {"inputs": {"signed": [2**31], "unsigned": [0]}})
    assert status == 400
    assert "JSON Value: 2147483648 Type: Number is not of expected type: int8" in json.loads(body)["error"]


def test_predict_does_not_check_shapes_against_the_signature(prediction):
    reply = prediction.Predict(message(a=np.ones([2, 2], np.float32)))
    assert tf.make_ndarray(reply.outputs["sum"]).tolist() == [[1.5, 1.5], [1.5, 1.5]]
    assert tf.make_ndarray(prediction.Predict(message(a=np.float32(1))).outputs["sum"]) == 1.5


def test_kernels_refuse_shapes_in_their_words(prediction):
    code, text = refused(prediction.Predict, message(a=np.ones(3, np.float32), b=np.ones(2, np.float32)))
    assert code == "INVALID_ARGUMENT"
    assert "Incompatible shapes: [3] vs. [2]" in text


PREDICT = {
    "no model_spec": (without_spec, "INVALID_ARGUMENT", "Missing ModelSpec"),
    "empty name": (lambda: changed(name=""), "INVALID_ARGUMENT", "ModelSpec has no name specified."),
    "unknown model": (lambda: changed(name="x"), "NOT_FOUND", "Servable not found for request: Latest(x)"),
    "unknown version": (lambda: changed(version=9), "NOT_FOUND", "Servable not found for request: Specific(adder, 9)"),
    "unknown label": (lambda: changed(version_label="best"), "INVALID_ARGUMENT",
                      "Unrecognized servable version label: best"),
    "unknown signature": (lambda: changed(signature_name="s"), "FAILED_PRECONDITION",
                          'Serving signature key "s" not found.'),
    "count differs": (lambda: message(b=None), "INVALID_ARGUMENT",
                      "input size does not match signature: 1!=2 len({a}) != len({a,b}). Sent extra: {}. "
                      "Missing but required: {b}."),
    "too many": (lambda: message(c=np.float32(1)), "INVALID_ARGUMENT",
                 "input size does not match signature: 3!=2 len({a,b,c}) != len({a,b}). Sent extra: {c}. "
                 "Missing but required: {}."),
    "other name": (lambda: message(b=None, c=np.float32(1)), "INVALID_ARGUMENT",
                   "Signature input alias: b(feed name: "),
    "undecodable": (cut, "INVALID_ARGUMENT", "tensor parsing error: a"),
    "filter unknown": (lambda: filtered("z"), "INVALID_ARGUMENT", "output tensor alias not found in signature: z "
                       "Outputs expected to be in the set {sum,text}."),
    "filter twice": (lambda: filtered("sum", "sum"), "INVALID_ARGUMENT", "duplicate output tensor alias: sum"),
    "dtype": (lambda: message(a=np.array([1], np.int32)), "INVALID_ARGUMENT",
              "Expects arg[0] to be float but int32 is provided"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "code", "text"), PREDICT.values(), ids=PREDICT.keys())
def test_predict_refuses(prediction, make, code, text):
    found, details = refused(prediction.Predict, make())
    assert found == code
    assert details.startswith(text)


def test_long_errors_are_cut(prediction):
    code, details = refused(prediction.Predict, changed(signature_name="s" * 2000))
    assert code == "FAILED_PRECONDITION"
    assert len(details) == 1024
    assert details.endswith("...TRUNCATED")
    code, details = refused(prediction.Predict, changed(signature_name="語" * 2000))
    assert code == "FAILED_PRECONDITION"
    assert 1021 < len(details.encode()) <= 1024  # gRPC bounds bytes, and drops what has too many
    assert details.endswith("語...TRUNCATED")


def test_bytes_that_are_no_message_are_refused(channel, prediction):
    call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    assert refused(call, b"\xff\xff\xff")[0] == "INTERNAL"
    assert prediction.Predict(message())  # and others are served


def test_large_messages_pass(channel, addresses):
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(addresses[0], options=options) as large:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(large)
        reply = stub.Predict(message("affine", x=np.ones([2_000_000, 2], np.float32)))  # 16 MB each way
        assert len(reply.outputs["y"].float_val) == 4_000_000


def test_deadlines_are_kept(prediction):
    large = message("affine", x=np.ones([100_000, 2], np.float32))
    assert refused(prediction.Predict, large, timeout=1e-4)[0] == "DEADLINE_EXCEEDED"


# Classify, Regress, MultiInference.


def examples(request, *values, context=None, **spec):
    request.model_spec.name = spec.get("name", "judge")
    request.model_spec.signature_name = spec.get("signature", "")
    if context is not None:
        request.input.example_list_with_context.context.features.feature["x"].float_list.value.append(context)
    for value in values:
        listed = request.input.example_list_with_context if context is not None else request.input.example_list
        example = listed.examples.add()
        if value is not None:
            example.features.feature["x"].float_list.value.append(value)
    return request


def to_classify(*values, **spec):
    return examples(classification_pb2.ClassificationRequest(), *values, **spec)


def to_regress(*values, **spec):
    return examples(regression_pb2.RegressionRequest(), *values, **{"signature": "regress", **spec})


def test_classify(prediction):
    reply = prediction.Classify(to_classify(0.5, 2.0))
    rows = [[(one.label, one.score) for one in row.classes] for row in reply.result.classifications]
    assert rows == [[("low", -0.5), ("high", 0.5)], [("low", -2.0), ("high", 2.0)]]
    assert (reply.model_spec.name, reply.model_spec.signature_name) == ("judge", "serving_default")
    assert reply.model_spec.version.value == 1
    without_classes = prediction.Classify(to_classify(3.0, signature="scores"))
    assert [(one.label, one.score) for one in without_classes.result.classifications[0].classes] == [("", 3.0)]


def test_regress(prediction):
    reply = prediction.Regress(to_regress(0.5, 2.0))
    assert [one.value for one in reply.result.regressions] == [1.0, 4.0]
    assert reply.model_spec.signature_name == "regress"


def test_a_context_is_part_of_each_example(prediction):
    reply = prediction.Regress(to_regress(None, 4.0, context=3.0))
    assert [one.value for one in reply.result.regressions] == [6.0, 8.0]  # an example's own feature wins


EXAMPLES = {
    "no spec": ("Classify", classification_pb2.ClassificationRequest, "INVALID_ARGUMENT", "Missing ModelSpec"),
    "no input": ("Classify", lambda: to_classify(), "INVALID_ARGUMENT", "Input is empty."),
    "no input to regress": ("Regress", lambda: to_regress(), "INVALID_ARGUMENT", "Input is empty."),
    "unknown signature": ("Classify", lambda: to_classify(1.0, signature="s"), "INVALID_ARGUMENT",
                          "No signature was found with the name: s"),
    "unknown signature to regress": ("Regress", lambda: to_regress(1.0, signature="s"), "INVALID_ARGUMENT",
                                     "No signature was found with the name: s"),
    "two inputs": ("Classify", lambda: to_classify(1.0, name="adder"), "INVALID_ARGUMENT",
                   "Expected one input Tensor."),
    "other input": ("Classify", lambda: to_classify(1.0, name="affine"), "INVALID_ARGUMENT",
                    "No classification inputs found in SignatureDef: "),
    "other input to regress": ("Regress", lambda: to_regress(1.0, name="affine", signature=""), "INVALID_ARGUMENT",
                               "No regression inputs found in SignatureDef: "),
    "other output": ("Classify", lambda: to_classify(1.0, signature="others"), "INVALID_ARGUMENT",
                     "Expected classification signature outputs to contain at least one of"),
    "two outputs to regress": ("Regress", lambda: to_regress(1.0, signature=""), "INVALID_ARGUMENT",
                               "Expected one output Tensor."),
    "other output to regress": ("Regress", lambda: to_regress(1.0, signature="others"), "INVALID_ARGUMENT",
                                "No regression outputs found in SignatureDef: "),
    "unknown model": ("Regress", lambda: to_regress(1.0, name="x"), "NOT_FOUND",
                      "Servable not found for request: Latest(x)"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "make", "code", "text"), EXAMPLES.values(), ids=EXAMPLES.keys())
def test_classify_and_regress_refuse(prediction, call, make, code, text):
    found, details = refused(getattr(prediction, call), make())
    assert found == code
    assert details.startswith(text)


def several(*tasks):
    """A request for (model, signature, method) tasks."""
    request = inference_pb2.MultiInferenceRequest()
    for name, signature, method in tasks:
        task = request.tasks.add(method_name=f"tensorflow/serving/{method}")
        task.model_spec.name, task.model_spec.signature_name = name, signature
    request.input.example_list.examples.add().features.feature["x"].float_list.value.append(0.25)
    return request


def test_multi_inference(prediction):
    reply = prediction.MultiInference(several(("judge", "", "classify"), ("judge", "regress", "regress")))
    first, second = reply.results
    assert [one.score for one in first.classification_result.classifications[0].classes] == [-0.25, 0.25]
    assert [one.value for one in second.regression_result.regressions] == [0.5]
    assert [one.model_spec.signature_name for one in reply.results] == ["serving_default", "regress"]


SEVERAL = {
    "two models": ([("judge", "", "classify"), ("affine", "", "regress")], "INVALID_ARGUMENT",
                   "All ModelSpecs in a MultiInferenceRequest must access the same model name."),
    "twice": ([("judge", "regress", "regress")] * 2, "INVALID_ARGUMENT", "Duplicate evaluation of signature: regress"),
    "unknown": ([("judge", "s", "regress")], "INVALID_ARGUMENT", "Requested signature not found in model graph: s"),
    "method": ([("judge", "", "predict")], "UNIMPLEMENTED",
               "Unsupported signature method_name: tensorflow/serving/predict"),
}  # fmt: skip


@pytest.mark.parametrize(("tasks", "code", "text"), SEVERAL.values(), ids=SEVERAL.keys())
def test_multi_inference_refuses(prediction, tasks, code, text):
    assert refused(prediction.MultiInference, several(*tasks)) == (code, text)


# Metadata, status, reload, health, reflection.


def asked_for(*fields, name="adder"):
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=fields)
    request.model_spec.name = name
    return request


def test_metadata(prediction):
    reply = prediction.GetModelMetadata(asked_for("signature_def"))
    found = get_model_metadata_pb2.SignatureDefMap()
    assert reply.metadata["signature_def"].Unpack(found)
    assert set(found.signature_def) == {"serving_default", "__saved_model_init_op"}
    assert found.signature_def["serving_default"].inputs["a"].dtype == 1
    assert (reply.model_spec.name, reply.model_spec.version.value) == ("adder", 3)


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (asked_for(), "INVALID_ARGUMENT", "GetModelMetadataRequest must specify at least one metadata_field"),
        (asked_for("other"), "INVALID_ARGUMENT", "Metadata field other is not supported"),
        (asked_for("signature_def", name="x"), "NOT_FOUND", "Servable not found for request: Latest(x)"),
        (get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"]), "INVALID_ARGUMENT",
         "Missing ModelSpec"),
    ],
)  # fmt: skip
def test_metadata_refuses(prediction, request_, code, text):
    assert refused(prediction.GetModelMetadata, request_) == (code, text)


def status_of(name, version=None, label=""):
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = name
    if version is not None:
        request.model_spec.version.value = version
    if label:
        request.model_spec.version_label = label
    return request


def test_status(service):
    available = get_model_status_pb2.ModelVersionStatus.AVAILABLE
    versions = service.GetModelStatus(status_of("adder")).model_version_status
    assert [(one.version, one.state, one.status.error_code) for one in versions] == [
        (3, available, 0),
        (1, available, 0),
    ]
    (one,) = service.GetModelStatus(status_of("adder", version=1)).model_version_status
    assert one.version == 1
    assert (
        len(service.GetModelStatus(status_of("adder", label="any")).model_version_status) == 2
    )  # a label says nothing
    assert refused(service.GetModelStatus, status_of("adder", version=9)) == (
        "NOT_FOUND", "Could not find version 9 of model adder")  # fmt: skip
    assert refused(service.GetModelStatus, status_of("x")) == ("NOT_FOUND", "Could not find any versions of model x")
    nothing = get_model_status_pb2.GetModelStatusRequest()
    assert refused(service.GetModelStatus, nothing) == ("INVALID_ARGUMENT", "Missing ModelSpec")


def test_reload_takes_a_list_of_models_only(service):
    code, text = refused(service.HandleReloadConfigRequest, model_management_pb2.ReloadConfigRequest())
    assert code == "INVALID_ARGUMENT"
    assert text.endswith("Only ModelConfigList is currently supported")


def test_health(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ("", "ModelService", "PredictionService"):
        assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING
    assert refused(stub.Check, health_pb2.HealthCheckRequest(service="other"))[0] == "NOT_FOUND"


@pytest.mark.skipif(bool(REAL), reason="TensorFlow Serving has no reflection")
def test_reflection(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    ask = reflection_pb2.ServerReflectionRequest
    asked = [ask(list_services=""), ask(file_containing_symbol="tensorflow.serving.PredictionService")]
    services, file = list(stub.ServerReflectionInfo(iter(asked)))
    names = {one.name for one in services.list_services_response.service}
    assert {"tensorflow.serving.PredictionService", "tensorflow.serving.ModelService", "grpc.health.v1.Health"} <= names
    assert b"PredictionService" in file.file_descriptor_response.file_descriptor_proto[0]


# REST.


def test_rest_predict_in_rows_and_columns(rest):
    assert rest("POST", "/v1/models/affine:predict", {"instances": [[1, 2], [3, 4.5]]})[::2] == (
        200, b'{\n    "predictions": [[3.0, 5.0], [7.0, 10.0]\n    ]\n}')  # fmt: skip
    assert json.loads(rest("POST", "/v1/models/affine:predict", {"inputs": [[1, 2]]})[2]) == {"outputs": [[3.0, 5.0]]}
    code, _, body = rest("POST", "/v1/models/adder:predict", {"inputs": {"a": [1, 2], "b": 0.5}})
    assert code == 200
    assert json.loads(body) == {"outputs": {"sum": [1.5, 2.5], "text": ["1.000000", "2.000000"]}}


def test_rest_versions_labels_signatures(rest):
    body = {"inputs": {"a": [1], "b": 1}}
    assert rest("POST", "/v1/models/adder/versions/1:predict", body)[0] == 200
    assert rest("POST", "/V1/Models/adder/Versions/00003:predict", body)[0] == 200  # the case of words is free
    assert rest("POST", "/v1/models/ad%64er:predict", body)[0] == 200
    code, _, body_ = rest("POST", "/v1/models/adder/versions/9:predict", body)
    assert (code, json.loads(body_)) == (404, {"error": "Servable not found for request: Specific(adder, 9)"})
    code, _, body_ = rest("POST", "/v1/models/adder/labels/best:predict", body)
    assert (code, json.loads(body_)) == (400, {"error": "Unrecognized servable version label: best"})
    code, _, body_ = rest("POST", "/v1/models/adder:predict", {**body, "signature_name": "s"})
    assert (code, json.loads(body_)) == (400, {"error": 'Serving signature name: "s" not found in signature def'})
    assert rest("GET", "/v1/models/adder/versions/99999999999999999999")[::2] == (400, b"")


def test_rest_bytes(rest):
    encoded = base64.b64encode(b"\xff\x00").decode()
    sent = {"instances": [{"content": {"b64": encoded}, "number": 1}, {"content": "grüße", "number": 2**53 + 1}]}
    body = rest("POST", "/v1/models/echo:predict", sent)[2]  # with \xff as it came, where a name does not ask for b64
    first, second = json.loads(body.decode(errors="replace"))["predictions"]
    assert first["content_bytes"] == {"b64": encoded}
    assert (second["content"], second["number"]) == ("grüße", 2**53 + 1)


def test_rest_not_a_number(rest):
    code, _, body = rest("POST", "/v1/models/affine:predict", '{"instances": [[NaN, Infinity], [-Infinity, 1e40]]}')
    assert code == 200
    assert b"NaN" in body
    assert json.loads(body)["predictions"][1] == [-np.inf, np.inf]


def test_rest_classify_and_regress(rest):
    code, _, body = rest("POST", "/v1/models/judge:classify", {"examples": [{"x": 0.5}, {"x": 2.0}]})
    assert (code, json.loads(body)) == (
        200,
        {"results": [[["low", -0.5], ["high", 0.5]], [["low", -2.0], ["high", 2.0]]]},
    )
    body = {"signature_name": "regress", "context": {"x": 3.0}, "examples": [{}, {"x": 4.0}]}
    assert json.loads(rest("POST", "/v1/models/judge:regress", body)[2]) == {"results": [6.0, 8.0]}
    code, _, body = rest("POST", "/v1/models/judge:regress", {"signature_name": "regress", "examples": [{"x": 2}]})
    assert code == 400  # an integral token makes an int64 feature, as upstream's documentation warns


def test_rest_status_and_metadata(rest):
    code, headers, body = rest("GET", "/v1/models/adder/versions/1")
    assert (code, headers["Content-Type"]) == (200, "application/json")
    assert json.loads(body) == {"model_version_status": [
        {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}]}  # fmt: skip
    found = json.loads(rest("GET", "/v1/models/adder/metadata")[2])
    assert found["model_spec"] == {"name": "adder", "signature_name": "", "version": "3"}
    inputs = found["metadata"]["signature_def"]["signature_def"]["serving_default"]["inputs"]
    assert inputs["a"]["dtype"] == "DT_FLOAT"
    assert inputs["a"]["tensor_shape"] == {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False}
    assert rest("GET", "/v1/models/x")[0] == 404


MALFORMED = [
    ("GET", "/v1/models", 400, "Missing model name in request."),
    ("GET", "/v1/models/adder:predict", 400, "Malformed request: GET /v1/models/adder:predict"),
    ("POST", "/v1/models/adder", 400, "Malformed request: POST /v1/models/adder"),
    ("PUT", "/v1/models/adder", 400, "Malformed request: PUT /v1/models/adder"),
    ("DELETE", "/v1/models/adder", 400, "Malformed request: DELETE /v1/models/adder"),
    ("POST", "/v1/models/adder:PREDICT", 400, "Malformed request: POST /v1/models/adder:PREDICT"),
    ("POST", "/v1/models/adder:explain", 400, "Malformed request: POST /v1/models/adder:explain"),
    ("POST", "/v1/models/adder:predict?x=1", 400, "Malformed request: POST /v1/models/adder:predict?x=1"),
    ("GET", "/v1/models/..%2F..%2Fetc%2Fpasswd", 404, "Could not find any versions of model ../../etc/passwd"),
    ("POST", "/v1/models/adder:predict", 400, "JSON Parse error: The document is empty"),
]


@pytest.mark.parametrize(("method", "path", "code", "text"), MALFORMED, ids=[f"{one[0]} {one[1]}" for one in MALFORMED])
def test_rest_refuses(rest, method, path, code, text):
    found, _, body = rest(method, path, "" if method != "GET" else None)
    assert (found, json.loads(body)) == (code, {"error": text})


def test_rest_elsewhere(rest):
    code, headers, _ = rest("GET", "/favicon.ico")
    assert code == 404
    assert headers["Content-Type"].startswith("text/html")


def test_rest_errors_of_the_graph(rest):
    code, _, body = rest("POST", "/v1/models/adder:predict", {"inputs": {"a": [1, 2, 3], "b": [1, 2]}})
    assert code == 400
    assert "Incompatible shapes" in json.loads(body)["error"]


def test_rest_transport(addresses, rest):
    body = json.dumps({"instances": [[1, 2]]}).encode()
    wanted = {"predictions": [[3.0, 5.0]]}
    assert (
        json.loads(rest("POST", "/v1/models/affine:predict", gzip.compress(body), Content_Encoding="gzip")[2]) == wanted
    )
    assert json.loads(rest("POST", "/v1/models/affine:predict", body, Content_Type="text/plain")[2]) == wanted
    host, _, port = addresses[1].rpartition(":")
    head = b"POST /v1/models/affine:predict HTTP/1.1\r\nHost: x\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as chunked:
        chunked.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        for part in (body[:5], body[5:]):
            chunked.sendall(b"%x\r\n%b\r\n" % (len(part), part))
        chunked.sendall(b"0\r\n\r\n")
        assert json.loads(answer(chunked)) == wanted
        expecting = head + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
        chunked.sendall(expecting)  # on the same connection: it was kept
        assert chunked.recv(1000).startswith(b"HTTP/1.1 100 ")
        chunked.sendall(body)
        assert json.loads(answer(chunked)) == wanted


def answer(connection):
    """The body of one answer with a Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    return body
