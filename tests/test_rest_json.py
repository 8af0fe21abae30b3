"""REST bodies against TensorFlow Serving's; values and texts are those of upstream's json_tensor_test.cc where it has
the case, and of its sources where not.
"""

import json
import math
import time

import grpc
import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shared.serving import protocol, rest_json
from shared.serving.refusal import RefusedError
from shared.serving.tensors import number_of

FLOAT, DOUBLE, INT32, UINT8, INT16, INT8, STRING, COMPLEX64, INT64, BOOL, BFLOAT16, UINT16, HALF, UINT32, UINT64 = (
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 14, 17, 19, 22, 23
)  # fmt: skip
EMPTY = protocol.ClassificationResponse(), protocol.RegressionResponse()


def signature(**numbers):
    built = protocol.SignatureDef()
    for name, number in numbers.items():
        built.inputs[name].dtype = number
    return lambda name: built


def read(body, **numbers):
    return rest_json.read_predict(body if isinstance(body, bytes) else body.encode(), signature(**numbers))


def refused(body, code=grpc.StatusCode.INVALID_ARGUMENT, **numbers):
    with pytest.raises(RefusedError) as error:
        read(body, **numbers)
    assert error.value.code is code
    return str(error.value)


def same(array, dtype, values):
    assert array.dtype == dtype
    assert array.shape == np.shape(values)
    np.testing.assert_array_equal(array, np.array(values, dtype))


def test_rows_of_one_input():
    name, inputs, row = read('{"instances": [[1,2],[3,4],[5,6]]}', default=INT32)
    assert (name, list(inputs), row) == ("", ["default"], True)
    same(inputs["default"], np.int32, [[1, 2], [3, 4], [5, 6]])


def test_signature_name():
    asked = []
    body = b'{"signature_name": "predict_images", "instances": [[1,2]]}'
    assert rest_json.read_predict(body, lambda name: asked.append(name) or signature(x=INT32)(name))[0] == asked[0]
    assert asked == ["predict_images"]


@pytest.mark.parametrize(
    ("name", "shown"), [('"signature_name": "S", ', "S"), ("", "serving_default")], ids=["named", "default"]
)
def test_unknown_signature(name, shown):
    with pytest.raises(RefusedError, match=f'^Serving signature name: "{shown}" not found in signature def$') as error:
        rest_json.read_predict(f'{{{name}"inputs": 1}}'.encode(), lambda name: {}[name])
    assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(("name", "shown"), [('"signature_name": "S", ', "S"), ("", "DEFAULT")])
def test_signature_without_inputs(name, shown):
    assert refused(f'{{{name}"inputs": 1}}') == f"Failed to get input map for signature: {shown}"


READ = [
    ("[1, 2.0, 3, 4, 5.003, 0.007, 0.0]", FLOAT, np.float32, [1, 2.0, 3, 4, 5.003, 0.007, 0.0]),
    ("[1.0, 2, 3, 4, 0.662, 0, 0.0]", DOUBLE, np.float64, [1.0, 2, 3, 4, 0.662, 0, 0.0]),
    ("[1435774380]", FLOAT, np.float32, [1435774380.0]),
    ("[1435774380.0]", FLOAT, np.float32, [1435774380.0]),
    ("[1.7976931348623157e+308]", FLOAT, np.float32, [math.inf]),
    ("[-1.7976931348623157e+308]", FLOAT, np.float32, [-math.inf]),
    ("[2.2250738585072014e-308]", FLOAT, np.float32, [0.0]),
    ("[NaN, Infinity, -Infinity]", DOUBLE, np.float64, [math.nan, math.inf, -math.inf]),
    ("[NaN, Infinity, -Infinity, 1]", FLOAT, np.float32, [math.nan, math.inf, -math.inf, 1]),
    ("[Inf, -Inf, -NaN]", FLOAT, np.float32, [math.inf, -math.inf, math.nan]),
    ("[18446744073709551616, 1e2]", DOUBLE, np.float64, [18446744073709551616.0, 100.0]),
    ("[true, false]", BOOL, np.bool_, [True, False]),
    ("[-128, 127]", INT8, np.int8, [-128, 127]),
    ("[0, 255]", UINT8, np.uint8, [0, 255]),
    ("[128, -129, 300, -2147483648]", INT8, np.int8, [-128, 127, 44, 0]),  # as upstream
    ("[-1, 256, 300, 2147483647]", UINT8, np.uint8, [255, 0, 44, 255]),
    ("[32768, 70000]", INT16, np.int16, [-32768, 4464]),
    ("[-32768, 32767]", INT16, np.int16, [-32768, 32767]),
    ("[-2147483648, 2147483647, -0]", INT32, np.int32, [-2147483648, 2147483647, 0]),
    ("[-9223372036854775808, 9223372036854775807]", INT64, np.int64, [-(2**63), 2**63 - 1]),
    ("[0, 4294967295]", UINT32, np.uint32, [0, 4294967295]),
    ("[0, 18446744073709551615]", UINT64, np.uint64, [0, 18446744073709551615]),
    ('["foo", "b\\u00e4r", "\\ud83d\\ude00", "\\"\\u0000\\\\ud800"]', STRING, object,
     [b"foo", "bär".encode(), "😀".encode(), b'"\0\\ud800']),
    ('[{"b64": "aGVsbG8="}, {"b64": "d29ybGQ="}]', STRING, object, [b"hello", b"world"]),
    ('[[{"b64": "aGVsbG8="}], [{"b64": "d29ybGQ="}]]', STRING, object, [[b"hello"], [b"world"]]),
    ('[{"b64": "aGVsbG8"}, {"b64": "aGVs bG8="}, {"b64": ""}, "x"]', STRING, object,
     [b"hello", b"hello", b"", b"x"]),
    ("[[[]], [[]]]", FLOAT, np.float32, np.zeros([2, 1, 0])),
]  # fmt: skip


@pytest.mark.parametrize(("body", "number", "dtype", "expected"), READ)
@pytest.mark.parametrize("key", ["instances", "inputs"])
def test_types(key, body, number, dtype, expected):
    _, inputs, row = read(f'{{"{key}": {body}}}', x=number)
    assert row == (key == "instances")
    same(inputs["x"], dtype, expected)


def test_smallest_double_keeps_its_sign():
    _, inputs, _ = read('{"instances": [-2.2250738585072014e-308]}', x=FLOAT)
    assert str(inputs["x"][0]) == "-0.0"


def test_one_named_input_of_rows():
    _, inputs, _ = read('{"instances": [{"x": [[{"b64": "aGVsbG8="}], [{"b64": "d29ybGQ="}]]}]}', x=STRING)
    same(inputs["x"], object, [[[b"hello"], [b"world"]]])


def test_rows_of_several_inputs():
    body = """{"instances": [
      {"int_tensor": [[1,2],[3,4],[5,6]], "str_tensor": ["foo", "bar"], "float_tensor": [1.0, NaN],
       "dbl_tensor": [NaN]},
      {"str_tensor": ["baz", "bat"], "int_tensor": [[7,8],[9,0],[1,2]], "float_tensor": [2.0, Infinity],
       "dbl_tensor": [2.0]}]}"""
    _, inputs, row = read(body, int_tensor=INT32, str_tensor=STRING, float_tensor=FLOAT, dbl_tensor=DOUBLE)
    assert row
    assert inputs.keys() == {"int_tensor", "str_tensor", "float_tensor", "dbl_tensor"}
    same(inputs["int_tensor"], np.int32, [[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 0], [1, 2]]])
    same(inputs["str_tensor"], object, [[b"foo", b"bar"], [b"baz", b"bat"]])
    same(inputs["float_tensor"], np.float32, [[1.0, math.nan], [2.0, math.inf]])
    same(inputs["dbl_tensor"], np.float64, [[math.nan], [2.0]])


@pytest.mark.parametrize("body", ['{"x": [[[1,2],[3,4],[5,6]]]}', "[[[1,2],[3,4],[5,6]]]"])
def test_column_of_one_input(body):
    _, inputs, row = read(f'{{"inputs": {body}}}', x=INT32)
    assert not row
    same(inputs["x"], np.int32, [[[1, 2], [3, 4], [5, 6]]])


def test_columns_of_several_inputs():
    body = '{"inputs": {"int": [[[1,2],[3,4],[5,6]]], "str": ["foo", "bar"], "bin": {"b64": "aGVsbG8="}, "other": 1}}'
    _, inputs, _ = read(body, int=INT32, str=STRING, bin=STRING)
    assert inputs.keys() == {"int", "str", "bin"}
    same(inputs["int"], np.int32, [[[1, 2], [3, 4], [5, 6]]])
    same(inputs["str"], object, [b"foo", b"bar"])
    same(inputs["bin"], object, b"hello")


BROKEN = [
    ("", "The document is empty"),
    (" \n", "The document is empty. at offset: 2"),
    ("nonsense", "Invalid value. at offset: 1"),
    ('{"ä": x}', "Invalid value. at offset: 7"),
    ('{"a" 1}', "Missing a colon after a name of object member. at offset: 5"),
    ('{"a": 1 2}', "Missing a comma or '}' after an object member. at offset: 8"),
    ('{"a": [1 2]}', "Missing a comma or ']' after an array element. at offset: 9"),
    ('{"a": [1, 2', "Missing a comma or ']' after an array element. at offset: 11"),
    ('{"a": 1,}', "Missing a name for object member. at offset: 8"),
    ('{"a": [1,]}', "Invalid value. at offset: 9"),
    ('{"a": "b', "Missing a closing quotation mark in string. at offset: 8"),
    ('{"a": "\\x"}', "Invalid escape character in string. at offset: 7"),
    ('{"a": "\n"}', "Invalid escape character in string. at offset: 7"),
    ('{"a": "\\u00g0"}', "Incorrect hex digit after \\u escape in string. at offset: 7"),
    ('{"a": "\\ud800"}', "The surrogate pair in string is invalid. at offset: 7"),
    ('{"a": "\\ud83d\\ude00\\\\\\udc00"}', "The surrogate pair in string is invalid. at offset: 21"),
    ('{"a": truf}', "Invalid value. at offset: 9"),
    ('{"a": 1.}', "Miss fraction part in number. at offset: 8"),
    ('{"a": 1e+}', "Miss exponent in number. at offset: 9"),
    ('{"inputs": 1e400}', "Number too big to be stored in double. at offset: 11"),
    ('{"inputs": [1%s]}' % ("0" * 310), "Number too big to be stored in double."),
    ('{"inputs": [1%s]}' % ("0" * 5000), "Number too big to be stored in double. at offset: 12"),
    (b'{"inputs": "\xff"}', "Invalid encoding in string. at offset: 12"),
    (b'{"inputs": "\xed\xa0\x80"}', "Invalid encoding in string. at offset: 12"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "text"), BROKEN)
def test_broken_bodies(body, text):
    assert refused(body, x=FLOAT) == f"JSON Parse error: {text}"


BODIES = [
    ("[1]", {"x": INT32}, "JSON Value: [1] Is not object"),
    ('{"signature_name": 5, "instances": [[1]]}', {"x": INT32},
     'JSON Value: {\n    "signature_name": 5,\n    "instances": [[1]]\n} '
     "not formatted correctly. 'signature_name' key must be a string value."),
    ('{"instances": [[1]], "inputs": [[1]]}', {"x": INT32},
     'JSON Value: {\n    "instances": [[1]],\n    "inputs": [[1]]\n} '
     "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist "),
    ("{}", {"x": INT32}, "Missing 'inputs' or 'instances' key"),
    ('{"instances": 1}', {"x": INT32},
     'JSON Value: {\n    "instances": 1\n} Expecting \'instances\' to be an list/array'),
    ('{"instances": []}', {"x": INT32}, 'JSON Value: {\n    "instances": []\n} No values in \'instances\' array'),
    ('{"instances": [1, 2]}', {"a": INT32, "b": INT32},
     "instances is a plain list, but expecting list of objects as multiple "
     "input tensors required as per tensorinfo_map"),
    ('{"inputs": [1, 2]}', {"a": INT32, "b": INT32},
     "inputs is a plain value/list, but expecting an object as multiple "
     "input tensors required as per tensorinfo_map"),
    ('{"instances": [{"a": 1}, [1]]}', {"a": INT32}, "Expecting object but got list at item 1 of input list"),
    ('{"instances": [["a"], {"x": ["b"]}]}', {"x": STRING},
     "Expecting value/list but got object at item 1 of input list"),
    ('{"inputs": {"a": 1}}', {"a": INT32, "b": INT32}, "Missing named input: b in 'inputs' object."),
    ('{"inputs": [[1, 2], [3]]}', {"x": INT32},
     "Encountered list at unexpected size: 1 at level: 1 expected size: 2"),
    ('{"inputs": [[1, 2], 3]}', {"x": INT32},
     "JSON Value: 3 found at incorrect level: 2 in the JSON DOM. Expected at level: 2"),
    ('{"inputs": [1, [2]]}', {"x": INT32}, "Encountered list at unexpected level: 1 expected < 1"),
    ('{"inputs": {"b64": "a*"}}', {"x": STRING}, "Unable to base64 decode"),
    ('{"inputs": {"b64": "aaaaa"}}', {"x": STRING}, "Unable to base64 decode"),
    ('{"inputs": [{"b64": "aaaa", "c": 1}]}', {"x": STRING},
     'JSON Value: {\n    "b64": "aaaa",\n    "c": 1\n} not formatted correctly for base64 data'),
    ('{"inputs": [{"b64": "aaaa", "b64": "aaaa"}]}', {"x": STRING},
     'JSON Value: {\n    "b64": "aaaa",\n    "b64": "aaaa"\n} not formatted correctly for base64 data'),
]  # fmt: skip


@pytest.mark.parametrize(("body", "numbers", "text"), BODIES)
def test_refused_bodies(body, numbers, text):
    assert refused(body, **numbers) == text


ROWS = [
    ("[[1,2],[3,4],[5,6,7]]",
     "2 of 'instances' list. Error: INVALID_ARGUMENT: Expecting tensor size: 2 but got: 3"),
    ("[[1,2],[3,4],[[5,6]]]",
     "2 of 'instances' list. Error: INVALID_ARGUMENT: Expecting shape [2] but got: [1,2]"),
    ("[1, [1]]", "1 of 'instances' list. Error: INVALID_ARGUMENT: Expecting shape [] but got: [1]"),
    ('[[1,2],["a", "b"]]',
     "1 of 'instances' list. Error: INVALID_ARGUMENT: "
     'JSON Value: "a" Type: String is not of expected type: int32'),
    ('[{"x": [1, 2, 3, 4]}, {"x": [1, 2]}]',
     "1 key: x of 'instances' list. Error: INVALID_ARGUMENT: Expecting tensor size: 4 but got: 2"),
    ('[{"x": 1}, {"x": 1, "c": 2}]',
     "1 key: c of 'instances' list. Error: INVALID_ARGUMENT: JSON object: does not have named input: c"),
    ("[[[1, 2], [1]]]", "0 of 'instances' list. Error: INVALID_ARGUMENT: "
     "Encountered list at unexpected size: 1 at level: 1 expected size: 2"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "text"), ROWS)
def test_refused_rows(rows, text):
    assert refused(f'{{"instances": {rows}}}', x=INT32) == f"Failed to process element: {text}"


def test_rows_lack_a_name():
    text = refused('{"instances": [{"a": 1, "b": 2}, {"a": 1}]}', b=INT32, a=INT32)
    shown = '{\n    "a": 1\n}'
    assert text == (
        f"Failed to process element: 1 of 'instances' list. JSON object: {shown} keys must be equal to: a,b"
    )


TYPES = [
    ('"x"', FLOAT, "String", "float"), ('"1"', FLOAT, "String", "float"), ("true", FLOAT, "True", "float"),
    ("null", FLOAT, "Null", "float"), ("true", DOUBLE, "True", "double"), ("1.0", INT32, "Number", "int32"),
    ("false", INT32, "False", "int32"), ("1.0", INT64, "Number", "int64"), ("true", INT64, "True", "int64"),
    ("null", INT64, "Null", "int64"), ("2147483648", INT32, "Number", "int32"),
    ("2147483648", INT8, "Number", "int8"), ("-2147483649", UINT8, "Number", "uint8"),
    ("4294967296", INT16, "Number", "int16"),
    ("-1", UINT32, "Number", "uint32"), ("4294967296", UINT32, "Number", "uint32"),
    ("18446744073709551616", UINT64, "Number", "uint64"), ("-1", UINT64, "Number", "uint64"),
    ("9223372036854775808", INT64, "Number", "int64"), ("1", BOOL, "Number", "bool"),
    ("1", STRING, "Number", "string"),
    ("null", STRING, "Null", "string"), ("{}", FLOAT, "Object", "float"), ("null", BOOL, "Null", "bool"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "number", "kind", "name"), TYPES)
@pytest.mark.parametrize("first", ["", "good"])
def test_refused_types(first, value, number, kind, name):
    good = {STRING: '"a", ', BOOL: "true, ", FLOAT: "1.5, ", DOUBLE: "1.5, "}.get(number, "1, ") if first else ""
    text = refused(f'{{"inputs": [{good}{value}]}}', x=number)
    assert text == f"JSON Value: {value} Type: {kind} is not of expected type: {name}"


NOT_READ = [(UINT16, "uint16"), (HALF, "half"), (BFLOAT16, "bfloat16"), (COMPLEX64, "complex64"), (18, "complex128")]


@pytest.mark.parametrize(("number", "name"), NOT_READ)
def test_types_not_read(number, name):
    text = f"Conversion of JSON Value: 1 to type: {name}"
    assert refused('{"inputs": [1]}', grpc.StatusCode.UNIMPLEMENTED, x=number) == text
    wrapped = f"Failed to process element: 0 of 'instances' list. Error: UNIMPLEMENTED: {text}"
    assert refused('{"instances": [1]}', x=number) == wrapped


def test_shown_values_are_cut():
    cut = refused(json.dumps({"signature_name": ["x" * 10] * 100}), x=INT32)
    assert cut.count("xxxxxxxxxx") == 17  # 27 bytes, then 12 for the first and 14 for each further one, to 256 or more
    assert cut.endswith("\"xxxxxxxxxx\" not formatted correctly. 'signature_name' key must be a string value.")


@pytest.mark.parametrize("rest", [b"X", b"}", b"\xff\xfe", b'{"a'])
def test_bytes_behind_the_document(rest):
    _, inputs, _ = read(b' {"instances": [[1,2],[3,4],[5,6]]}' + rest, x=INT32)
    same(inputs["x"], np.int32, [[1, 2], [3, 4], [5, 6]])


def test_byte_order_mark():
    same(read(b'\xef\xbb\xbf{"inputs": 1}', x=INT32)[1]["x"], np.int32, 1)


def test_deep_nesting():
    nest = "[" * 500_000 + "]" * 500_000
    _, inputs, _ = read('{"instances":[1], "nested":' + nest + "}", x=INT32)
    same(inputs["x"], np.int32, [1])
    assert "key must be a string value" in refused('{"signature_name":' + nest + "}", x=INT32)
    assert "unexpected level: 63 expected < 63" in refused('{"instances":' + nest + "}", x=INT32)
    assert "unexpected level: 63 expected < 63" in refused('{"inputs":' + nest + "}", x=INT32)
    objects = '{"a":' * 100_000 + "1" + "}" * 100_000
    assert "Type: Object is not of expected type" in refused('{"inputs":' + objects + "}", a=INT32)
    with pytest.raises(RefusedError, match="unexpected JSON type: Array"):
        rest_json.read_examples(('{"examples": [{"a":' + nest + "}]}").encode())


@pytest.mark.parametrize("word", ["true", "false", "null"])
def test_a_long_body_that_is_cut_off_is_read_in_a_moment(word):
    begun = time.process_time()
    text = refused('{"instances":[' + f"{word}," * 400_000, x=INT32)
    assert "JSON Parse error: Invalid value." in text  # it took minutes where each word copied the rest
    assert time.process_time() - begun < 10
    cut = word[:2] + "x"
    assert f"Invalid value. at offset: {len(cut) + 13}" in refused('{"instances":[' + cut, x=INT32)


@pytest.mark.parametrize("deep", [64, 65])
@pytest.mark.parametrize("key", ["instances", "inputs"])
def test_as_many_dimensions_as_numpy_has(key, deep):
    body = f'{{"{key}": {"[" * deep}1{"]" * deep}}}'
    if deep == 64:
        same(read(body, x=INT32)[1]["x"], np.int32, np.ones([1] * 64))
    else:
        assert "unexpected level" in refused(body, x=INT32)


def test_repeated_keys():
    # The first member counts; in rows every one adds its values, of which the shape's first are taken.
    same(read('{"inputs": 1, "inputs": 2}', x=INT32)[1]["x"], np.int32, 1)
    same(read('{"inputs": {"x": 1, "x": 2}}', x=INT32)[1]["x"], np.int32, 1)
    same(read('{"instances": [{"x": 1, "x": 2}, {"x": 3, "x": 4}]}', x=INT32)[1]["x"], np.int32, [1, 2])
    _, examples = rest_json.read_examples(b'{"examples": [{"x": 1.5, "x": [2.0]}]}')
    feature = examples.example_list.examples[0].features.feature["x"]
    assert (feature.WhichOneof("kind"), list(feature.float_list.value)) == ("float_list", [2.0])


def test_inputs_with_a_default_are_asked_for():
    built = signature(a=INT32, b=INT32)("")
    built.defaults["b"].dtype = INT32
    with pytest.raises(RefusedError, match=r"^Missing named input: b in 'inputs' object\.$"):
        rest_json.read_predict(b'{"inputs": {"a": 1}}', lambda name: built)


def test_reading_a_picture_costs_little_more_than_json():
    body = json.dumps({"instances": np.random.default_rng(0).random([1, 224, 224, 3]).tolist()}).encode()

    def seconds(call):
        start = time.thread_time()
        call()
        return time.thread_time() - start

    plain = min(seconds(lambda: json.loads(body)) for _ in range(5))
    ours = min(seconds(lambda: read(body, x=FLOAT)) for _ in range(5))
    assert ours < 3 * plain  # 1.4 measured


EXAMPLES = """{
  "signature_name": "custom_signture",
  "context": {"query": "pizza", "location": ["sfo"]},
  "examples": [
    {"names": ["foo", "bar"], "ratings": [8.0, 9.0, NaN, Infinity], "age": 20},
    {"names": ["baz", {"b64": "aGVsbG8="}], "ratings": 6.0, "intboolmix": [1, true, false]},
    {"names": "bar", "ratings": -Infinity, "none": [], "big": 1e39}
  ]}"""


def test_examples_with_context():
    name, built = rest_json.read_examples(EXAMPLES.encode())
    assert name == "custom_signture"
    assert built.WhichOneof("kind") == "example_list_with_context"
    with_context = built.example_list_with_context
    context = with_context.context.features.feature
    assert list(context["query"].bytes_list.value) == [b"pizza"]
    assert list(context["location"].bytes_list.value) == [b"sfo"]
    first, second, third = (example.features.feature for example in with_context.examples)
    assert list(first["names"].bytes_list.value) == [b"foo", b"bar"]
    np.testing.assert_array_equal(first["ratings"].float_list.value, [8.0, 9.0, math.nan, math.inf])
    assert list(first["age"].int64_list.value) == [20]
    assert list(second["names"].bytes_list.value) == [b"baz", b"hello"]
    assert list(second["ratings"].float_list.value) == [6.0]
    assert list(second["intboolmix"].int64_list.value) == [1, 1, 0]
    assert list(third["ratings"].float_list.value) == [-math.inf]
    assert list(third["big"].float_list.value) == [math.inf]
    assert third["none"].WhichOneof("kind") is None


def test_examples_without_context():
    name, built = rest_json.read_examples(b'{"examples": [{"age": 20}, {"age": 18446744073709551616}]}')
    assert name == ""
    assert built.WhichOneof("kind") == "example_list"
    first, second = (example.features.feature["age"] for example in built.example_list.examples)
    assert list(first.int64_list.value) == [20]
    assert list(second.float_list.value) == [18446744073709551616.0]


EXAMPLES_REFUSED = [
    ('{"signature_name": ["hello"], "examples": [{}]}', "'signature_name' key must be a string value."),
    ('{"context": [{"names": ["foo"]}]}', "Example must be JSON object but got JSON Array"),
    ('{"context": true}', "Example must be JSON object but got JSON True"),
    ("{}", "JSON Value: {} When method is classify, key 'examples' is expected and was not found"),
    ('{"examples": {"names": ["foo"]}}', "Expecting 'examples' value to be an list/array"),
    ('{"examples": []}', "'examples' value is an empty array"),
    ('{"examples": [[{"names": ["foo"]}]]}', "Example must be JSON object but got JSON Array"),
    ('{"examples": [{"names": [10, null]}]}', "Feature: names has element with unexpected JSON type: Null"),
    ('{"examples": [{"names": [10, 10.0]}]}', "Unexpected element type in feature: names expecting type: int64"),
    ('{"examples": [{"names": [1.5, true]}]}', "Unexpected element type in feature: names expecting type: float"),
    ('{"examples": [{"names": ["a", 1]}]}', "Unexpected element type in feature: names expecting type: bytes"),
    ('{"examples": [{"names": [1, {"b64": "*"}]}]}',
     "Unexpected element type in feature: names expecting type: int64"),
    ('{"examples": [{"names": {"b64": "*"}}]}', "Unable to base64 decode"),
    ('{"examples": [{"names": [10, {"test": 10}]}]}',
     "Feature: names has element with unexpected JSON type: Object"),
    ('{"examples": [{"names": [[10], 20]}]}', "Feature: names has element with unexpected JSON type: Array"),
    ('{"examples": [{"names": [20, 18446744073709551603]}]}',
     "Feature: names has uint64_t element. Only int64_t is supported."),
    ('{"examples": [{"names": 1%s}]}' % ("0" * 310), "JSON Parse error: Number too big to be stored in double."),
    ('{"examples": [', "JSON Parse error: Invalid value. at offset: 14"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "text"), EXAMPLES_REFUSED)
def test_refused_examples(body, text):
    with pytest.raises(RefusedError) as error:
        rest_json.read_examples(body.encode())
    assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error.value).endswith(text)


NAMED = {
    "double_scalar_tensor": np.array([8.0, 9.0]),
    "float_tensor": np.array([[1.0], [2.0]], np.float32),
    "int_tensor": np.array([[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 0], [1, 2]]], np.int32),
    "str_tensor": np.array([["foo", "bar"], ["baz", "bat"]], object),
    "str_tensor_bytes": np.array([[b"hello", b"world"], [b"tf", b"serving"]], object),
}


def test_write_rows():
    assert json.loads(rest_json.write_predict(NAMED, row=True)) == {
        "predictions": [
            {
                "double_scalar_tensor": 8.0,
                "float_tensor": [1.0],
                "int_tensor": [[1, 2], [3, 4], [5, 6]],
                "str_tensor": ["foo", "bar"],
                "str_tensor_bytes": [{"b64": "aGVsbG8="}, {"b64": "d29ybGQ="}],
            },
            {
                "double_scalar_tensor": 9.0,
                "float_tensor": [2.0],
                "int_tensor": [[7, 8], [9, 0], [1, 2]],
                "str_tensor": ["baz", "bat"],
                "str_tensor_bytes": [{"b64": "dGY="}, {"b64": "c2VydmluZw=="}],
            },
        ]
    }


def test_write_columns():
    assert json.loads(rest_json.write_predict(NAMED, row=False)) == {
        "outputs": {
            "double_scalar_tensor": [8.0, 9.0],
            "float_tensor": [[1.0], [2.0]],
            "int_tensor": [[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 0], [1, 2]]],
            "str_tensor": [["foo", "bar"], ["baz", "bat"]],
            "str_tensor_bytes": [
                [{"b64": "aGVsbG8="}, {"b64": "d29ybGQ="}],
                [{"b64": "dGY="}, {"b64": "c2VydmluZw=="}],
            ],
        }
    }


@pytest.mark.parametrize(
    ("outputs", "row", "text"),
    [
        ({"x": np.array([2.5, 3.0, 4.5], np.float32)}, True, '{\n    "predictions": [2.5, 3.0, 4.5\n    ]\n}'),
        ({"x": np.array([[1, 2], [3, 4]], np.int8)}, True, '{\n    "predictions": [[1, 2], [3, 4]\n    ]\n}'),
        ({"x": np.array([2.5], np.float32)}, False, '{\n    "outputs": [\n        2.5\n    ]\n}'),
        ({"x": np.array(True)}, False, '{\n    "outputs": true\n}'),
        ({"x": np.array([[], []])}, False, '{\n    "outputs": [\n        [],\n        []\n    ]\n}'),
        ({"x": np.array([[], []])}, True, '{\n    "predictions": [[], []\n    ]\n}'),
        ({"x": np.zeros([0, 2], np.int32)}, True, '{\n    "predictions": []\n}'),
        ({"x": np.zeros([0, 1, 2], object), "y": np.zeros([0, 3, 4])}, True, '{\n    "predictions": []\n}'),
        ({"a": np.array([1], np.uint64), "b": np.array([[False]])}, True,
         '{\n    "predictions": [\n        {\n            "a": 1,\n            "b": [false]\n        }\n    ]\n}'),
        ({"a": np.array(1), "b": np.array([2])}, False,
         '{\n    "outputs": {\n        "a": 1,\n        "b": [\n            2\n        ]\n    }\n}'),
        ({"x_bytes": np.array([b"tf"], object)}, True,
         '{\n    "predictions": [{\n            "b64": "dGY="\n        }\n    ]\n}'),
        ({"x_bytes": np.array([b"tf"], object)}, False,
         '{\n    "outputs": [\n        {\n            "b64": "dGY="\n        }\n    ]\n}'),
        ({"x": np.array([b'"\\\n\0/', "ä".encode()], object)}, True,
         '{\n    "predictions": ["\\"\\\\\\n\\u0000/", "ä"\n    ]\n}'),
    ],
)  # fmt: skip
def test_layout(outputs, row, text):
    assert rest_json.write_predict(outputs, row=row).decode() == text


def test_strings_need_not_be_utf8():
    text = b'{\n    "predictions": ["\xff\xfe"\n    ]\n}'
    assert rest_json.write_predict({"x": np.array([b"\xff\xfe"], object)}, row=True) == text


DECIMALS = [
    (np.float32, 9000000, "9e+06"), (np.float32, 999999, "999999.0"), (np.float32, 0.5, "0.5"),
    (np.float32, 0.0003, "0.0003"), (np.float32, 0.00003, "3e-05"), (np.float32, 555557.5, "555557.5"),
    (np.float32, 0.2, "0.2"), (np.float32, 1 / 3, "0.333333343"), (np.float32, 1234567, "1234567.0"),
    (np.float32, -0.0, "-0.0"), (np.float32, math.nan, "NaN"), (np.float32, math.inf, "Infinity"),
    (np.float32, -math.inf, "-Infinity"), (np.float32, 3.4028235e38, "3.40282347e+38"),
    (np.float64, 0.1, "0.1"), (np.float64, 1 / 3, "0.33333333333333331"), (np.float64, 1e300, "1e+300"),
    (np.float64, 12345678901234567, "12345678901234568.0"), (np.float64, math.nan, "NaN"),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "value", "text"), DECIMALS)
def test_decimals(dtype, value, text):
    body = rest_json.write_predict({"x": np.array([3, value], dtype)}, row=True).decode()
    assert body == f'{{\n    "predictions": [3.0, {text}\n    ]\n}}'


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ({}, "Cannot convert empty tensor map to JSON"),
        ({"x": np.zeros(2, np.complex64)}, "Failed to write JSON value for tensor type: complex64"),
        ({"x": np.zeros(2, np.float16)}, "Failed to write JSON value for tensor type: half"),
        ({"x": np.zeros(2, np.uint16)}, "Failed to write JSON value for tensor type: uint16"),
        ({"x": np.int32(1)}, "Tensor name: x has no shape information "),
        ({"a": np.zeros([2, 3]), "b": np.zeros([1, 3])},
         "Tensor name: b has inconsistent batch size: 1 expecting: 2"),
        ({"a": np.zeros([0, 2]), "b": np.zeros([1, 2])},
         "Tensor name: b has inconsistent batch size: 1 expecting: 0"),
    ],
)  # fmt: skip
def test_outputs_not_written(outputs, text):
    with pytest.raises(RefusedError) as error:
        rest_json.write_predict(outputs, row=True)
    assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error.value) == text


def test_classifications():
    response = text_format.Parse(
        """result {
          classifications { classes { label: "car" score: 0.2 } classes { label: "bike" score: 0.7 } }
          classifications { classes { label: "c\\"r" score: 1 } }
          classifications { }
        }""",
        protocol.ClassificationResponse(),
    )
    text = '{\n    "results": [[["car", 0.2], ["bike", 0.7]], [["c\\"r", 1.0]], []\n    ]\n}'
    assert rest_json.write_classifications(response).decode() == text


def test_regressions():
    response = protocol.RegressionResponse()
    for value in (0.2, math.inf, 1.0, -math.inf, math.nan):
        response.result.regressions.add(value=value)
    text = '{\n    "results": [0.2, Infinity, 1.0, -Infinity, NaN]\n}'
    assert rest_json.write_regressions(response).decode() == text


@pytest.mark.parametrize(
    ("write", "response", "name"),
    [
        (rest_json.write_classifications, EMPTY[0], "ClassificationResults"),
        (rest_json.write_regressions, EMPTY[1], "RegressionResults"),
    ],
)
def test_empty_results(write, response, name):
    with pytest.raises(RefusedError, match=f"^Cannot convert empty {name} to JSON$"):
        write(response)


def test_status():
    response = protocol.GetModelStatusResponse()
    response.model_version_status.add(version=2, state=30).status.SetInParent()
    assert rest_json.write_status(response).decode().splitlines() == [
        "{", ' "model_version_status": [', "  {", '   "version": "2",', '   "state": "AVAILABLE",', '   "status": {',
        '    "error_code": "OK",', '    "error_message": ""', "   }", "  }", " ]", "}",
    ]  # fmt: skip


def test_metadata():
    response, signatures = protocol.GetModelMetadataResponse(), protocol.SignatureDefMap()
    response.model_spec.name = "half_plus_three"
    response.model_spec.version.value = 123
    tensor = signatures.signature_def["serving_default"].inputs["x"]
    tensor.name, tensor.dtype = "x:0", FLOAT
    tensor.tensor_shape.dim.add(size=-1)
    response.metadata["signature_def"].Pack(signatures)
    body = rest_json.write_metadata(response).decode()
    start = '{\n"model_spec":{\n "name": "half_plus_three",\n "version": "123",\n "signature_name": ""\n}\n,\n'
    assert body.startswith(start + '"metadata": {"signature_def": {\n "signature_def": {\n  "serving_default": {\n')
    assert body.endswith("}\n}\n}\n")
    assert json.loads(body) == {
        "model_spec": {"name": "half_plus_three", "signature_name": "", "version": "123"},
        "metadata": {
            "signature_def": {
                "signature_def": {
                    "serving_default": {
                        "inputs": {
                            "x": {
                                "dtype": "DT_FLOAT",
                                "name": "x:0",
                                "tensor_shape": {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False},
                            }
                        },
                        "outputs": {},
                        "method_name": "",
                        "defaults": {},
                    }
                }
            }
        },
    }


def test_metadata_without_signatures():
    response = protocol.GetModelMetadataResponse()
    with pytest.raises(RefusedError, match=r"^Failed to find 'signature_def' key in") as error:
        rest_json.write_metadata(response)
    assert error.value.code is grpc.StatusCode.INTERNAL
    response.metadata["signature_def"].Pack(protocol.ModelSpec())
    with pytest.raises(RefusedError, match=r"^Failed to unpack 'Any' object to 'SignatureDefMap'\.$"):
        rest_json.write_metadata(response)


@pytest.mark.parametrize("message", ['Bad key: "key"', "Bad key: 'key'"])
def test_error(message):
    body = rest_json.write_error(message)
    assert json.loads(body) == {"error": message}
    assert body.startswith(b'{\n    "error": "Bad key: ')


@pytest.mark.parametrize(
    ("names", "status"),
    [
        ("INVALID_ARGUMENT FAILED_PRECONDITION OUT_OF_RANGE", 400), ("UNAUTHENTICATED", 401),
        ("PERMISSION_DENIED", 403), ("NOT_FOUND", 404), ("ALREADY_EXISTS ABORTED", 409), ("RESOURCE_EXHAUSTED", 429),
        ("CANCELLED", 499), ("UNKNOWN INTERNAL DATA_LOSS", 500), ("UNIMPLEMENTED", 501), ("UNAVAILABLE", 503),
        ("DEADLINE_EXCEEDED", 504), ("OK", 200),
    ],
)  # fmt: skip
def test_http_status(names, status):
    codes = {code.name for code, found in rest_json.HTTP_STATUS.items() if found == status}
    assert codes == set(names.split())


SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)
NUMBERS = st.sampled_from([np.dtype(letter) for letter in "fdbhiqBIQ?"])
TENSORS = st.one_of(
    arrays.arrays(NUMBERS, SHAPES),
    arrays.arrays(np.dtype(object), SHAPES, elements=st.text().map(str.encode)),
)


@settings(max_examples=100, deadline=None)
@given(array=TENSORS)
@pytest.mark.parametrize("name", ["x", "x_bytes"])
def test_written_columns_read_back(name, array):
    body = rest_json.write_predict({name: array, "other": np.array(0)}, row=False)
    body = body.replace(b'"outputs"', b'"inputs"', 1)
    _, inputs, row = read(body, **{name: number_of(array.dtype), "other": INT64})
    assert not row
    # No elements below the first empty list say how large it would be.
    size = next((axis for axis, size in enumerate(array.shape) if size == 0), array.ndim)
    assert inputs[name].dtype == array.dtype
    assert inputs[name].shape == array.shape[: size + 1]
    np.testing.assert_array_equal(inputs[name].ravel(), array.ravel())
    if array.dtype.kind == "f":
        np.testing.assert_array_equal(np.signbit(inputs[name]).ravel()[~np.isnan(array).ravel()],
                                      np.signbit(array).ravel()[~np.isnan(array).ravel()])  # fmt: skip


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "b64"]), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(value=VALUES, number=st.integers(1, 25), key=st.sampled_from(["instances", "inputs"]), cut=st.integers(0, 200))
@pytest.mark.parametrize("numbers", [["a"], ["a", "b"]])
def test_any_body_is_read_or_refused(numbers, value, number, key, cut):
    body = json.dumps({key: value, "examples": value}).encode()
    for sent in (body, body[:cut]):
        found = outcome(lambda sent=sent: read(sent, **dict.fromkeys(numbers, number)))
        if not isinstance(found, RefusedError):
            assert (found[0], found[2]) == ("", key == "instances")
            assert found[1].keys() <= set(numbers)
        found = outcome(lambda sent=sent: rest_json.read_examples(sent))
        if not isinstance(found, RefusedError):
            assert found[1].WhichOneof("kind") == "example_list"


def outcome(call):
    try:
        return call()
    except RefusedError as error:
        return error
