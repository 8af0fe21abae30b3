"""Any tensor of any type and shape that a server takes comes back as it went, in either field over gRPC and as JSON."""

import base64
import json

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from hypothesis.extra import numpy as arrays
from serving_models import DTYPES

from shared.serving import protocol, tensors

NUMBERS = {name: number for name in DTYPES
           for number, value in protocol.pool.FindEnumTypeByName("tensorflow.DataType").values_by_number.items()
           if value.name == f"DT_{name.upper()}"}  # fmt: skip
NOT_IN_JSON = {"uint16", "half", "bfloat16", "complex64", "complex128"}
SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
BYTES, TEXT = some.binary(max_size=9), some.text(max_size=9).map(str.encode)
BRIEF = settings(max_examples=25, deadline=None)


def tensor(name, text=BYTES):
    """Arrays of a data type."""
    dtype = tensors.dtype_of(NUMBERS[name])
    if dtype.kind == "O":
        return arrays.arrays(object, SHAPES, elements=text)
    if dtype.kind == "V":  # bfloat16: any two bytes are one
        return arrays.arrays(np.uint16, SHAPES).map(lambda array: array.view(dtype))
    return arrays.arrays(dtype, SHAPES)


def same(found, sent):
    """Equal bit for bit, but that one NaN is as good as another."""
    assert (found.dtype, found.shape) == (sent.dtype, sent.shape)
    if sent.dtype.kind == "O":
        assert found.tolist() == sent.tolist()
        return
    wide = np.float32 if sent.dtype.kind == "V" else sent.dtype
    np.testing.assert_array_equal(found.astype(wide), sent.astype(wide))
    if sent.dtype.kind in "fV":
        there = ~np.isnan(sent.astype(wide))
        np.testing.assert_array_equal(np.signbit(found.astype(wide))[there], np.signbit(sent.astype(wide))[there])


def test_every_type_that_has_an_array_is_tried():
    assert set(NUMBERS.values()) == {*tensors.TYPES, tensors.BFLOAT16}


@pytest.mark.parametrize("content", [True, False])
@pytest.mark.parametrize("name", DTYPES)
def test_over_grpc(channel, name, content):
    """The request in `tensor_content` or in the typed field; the answer in the typed field."""
    predict = channel.unary_unary("/tensorflow.serving.PredictionService/Predict",
                                  response_deserializer=protocol.PredictResponse.FromString)  # fmt: skip

    @BRIEF
    @given(tensor(name))
    def check(array):
        request = protocol.PredictRequest()
        request.model_spec.name = f"same_{name}"
        tensors.fill(request.inputs["x"], array, content=content)
        assert bool(request.inputs["x"].tensor_content) == (content and name != "string" and array.size > 0)
        found = predict(request.SerializeToString(), timeout=20).outputs["x"]
        assert not found.tensor_content
        same(tensors.from_proto(found), array)

    check()


def test_strings_are_not_taken_as_content(channel):
    request = protocol.PredictRequest()
    request.model_spec.name = "same_string"
    request.inputs["x"].dtype, request.inputs["x"].tensor_content = tensors.STRING, b"\x01a"
    request.inputs["x"].tensor_shape.dim.add(size=1)
    with pytest.raises(grpc.RpcError) as error:
        channel.unary_unary("/tensorflow.serving.PredictionService/Predict")(request.SerializeToString(), timeout=20)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("row", [True, False])
@pytest.mark.parametrize("name", [name for name in DTYPES if name not in NOT_IN_JSON])
def test_over_rest(rest, name, row):
    key, back = ("instances", "predictions") if row else ("inputs", "outputs")

    @BRIEF
    @given(tensor(name, text=TEXT))
    def check(array):
        if 0 in array.shape or (row and not array.ndim):
            return  # JSON has no shape of what holds nothing, and no row of a number
        text = np.vectorize(bytes.decode, otypes=[object])
        values = (text(array) if array.dtype.kind == "O" else array).tolist()
        code, _, answer = rest("POST", f"/v1/models/same_{name}:predict", {key: values})
        assert code == 200
        found = np.array(json.loads(answer)[back], array.dtype)
        same(np.vectorize(str.encode, otypes=[object])(found) if array.dtype.kind == "O" else found, array)

    check()


def test_any_bytes_over_rest(rest):
    @BRIEF
    @given(some.lists(BYTES, min_size=1, max_size=4))
    def check(values):
        content = [{"b64": base64.b64encode(value).decode()} for value in values]
        code, _, answer = rest("POST", "/v1/models/echo:predict", {"inputs": {"content": content, "number": [1]}})
        assert code == 200
        # Beside `content_bytes` the answer has them as a string, and they need not be UTF-8.
        assert json.loads(answer.decode(errors="replace"))["outputs"]["content_bytes"] == content

    check()
