"""The server against TensorFlow Serving's protocol, through the official stubs."""

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from shared.serving import ask, client, server, tensors
from shared.serving.checking import compare


class Adder(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="a"), tf.TensorSpec([], tf.float32, name="b")])
    def __call__(self, a, b):
        return {"sum": a + b, "text": tf.strings.as_string(a)}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    adder = Adder()
    for version in ("1", "00003"):
        tf.saved_model.save(adder, str(root / "adder" / version), signatures=adder.__call__)
    (root / "adder" / "draft").mkdir()
    return root


@pytest.fixture(scope="module")
def running(tree):
    with server.Server(server.newest(tree)) as one:
        yield one


@pytest.fixture
def stubs(running):
    with grpc.insecure_channel(running.address) as channel:
        yield (
            prediction_service_pb2_grpc.PredictionServiceStub(channel),
            model_service_pb2_grpc.ModelServiceStub(channel),
        )


def message(a=(1.0, 2.0), b=0.5, **changes):
    built = client.request("adder", {"a": np.array(a, np.float32), "b": np.float32(b)})
    for name, value in changes.items():
        if name == "version":
            built.model_spec.version.value = value
        elif name in ("name", "signature_name", "version_label"):
            setattr(built.model_spec, name, value)
    return built


def test_predict(stubs):
    reply = stubs[0].Predict(message())
    assert list(reply.outputs["sum"].float_val) == [1.5, 2.5]  # in the typed field, where clients look
    assert reply.outputs["sum"].tensor_content == b""
    assert list(reply.outputs["text"].string_val) == [b"1.000000", b"2.000000"]
    assert (reply.model_spec.name, reply.model_spec.version.value) == ("adder", 3)  # the newest by number
    assert reply.model_spec.signature_name == "serving_default"


def test_predict_takes_tensor_content_repeats_the_last_value_and_filters(stubs):
    built = message()
    built.inputs["a"].CopyFrom(tf.make_tensor_proto(np.array([4.0, 5.0], np.float32)))
    assert list(stubs[0].Predict(built).outputs["sum"].float_val) == [4.5, 5.5]
    del built.inputs["a"].float_val[:]
    built.inputs["a"].tensor_content = b""
    built.inputs["a"].float_val.append(7)
    built.output_filter.append("sum")
    reply = stubs[0].Predict(built)
    assert list(reply.outputs["sum"].float_val) == [7.5, 7.5]
    assert set(reply.outputs) == {"sum"}


def without(name):
    built = message()
    del built.inputs[name]
    return built


def filtered(*names):
    built = message()
    built.output_filter.extend(names)
    return built


def renamed():
    built = without("b")
    built.inputs["c"].CopyFrom(tensors.to_proto(np.float32(1)))
    return built


def typed():
    built = message()
    built.inputs["a"].CopyFrom(tensors.to_proto(np.array([1], np.int32)))
    return built


def cut():
    built = message()
    built.inputs["a"].CopyFrom(tf.make_tensor_proto(np.array([4.0, 5.0], np.float32)))
    built.inputs["a"].tensor_content = built.inputs["a"].tensor_content[:5]
    return built


NAME = "INVALID_ARGUMENT", "ModelSpec has no name specified."
ERRORS = {
    "no model_spec": (predict_pb2.PredictRequest, "INVALID_ARGUMENT", "Missing ModelSpec"),
    "empty name": (lambda: message(name=""), *NAME),
    "unknown model": (lambda: message(name="x"), "NOT_FOUND", "Servable not found for request: Latest(x)"),
    "unknown version": (lambda: message(version=9), "NOT_FOUND", "Servable not found for request: Specific(adder, 9)"),
    "unknown label": (lambda: message(version_label="L"), "INVALID_ARGUMENT", "Unrecognized servable version label: L"),
    "signature": (lambda: message(signature_name="S"), "FAILED_PRECONDITION", 'Serving signature key "S" not found.'),
    "count": (lambda: without("b"), "INVALID_ARGUMENT", "input size does not match signature: 1!=2 len({a}) != "
              "len({a,b}). Sent extra: {}. Missing but required: {b}."),
    "other name": (renamed, "INVALID_ARGUMENT", "Signature input alias: b(feed name: "),
    "undecodable": (cut, "INVALID_ARGUMENT", "tensor parsing error: a"),
    "filter unknown": (lambda: filtered("z"), "INVALID_ARGUMENT", "output tensor alias not found in signature: z "
                       "Outputs expected to be in the set {sum,text}."),
    "filter twice": (lambda: filtered("sum", "sum"), "INVALID_ARGUMENT", "duplicate output tensor alias: sum"),
    "dtype": (typed, "INVALID_ARGUMENT", "Expects arg[0] to be float but int32 is provided"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "code", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_predict_refuses_as_the_contract_says(stubs, make, code, text):
    with pytest.raises(grpc.RpcError) as error:
        stubs[0].Predict(make())
    assert error.value.code().name == code
    assert error.value.details().startswith(text)


def test_metadata(stubs):
    wanted = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    wanted.model_spec.name = "adder"
    reply = stubs[0].GetModelMetadata(wanted)
    found = get_model_metadata_pb2.SignatureDefMap()
    assert reply.metadata["signature_def"].Unpack(found)
    assert set(found.signature_def) == {"serving_default", "__saved_model_init_op"}
    wanted.metadata_field[0] = "other"
    with pytest.raises(grpc.RpcError, match=r"Metadata field other is not supported"):
        stubs[0].GetModelMetadata(wanted)


def test_status(stubs):
    wanted = get_model_status_pb2.GetModelStatusRequest()
    wanted.model_spec.name = "adder"
    (version,) = stubs[1].GetModelStatus(wanted).model_version_status
    assert (version.version, version.state) == (3, get_model_status_pb2.ModelVersionStatus.AVAILABLE)
    wanted.model_spec.version.value = 9
    with pytest.raises(grpc.RpcError, match=r"Could not find version 9 of model adder"):
        stubs[1].GetModelStatus(wanted)
    wanted.model_spec.name = "x"
    with pytest.raises(grpc.RpcError, match=r"Could not find any versions of model x"):
        stubs[1].GetModelStatus(wanted)


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64",
              "uint64", "complex64", "complex128"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 2), (2, 3)])
def test_tensors_survive(dtype, shape):
    array = (np.random.default_rng(1).random(shape) * 100).astype(dtype)
    found = tensors.from_proto(tensors.to_proto(array))
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_strings_survive():
    array = np.array([[b"\xff\x00", "grüße".encode()]], object)
    np.testing.assert_array_equal(tensors.from_proto(tensors.to_proto(array)), array)


def test_taken_port_and_broken_models(running, tree, tmp_path):
    with pytest.raises(OSError, match=f"port {running.port} of 127.0.0.1 cannot be had"):
        server.Server(server.newest(tree), port=running.port)
    with pytest.raises(FileNotFoundError, match=r"no model is below"):
        server.newest(tmp_path)
    (tmp_path / "m" / "1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds no saved_model\.pb"):
        server.Server(server.newest(tmp_path))
    (tmp_path / "m" / "1" / "saved_model.pb").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"cannot be loaded"):
        server.Server(server.newest(tmp_path))


def test_check_finds_a_served_answer_that_differs():
    expected = {"sum": np.array([1.5, 2.5]), "text": np.array([b"1.000000", b"2.000000"], object)}
    assert compare(expected, expected) == 0
    with pytest.raises(ValueError, match=r"served sum differs from the model in memory by 0.5"):
        compare(expected, {**expected, "sum": np.array([1.5, 3.0])})
    with pytest.raises(ValueError, match=r"served text differs"):
        compare(expected, {**expected, "text": np.array([b"1.000000", b"x"], object)})
    with pytest.raises(ValueError, match=r"the server answers \['sum'\]"):
        compare(expected, {"sum": expected["sum"]})


def test_ask(running, capsys):
    with pytest.raises(ValueError, match=r"adder takes --a=VALUE --b=VALUE; b is missing; c is unknown"):
        ask.ask("adder", {"a": "1", "c": "2"}, address=running.address)
    with pytest.raises(ValueError, match=r"NOT_FOUND.*Servable not found"):
        ask.ask("other", {}, address=running.address)
    with pytest.raises(ConnectionError, match=r"no server answers at 127.0.0.1:1; start one with make serve"):
        ask.ask("adder", {}, address="127.0.0.1:1")


def test_answers_for_people():
    answer = {"label": b"Bag", "score": np.float32(0.75), "top_labels": np.array([b"Bag", b"Coat"], object),
              "top_scores": np.array([0.75, 0.25], np.float32)}  # fmt: skip
    assert ask.describe(answer).splitlines() == [
        "label      Bag", "score      0.7500", "top 1      0.7500  Bag", "top 2      0.2500  Coat"
    ]  # fmt: skip
