"""What REST answers, row by row of TensorFlow Serving's contract, posted to a running server.

The bodies and texts are those of tests/test_rest_json.py; here they come over HTTP, with a status, from a model.
"""

import json

import numpy as np
import pytest
import test_rest_json as cases

from shared.serving.protocol import type_name


def posted(rest, model, body, verb="predict"):
    """Status of the answer to a body, and the answer's text."""
    sent = body.encode() if isinstance(body, str) else body
    code, headers, answer = rest("POST", f"/v1/models/{model}:{verb}", sent)
    assert headers["Content-Type"] == "application/json"
    return code, answer.decode()


def refused(rest, model, body, verb="predict"):
    """Status and text of an error."""
    code, answer = posted(rest, model, body, verb)
    found = json.loads(answer)
    assert list(found) == ["error"]
    return code, found["error"]


def same(numbers):
    """The model that answers with its inputs, of the types that a case has."""
    ((dtype,), aliases) = {type_name(number) for number in numbers.values()}, "".join(numbers)
    return f"same_{dtype}" + ("" if aliases == "x" else f"_{aliases}")


@pytest.mark.parametrize(("body", "text"), cases.BROKEN)
def test_broken_bodies(rest, body, text):
    assert refused(rest, "same_float", body) == (400, f"JSON Parse error: {text}")


@pytest.mark.parametrize("verb", ["predict", "classify", "regress"])
def test_a_body_is_read_before_its_model_is_looked_for(rest, verb):
    assert refused(rest, "nobody", "{", verb)[1].startswith("JSON Parse error: ")
    body = '{"instances": [1]}' if verb == "predict" else '{"examples": [{"x": 1.0}]}'
    code, text = refused(rest, "nobody", body, verb)
    assert (code, text) == (404, "Servable not found for request: Latest(nobody)")


@pytest.mark.parametrize(("body", "numbers", "text"), cases.BODIES)
def test_refused_bodies(rest, body, numbers, text):
    assert refused(rest, same(numbers), body) == (400, text)


@pytest.mark.parametrize(("rows", "text"), cases.ROWS)
def test_refused_rows(rest, rows, text):
    assert refused(rest, "same_int32", f'{{"instances": {rows}}}') == (400, f"Failed to process element: {text}")


@pytest.mark.parametrize(("value", "number", "kind", "name"), cases.TYPES)
def test_refused_types(rest, value, number, kind, name):
    text = f"JSON Value: {value} Type: {kind} is not of expected type: {name}"
    assert refused(rest, f"same_{name}", f'{{"inputs": [{value}]}}') == (400, text)


@pytest.mark.parametrize(("number", "name"), cases.NOT_READ)
def test_types_not_read(rest, number, name):
    text = f"Conversion of JSON Value: 1 to type: {name}"
    assert refused(rest, f"same_{name}", '{"inputs": [1]}') == (501, text)
    wrapped = f"Failed to process element: 0 of 'instances' list. Error: UNIMPLEMENTED: {text}"
    assert refused(rest, f"same_{name}", '{"instances": [1]}') == (400, wrapped)


@pytest.mark.parametrize("verb", ["classify", "regress"])
@pytest.mark.parametrize(("body", "text"), cases.EXAMPLES_REFUSED)
def test_refused_examples(rest, verb, body, text):
    code, error = refused(rest, "judge", body, verb)
    assert code == 400
    assert error.endswith(text)


@pytest.mark.parametrize(("body", "number", "dtype", "expected"), cases.READ)
@pytest.mark.parametrize(("key", "back"), [("instances", "predictions"), ("inputs", "outputs")])
def test_values_come_back(rest, key, back, body, number, dtype, expected):
    code, answer = posted(rest, f"same_{type_name(number)}", f'{{"{key}": {body}}}')
    assert code == 200
    found = json.loads(answer)
    assert list(found) == [back]
    if dtype is object:
        assert found[back] == np.vectorize(bytes.decode, otypes=[object])(np.array(expected, object)).tolist()
    else:
        cases.same(np.array(found[back], dtype), dtype, expected)


@pytest.mark.parametrize(("dtype", "value", "text"), cases.DECIMALS)
def test_decimals(rest, dtype, value, text):
    model = {np.float32: "same_float", np.float64: "same_double"}[dtype]
    sent = json.dumps({"instances": [3, float(value)]})
    assert posted(rest, model, sent) == (200, f'{{\n    "predictions": [3.0, {text}\n    ]\n}}')


LAYOUTS = [
    ("same_float", '{"inputs": [2.5]}', '{\n    "outputs": [\n        2.5\n    ]\n}'),
    ("same_float", '{"instances": [2.5, 3, 4.5]}', '{\n    "predictions": [2.5, 3.0, 4.5\n    ]\n}'),
    ("same_int8", '{"instances": [[1, 2], [3, 4]]}', '{\n    "predictions": [[1, 2], [3, 4]\n    ]\n}'),
    ("same_bool", '{"inputs": true}', '{\n    "outputs": true\n}'),
    ("same_float", '{"inputs": [[], []]}', '{\n    "outputs": [\n        [],\n        []\n    ]\n}'),
    ("same_int32_ab", '{"instances": [{"a": 1, "b": [2]}]}',
     '{\n    "predictions": [\n        {\n            "a": 1,\n            "b": [2]\n        }\n    ]\n}'),
    ("same_int32_ab", '{"inputs": {"a": 1, "b": [2]}}',
     '{\n    "outputs": {\n        "a": 1,\n        "b": [\n            2\n        ]\n    }\n}'),
    ("echo", '{"inputs": {"content": ["tf"], "number": [1]}}',
     '{\n    "outputs": {\n        "content": [\n            "tf"\n        ],\n        "content_bytes": [\n'
     '            {\n                "b64": "dGY="\n            }\n        ],\n        "number": [\n            1\n'
     '        ]\n    }\n}'),
]  # fmt: skip


@pytest.mark.parametrize(("model", "body", "text"), LAYOUTS)
def test_layout(rest, model, body, text):
    assert posted(rest, model, body) == (200, text)


NO_NAME = 'Serving signature name: "s" not found in signature def'
PREDICT = {
    "signature": ("adder", {"signature_name": "s", "inputs": 1}, 400, NO_NAME),
    "model": ("x", {"inputs": 1}, 404, "Servable not found for request: Latest(x)"),
    "no inputs": ("uneven", {"signature_name": "nothing", "inputs": 1}, 400,
                  "Failed to get input map for signature: nothing"),
    "row lacks a name": ("adder", {"instances": [{"a": 1, "b": 2}, {"a": 1}]}, 400, " keys must be equal to: a,b"),
    "unequal rows": ("uneven", {"instances": [1, 2]}, 400, "has inconsistent batch size: "),
    "scalar in rows": ("uneven", {"signature_name": "scalar", "instances": [1]}, 400,
                       "Tensor name: y has no shape information "),
    **{f"{name} out": ("uneven", {"signature_name": name, key: [1]}, 400,
                       f"Failed to write JSON value for tensor type: {name}")
       for name, key in (("half", "inputs"), ("uint16", "instances"), ("complex64", "inputs"))},
    "the graph": ("adder", {"inputs": {"a": [1, 2, 3], "b": [1, 2]}}, 400, "Incompatible shapes"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "body", "code", "text"), PREDICT.values(), ids=PREDICT.keys())
def test_predict_refuses(rest, model, body, code, text):
    found, error = refused(rest, model, body)
    assert found == code
    assert text in error


def test_what_no_row_holds_a_column_does(rest):
    assert json.loads(posted(rest, "uneven", {"inputs": [1, 2]})[1]) == {"outputs": {"a": [1.0, 2.0], "b": [1.0]}}
    found = posted(rest, "uneven", {"signature_name": "scalar", "inputs": [1, 2]})
    assert found == (200, '{\n    "outputs": 3.0\n}')


ONE = {"examples": [{"x": 1.5}]}
EXAMPLES = {
    "model": ("classify", "x", ONE, 404, "Servable not found for request: Latest(x)"),
    "model to regress": ("regress", "x", ONE, 404, "Servable not found for request: Latest(x)"),
    "version": ("classify", "judge/versions/9", ONE, 404, "Servable not found for request: Specific(judge, 9)"),
    "label": ("regress", "judge/labels/l", ONE, 400, "Unrecognized servable version label: l"),
    "signature": ("classify", "judge", {**ONE, "signature_name": "s"}, 400, "No signature was found with the name: s"),
    "signature to regress": ("regress", "judge", {**ONE, "signature_name": "s"}, 400,
                             "No signature was found with the name: s"),
    "inputs": ("classify", "adder", ONE, 400, "Expected one input Tensor."),
    "inputs to regress": ("regress", "adder", ONE, 400, "Expected one input Tensor."),
    "name": ("classify", "affine", ONE, 400, "No classification inputs found in SignatureDef: "),
    "name to regress": ("regress", "affine", ONE, 400, "No regression inputs found in SignatureDef: "),
    "outputs": ("classify", "judge", {**ONE, "signature_name": "others"}, 400,
                "Expected classification signature outputs to contain at least one of"),
    "outputs to regress": ("regress", "judge", ONE, 400, "Expected one output Tensor."),
    "other outputs": ("classify", "judge", {**ONE, "signature_name": "three"}, 400,
                      "Expected one or two output Tensors, found 3"),
    "mixed kinds": ("regress", "judge", {"signature_name": "regress", "examples": [{"x": [1, 2.5]}]}, 400,
                    "Unexpected element type in feature: x expecting type: int64"),
    "integral": ("regress", "judge", {"signature_name": "regress", "examples": [{"x": 2}]}, 400,
                 "Data types don't match"),
}  # fmt: skip


@pytest.mark.parametrize(("verb", "model", "body", "code", "text"), EXAMPLES.values(), ids=EXAMPLES.keys())
def test_examples_refuse(rest, verb, model, body, code, text):
    found, error = refused(rest, model, body, verb)
    assert found == code
    assert text in error


TOLD = {
    "status of a model": ("x", 404, "Could not find any versions of model x"),
    "status of a version": ("adder/versions/9", 404, "Could not find version 9 of model adder"),
    "metadata of a model": ("x/metadata", 404, "Servable not found for request: Latest(x)"),
    "metadata of a version": ("adder/versions/9/metadata", 404, "Servable not found for request: Specific(adder, 9)"),
    "metadata of a label": ("adder/labels/l/metadata", 400, "Unrecognized servable version label: l"),
    "more behind metadata": ("adder/metadata/x", 400, "Malformed request: GET /v1/models/adder/metadata/x"),
    "version that is no number": ("adder/versions/x", 400, "Malformed request: GET /v1/models/adder/versions/x"),
    "version and label": ("adder/versions/1/labels/l", 400,
                          "Malformed request: GET /v1/models/adder/versions/1/labels/l"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "code", "text"), TOLD.values(), ids=TOLD.keys())
def test_status_and_metadata_refuse(rest, path, code, text):
    found, headers, answer = rest("GET", f"/v1/models/{path}")
    assert (found, json.loads(answer)) == (code, {"error": text})
    assert headers["Content-Type"] == "application/json"


def test_labels(rest):
    """`stable` is the label of the older of two versions; of a status a label says nothing."""
    status = json.loads(rest("GET", "/v1/models/adder/labels/stable")[2])["model_version_status"]
    assert [one["version"] for one in status] == ["3", "1"]
    metadata = json.loads(rest("GET", "/v1/models/adder/labels/stable/metadata")[2])
    assert metadata["model_spec"]["version"] == "1"
    assert posted(rest, "adder/labels/stable", {"inputs": {"a": [1], "b": 2}})[0] == 200
    assert posted(rest, "adder/LABELS/st%61ble", {"inputs": {"a": [1], "b": 2}})[0] == 200
    assert refused(rest, "adder/labels/STABLE", {"inputs": 1}) == (
        400, "Unrecognized servable version label: STABLE")  # fmt: skip
