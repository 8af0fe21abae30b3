"""What every call answers to a request for what is not there: TensorFlow Serving's codes and texts, call by row."""

import grpc
import pytest
import tensorflow as tf
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_pb2,
    predict_pb2,
    regression_pb2,
)

from shared.serving.protocol import MODEL, PREDICTION

CLASSIFY, REGRESS = "tensorflow/serving/classify", "tensorflow/serving/regress"
CALLS = ("Predict", "Classify", "Regress", "MultiInference", "GetModelMetadata", "GetModelStatus")


def spec(name="judge", version=None, **named):
    """A ModelSpec as it is on the wire."""
    built = model_pb2.ModelSpec(name=name, **named)
    if version is not None:
        built.version.value = version
    return built.SerializeToString()


def field(data):
    """A message as field 1 of another: where every request has its ModelSpec, and MultiInference its tasks."""
    assert len(data) < 128
    return bytes([0x0A, len(data)]) + data


def request(call, wanted=None, *, method=CLASSIFY):
    """A request on the wire that nothing is wrong with but its ModelSpec, which may be None."""
    found = b"" if wanted is None else field(wanted)
    if call == "Predict":
        built = predict_pb2.PredictRequest()
        built.inputs["inputs"].CopyFrom(tf.make_tensor_proto([tf.train.Example().SerializeToString()]))
    elif call == "GetModelMetadata":
        built = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    elif call == "GetModelStatus":
        built = get_model_status_pb2.GetModelStatusRequest()
    else:
        built = {"Classify": classification_pb2.ClassificationRequest, "Regress": regression_pb2.RegressionRequest,
                 "MultiInference": inference_pb2.MultiInferenceRequest}[call]()  # fmt: skip
        built.input.example_list.examples.add()
    if call == "MultiInference":
        found = field(found + inference_pb2.InferenceTask(method_name=method).SerializeToString())
    return found + built.SerializeToString()


@pytest.fixture
def asked(channel):
    """The code and the text that a call ends with; ("OK", "") where it answers."""

    def ask(call, data):
        service = MODEL if call == "GetModelStatus" else PREDICTION
        try:
            channel.unary_unary(f"/{service}/{call}")(data, timeout=20)
        except grpc.RpcError as error:
            return error.code().name, error.details()
        return "OK", ""

    return ask


OK = ("OK", "")
INVALID, ABSENT = "INVALID_ARGUMENT", "NOT_FOUND"
LOST = "Could not find any versions of model "
# A ModelSpec, what every call ends with, and what some calls end with instead.
ROWS = {
    "none": (None, (INVALID, "Missing ModelSpec"), {"MultiInference": (INVALID, "ModelSpec has no name specified.")}),
    "empty": (b"", (INVALID, "ModelSpec has no name specified."), {"GetModelStatus": (ABSENT, LOST)}),
    "no name": (spec("", version=1), (INVALID, "ModelSpec has no name specified."),
                {"GetModelStatus": (ABSENT, "Could not find version 1 of model ")}),
    "model": (spec("x"), (ABSENT, "Servable not found for request: Latest(x)"),
              {"GetModelStatus": (ABSENT, f"{LOST}x")}),
    "model and version": (spec("x", version=1), (ABSENT, "Servable not found for request: Specific(x, 1)"),
                          {"GetModelStatus": (ABSENT, "Could not find version 1 of model x")}),
    "model and label": (spec("x", version_label="l"), (INVALID, "Unrecognized servable version label: l"),
                        {"GetModelStatus": (ABSENT, f"{LOST}x")}),
    "model and signature": (spec("x", signature_name="s"), (ABSENT, "Servable not found for request: Latest(x)"),
                            {"GetModelStatus": (ABSENT, f"{LOST}x")}),
    "version": (spec(version=9), (ABSENT, "Servable not found for request: Specific(judge, 9)"),
                {"GetModelStatus": (ABSENT, "Could not find version 9 of model judge")}),
    "version 0": (spec(version=0), (ABSENT, "Servable not found for request: Specific(judge, 0)"),
                  {"GetModelStatus": (ABSENT, "Could not find version 0 of model judge")}),
    "version below 0": (spec(version=-1), (ABSENT, "Servable not found for request: Specific(judge, -1)"),
                        {"GetModelStatus": (ABSENT, "Could not find version -1 of model judge")}),
    "label": (spec(version_label="l"), (INVALID, "Unrecognized servable version label: l"), {"GetModelStatus": OK}),
    "empty label": (spec(version_label=""), (INVALID, "Unrecognized servable version label: "),
                    {"GetModelStatus": OK}),
    # The two are alternatives, of which the last on the wire counts.
    "version, then label": (spec(version=1) + spec("judge", version_label="l"),
                            (INVALID, "Unrecognized servable version label: l"), {"GetModelStatus": OK}),
    "label, then version": (spec(version_label="l") + spec("judge", version=9),
                            (ABSENT, "Servable not found for request: Specific(judge, 9)"),
                            {"GetModelStatus": (ABSENT, "Could not find version 9 of model judge")}),
    "signature": (spec(signature_name="s"), (INVALID, "No signature was found with the name: s"),
                  {"Predict": ("FAILED_PRECONDITION", 'Serving signature key "s" not found.'),
                   "MultiInference": (INVALID, "Requested signature not found in model graph: s"),
                   "GetModelMetadata": OK, "GetModelStatus": OK}),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("row", ROWS)
def test_what_is_not_there(asked, call, row):
    wanted, usual, other = ROWS[row]
    assert asked(call, request(call, wanted)) == other.get(call, usual)


@pytest.mark.parametrize("call", [call for call in CALLS if call != "Regress"])
def test_what_is_there(asked, call):
    assert asked(call, request(call, spec(version=1))) == OK


def test_what_is_there_to_regress(asked):
    assert asked("Regress", request("Regress", spec(version=1, signature_name="regress"))) == OK


# The signatures that classification and regression cannot be asked of, alone or in a MultiInference.
KINDS = {
    CLASSIFY: {
        "two inputs": (spec("adder"), "Expected one input Tensor."),
        "three outputs": (spec(signature_name="three"), "Expected one or two output Tensors, found 3"),
        "no output": (spec(signature_name="none"), "Expected one or two output Tensors, found 0"),
        "other input": (spec("affine"), "No classification inputs found in SignatureDef: "),
        "other output": (spec(signature_name="others"), "Expected classification signature outputs to contain at least "
                         'one of "classes" or "scores". Signature was: '),
    },
    REGRESS: {
        "two inputs": (spec("adder"), "Expected one input Tensor."),
        "two outputs": (spec(), "Expected one output Tensor."),
        "three outputs": (spec(signature_name="three"), "Expected one output Tensor."),
        "no output": (spec(signature_name="none"), "Expected one output Tensor."),
        "other input": (spec("affine"), "No regression inputs found in SignatureDef: "),
        "other output": (spec(signature_name="others"), "No regression outputs found in SignatureDef: "),
    },
}  # fmt: skip


@pytest.mark.parametrize(("method", "row"), [(method, row) for method, rows in KINDS.items() for row in rows])
@pytest.mark.parametrize("several", [False, True])
def test_signatures_of_another_kind(asked, method, row, several):
    wanted, text = KINDS[method][row]
    call = "MultiInference" if several else method.rpartition("/")[2].capitalize()
    code, found = asked(call, request(call, wanted, method=method))
    assert code == INVALID
    assert found.startswith(text)


@pytest.mark.parametrize("method", ["tensorflow/serving/predict", "", "classify", "Tensorflow/serving/classify"])
def test_methods_that_no_task_has(asked, method):
    found = asked("MultiInference", request("MultiInference", spec(), method=method))
    assert found == ("UNIMPLEMENTED", f"Unsupported signature method_name: {method}")


def tasks(*found):
    """A MultiInference of (ModelSpec, method)."""
    built = b"".join(field(field(wanted) + inference_pb2.InferenceTask(method_name=method).SerializeToString())
                     for wanted, method in found)  # fmt: skip
    return built + inference_pb2.MultiInferenceRequest(input=classification_pb2.ClassificationRequest.FromString(
        request("Classify")).input).SerializeToString()  # fmt: skip


SEVERAL = {
    "no task": ([], "ModelSpec has no name specified."),
    "no name in the second": ([(spec(), CLASSIFY), (spec(""), REGRESS)], "Found ModelSpec with an empty model name."),
    "two models": ([(spec(), CLASSIFY), (spec("affine"), REGRESS)],
                   "All ModelSpecs in a MultiInferenceRequest must access the same model name."),
    "twice, by its name": ([(spec(), CLASSIFY), (spec(signature_name="serving_default"), CLASSIFY)],
                           "Duplicate evaluation of signature: serving_default"),
    "signature of the second": ([(spec(), CLASSIFY), (spec(signature_name="s"), REGRESS)],
                                "Requested signature not found in model graph: s"),
    "signature before method": ([(spec(signature_name="s"), "m")], "Requested signature not found in model graph: s"),
}  # fmt: skip


@pytest.mark.parametrize(("found", "text"), SEVERAL.values(), ids=SEVERAL.keys())
def test_tasks_that_do_not_go_together(asked, found, text):
    assert asked("MultiInference", tasks(*found)) == (INVALID, text)


@pytest.mark.parametrize("call", ["Regress", "MultiInference"])
@pytest.mark.parametrize("given", [b"", b"\x12\x00", b"\x12\x02\x0a\x00", b"\x12\x02\x12\x00"])
def test_nothing_to_infer_from(asked, call, given):
    """No input, an empty one, an empty list of examples without and with context: of field 2."""
    data = request(call, spec(signature_name="regress"), method=REGRESS)
    assert asked(call, data[: data.rindex(b"\x12")] + given) == (INVALID, "Input is empty.")


def test_a_call_that_there_is_not(asked):
    assert asked("Guess", b"")[0] == "UNIMPLEMENTED"
