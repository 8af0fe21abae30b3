"""The bodies of TensorFlow Serving's REST interface, from and to NumPy arrays and messages.

The error texts, the layout of the answers and the way numbers are written are upstream's (`util/json_tensor.cc`), so
that clients that compare texts find the same ones.
"""

import binascii
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import grpc
import numpy as np
from google.protobuf import json_format

from shared.serving import rapidjson
from shared.serving.protocol import (
    ClassificationResponse,
    Example,
    GetModelMetadataResponse,
    GetModelStatusResponse,
    Input,
    RegressionResponse,
    SignatureDef,
    SignatureDefMap,
    pool,
    type_name,
)
from shared.serving.refusal import RefusedError, invalid
from shared.serving.tensors import STRING, dtype_of, number_of

HTTP_STATUS = dict.fromkeys(grpc.StatusCode, 500) | {
    grpc.StatusCode.OK: 200, grpc.StatusCode.INVALID_ARGUMENT: 400, grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400, grpc.StatusCode.UNAUTHENTICATED: 401, grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404, grpc.StatusCode.ALREADY_EXISTS: 409, grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429, grpc.StatusCode.CANCELLED: 499, grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503, grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}  # fmt: skip
# Number of a data type -> what its elements may be in Python. A bool is no number, and 1.0 is no integer.
_ELEMENTS = {
    1: {int, float}, 2: {int, float}, 3: {int}, 4: {int}, 5: {int}, 6: {int}, STRING: {str, dict}, 9: {int},
    10: {bool}, 22: {int}, 23: {int},
}  # fmt: skip
_KINDS = {type(None): "Null", str: "String", list: "Array", dict: "Object", tuple: "Object", int: "Number",
          float: "Number"}  # fmt: skip
_DEEPEST = 64  # dimensions of a NumPy array
_INDENT = "    "


def read_predict(body: bytes, signature_of: Callable[[str], SignatureDef]) -> tuple[str, dict[str, np.ndarray], bool]:
    """The signature's name as sent, the inputs by alias, and whether they came as rows (`instances`).

    Every input must be there, also one with a default: upstream's REST interface knows no defaults.
    """
    text = rapidjson.text_of(body)
    document = _document(text)
    name = _signature_name(document)
    try:
        signature = signature_of(name)
    except KeyError:
        shown = name or "serving_default"
        raise invalid(f'Serving signature name: "{shown}" not found in signature def') from None
    numbers = {alias: info.dtype for alias, info in sorted(signature.inputs.items())}
    if not numbers:
        raise invalid(f"Failed to get input map for signature: {name or 'DEFAULT'}")
    members = rapidjson.first(document)
    row = "instances" in members
    if row and "inputs" in members:
        raise _format(document, "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist ")
    if not row and "inputs" not in members:
        raise invalid("Missing 'inputs' or 'instances' key")
    if row and type(members["instances"]) is not list:
        raise _format(document, "Expecting 'instances' to be an list/array")
    if row and not members["instances"]:
        raise _format(document, "No values in 'instances' array")
    arrays = _from_rows(members["instances"], numbers) if row else _from_columns(members["inputs"], numbers)
    if any(array.dtype.kind == "f" and np.isinf(array).any() for array in arrays.values()):
        rapidjson.walk(text)  # Python reads 1e400 as infinity, upstream refuses it
    return name, arrays, row


def read_examples(body: bytes) -> tuple[str, Input]:
    """The signature's name as sent, and the examples, with their context where the body has one."""
    document = _document(rapidjson.text_of(body))
    name = _signature_name(document)
    members = rapidjson.first(document)
    result = Input()
    examples = result.example_list.examples
    if "context" in members:
        result.example_list_with_context.context.CopyFrom(_example(members["context"]))
        examples = result.example_list_with_context.examples
    if "examples" not in members:
        raise _format(document, "When method is classify, key 'examples' is expected and was not found")
    if type(members["examples"]) is not list:
        raise _format(document, "Expecting 'examples' value to be an list/array")
    if not members["examples"]:
        raise _format(document, "'examples' value is an empty array")
    examples.extend(map(_example, members["examples"]))
    return name, result


def write_predict(outputs: Mapping[str, np.ndarray], *, row: bool) -> bytes:
    """The outputs in the form of the request: `predictions`, one an element of the batch, or `outputs` whole."""
    if not outputs:
        raise invalid("Cannot convert empty tensor map to JSON")
    single = len(outputs) == 1
    if not row:
        texts = {name: _texts(name, array, level=2 - single, lines=True)[0] for name, array in outputs.items()}
        return _object("outputs", *texts.values() if single else [_members(texts, level=1)])
    size = None
    for name, array in outputs.items():
        if not array.ndim:
            raise invalid(f"Tensor name: {name} has no shape information ")
        if size not in (None, len(array)):
            raise invalid(f"Tensor name: {name} has inconsistent batch size: {len(array)} expecting: {size}")
        size = len(array)
    if not size:
        return _object("predictions", "[]")
    columns = [_texts(name, array, level=3 - single, lines=False) for name, array in outputs.items()]
    if single:
        return _object("predictions", "[" + ", ".join(columns[0]) + f"\n{_INDENT}]")
    rows = [_members(dict(zip(outputs, texts, strict=True)), level=2) for texts in zip(*columns, strict=True)]
    before = f"\n{_INDENT * 2}"
    return _object("predictions", f"[{before}" + f",{before}".join(rows) + f"\n{_INDENT}]")


def write_classifications(response: ClassificationResponse) -> bytes:
    """`results`: for every example its classes as pairs of label and score."""
    if not response.result.classifications:
        raise invalid("Cannot convert empty ClassificationResults to JSON")
    results = []
    for example in response.result.classifications:
        scores = _decimals(np.array([one.score for one in example.classes], np.float32))
        pairs = zip(example.classes, scores, strict=True)
        results.append("[" + ", ".join(f"[{_quoted(one.label)}, {score}]" for one, score in pairs) + "]")
    return _object("results", "[" + ", ".join(results) + f"\n{_INDENT}]")


def write_regressions(response: RegressionResponse) -> bytes:
    """`results`: a number for every example."""
    values = np.array([one.value for one in response.result.regressions], np.float32)
    if not values.size:
        raise invalid("Cannot convert empty RegressionResults to JSON")
    return _object("results", "[" + ", ".join(_decimals(values)) + "]")


def write_status(response: GetModelStatusResponse) -> bytes:
    """A model's versions and their states, under the names of the proto's fields."""
    return _message(response).encode()


def write_metadata(response: GetModelMetadataResponse) -> bytes:
    """A model's signatures; upstream too joins the two parts as texts, hence the odd line ends."""
    signatures = SignatureDefMap()
    if "signature_def" not in response.metadata:
        text = "Failed to find 'signature_def' key in the GetModelMetadataResponse metadata map."
        raise RefusedError(grpc.StatusCode.INTERNAL, text)
    if not response.metadata["signature_def"].Unpack(signatures):
        raise RefusedError(grpc.StatusCode.INTERNAL, "Failed to unpack 'Any' object to 'SignatureDefMap'.")
    spec, definitions = _message(response.model_spec), _message(signatures)
    return f'{{\n"model_spec":{spec},\n"metadata": {{"signature_def": {definitions}}}\n}}\n'.encode()


def write_error(message: str) -> bytes:
    """The body of every answer that is not 200."""
    return _object("error", _quoted(message))


def _document(text: str) -> dict | tuple:
    document = rapidjson.parse(text)
    if not _is_object(document):
        raise _format(document, "Is not object")
    return document


def _signature_name(document: dict | tuple) -> str:
    name = rapidjson.first(document).get("signature_name", "")
    if type(name) is not str:
        raise _format(document, "not formatted correctly. 'signature_name' key must be a string value.")
    return name


def _from_rows(rows: list, numbers: dict[str, int]) -> dict[str, np.ndarray]:
    if type(rows[0]) not in (dict, tuple) and len(numbers) > 1:
        raise invalid(
            "instances is a plain list, but expecting list of objects as multiple "
            "input tensors required as per tensorinfo_map"
        )
    if not _named(rows[0]):
        columns = {next(iter(numbers)): rows}
    elif all(_named(row) and rapidjson.first(row).keys() == numbers.keys() for row in rows):
        columns = {name: [] for name in numbers}
        for row in rows:
            for name, value in rapidjson.pairs(row):
                columns[name].append(value)
    else:
        _refuse_rows(rows, numbers)
    arrays = {name: _tensor(column, numbers[name]) for name, column in columns.items()}
    if any(array is None for array in arrays.values()):
        _refuse_rows(rows, numbers)
    # A repeated key makes a column longer than the batch; TensorFlow reads as many values as the shape asks for.
    return {name: array[: len(rows)] for name, array in arrays.items()}


def _named(value: Any) -> bool:
    return type(value) in (dict, tuple) and not _is_base64(value)


def _is_base64(value: Any) -> bool:
    return type(value) is dict and len(value) == 1 and type(value.get("b64")) is str


def _from_columns(value: Any, numbers: dict[str, int]) -> dict[str, np.ndarray]:
    if not _named(value):
        if len(numbers) > 1:
            raise invalid(
                "inputs is a plain value/list, but expecting an object as multiple "
                "input tensors required as per tensorinfo_map"
            )
        value = dict.fromkeys(numbers, value)
    members, arrays = rapidjson.first(value), {}
    for name, number in numbers.items():
        if name not in members:
            raise invalid(f"Missing named input: {name} in 'inputs' object.")
        arrays[name] = _tensor(members[name], number)
        if arrays[name] is None:
            _check(members[name], number)
            raise _unimplemented(members[name], number)
    return arrays


def _tensor(value: Any, number: int) -> np.ndarray | None:
    """The array of nested lists; None where they are ragged or an element is not of the type, to be told elsewhere.

    Level by level at C speed. NumPy on nested lists is slower, and takes true for 1 and "1" for a number.
    """
    shape, level = [], [value]
    while level and type(level[0]) is list:
        sizes = set(map(len, level)) if set(map(type, level)) == {list} else ()
        if len(sizes) != 1 or len(shape) == _DEEPEST:
            return None
        shape += sizes
        level = list(itertools.chain.from_iterable(level))
    try:
        dtype = dtype_of(number)
        if not set(map(type, level)) <= _ELEMENTS.get(number, set()):
            return None
        if number == STRING:
            array = np.empty(len(level), object)
            array[:] = [one.encode() if type(one) is str else _unescaped(one) for one in level]
        elif dtype.kind == "f":
            with np.errstate(over="ignore", under="ignore"):
                array = np.array(level, np.float64).astype(dtype)
        elif dtype.kind in "iu":  # upstream reads the narrow ones as int32, of which their lowest bits stay
            array = np.array(level, _read_as(dtype)).astype(dtype)
        else:
            array = np.array(level, dtype)
    except (OverflowError, ValueError, RefusedError):
        return None
    return array.reshape(shape)


def _read_as(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.int32) if dtype.itemsize < 4 else dtype


def _unescaped(value: Any) -> bytes:
    if not _is_base64(value):
        raise _format(value, "not formatted correctly for base64 data")
    data = b"".join(value["b64"].encode().split())
    if not data.endswith(b"="):
        data += b"=" * (-len(data) % 4)  # upstream asks for no padding
    try:
        return binascii.a2b_base64(data, strict_mode=True)
    except ValueError:
        raise invalid("Unable to base64 decode") from None


def _refuse_rows(rows: list, numbers: dict[str, int]) -> NoReturn:
    """The first error in upstream's order, of rows in which there is one."""
    named = _named(rows[0])
    shapes: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        if named != _named(row):
            expected, came = ("object", "list") if named else ("value/list", "object")
            raise invalid(f"Expecting {expected} but got {came} at item {index} of input list")
        pairs = rapidjson.pairs(row) if named else [(next(iter(numbers)), row)]
        for name, value in pairs:
            try:
                if name not in numbers:
                    raise invalid(f"JSON object: does not have named input: {name}")
                shape = _check(value, numbers[name])
                known = shapes.setdefault(name, shape)
                if math.prod(known) != math.prod(shape):
                    raise invalid(f"Expecting tensor size: {math.prod(known)} but got: {math.prod(shape)}")
                if known != shape:
                    known, shape = (f"[{','.join(map(str, sizes))}]" for sizes in (known, shape))
                    raise invalid(f"Expecting shape {known} but got: {shape}")
            except RefusedError as error:
                place = f"{index} key: {name}" if named else index
                reason = f"{error.code.name}: {error}"
                raise invalid(f"Failed to process element: {place} of 'instances' list. Error: {reason}") from None
        if named and {name for name, _ in pairs} != numbers.keys():
            raise invalid(
                f"Failed to process element: {index} of 'instances' list. JSON object: {_shown(row)} "
                f"keys must be equal to: {','.join(numbers)}"
            )
    raise _unimplemented(rows, next(iter(numbers.values())))


def _check(value: Any, number: int) -> list[int]:
    """The shape of nested lists, or RefusedError with what is wrong first."""
    shape, inner = [], value
    while type(inner) is list and len(shape) < _DEEPEST - 1:  # one is left for the batch
        shape.append(len(inner))
        inner = inner[0] if inner else None
    _check_level(value, number, level=0, shape=shape)
    return shape


def _check_level(value: Any, number: int, *, level: int, shape: list[int]) -> None:
    rank = len(shape)
    if type(value) is not list:
        if level != rank:
            where = f"found at incorrect level: {level + 1} in the JSON DOM. Expected at level: {rank}"
            raise _format(value, where)
        return _check_element(value, number)
    if level >= rank:
        raise invalid(f"Encountered list at unexpected level: {level} expected < {rank}")
    if len(value) != shape[level]:
        raise invalid(
            f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: {shape[level]}"
        )
    for item in value:
        _check_level(item, number, level=level + 1, shape=shape)
    return None


def _check_element(value: Any, number: int) -> None:
    if number not in _ELEMENTS and not _is_object(value):
        raise _unimplemented(value, number)
    fits = type(value) in _ELEMENTS.get(number, ())
    if number == STRING and _is_object(value):
        _unescaped(value)
    elif fits and dtype_of(number).kind == "f":
        _double(value)
    elif fits and type(value) is int:
        limits = np.iinfo(_read_as(dtype_of(number)))
        fits = limits.min <= value <= limits.max
    if not fits:
        raise _format(value, f"Type: {_kind(value)} is not of expected type: {type_name(number)}")


def _double(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise invalid("JSON Parse error: Number too big to be stored in double.") from None


def _kind(value: Any) -> str:
    return str(value) if type(value) is bool else _KINDS[type(value)]


def _is_object(value: Any) -> bool:
    return type(value) in (dict, tuple)


def _unimplemented(value: Any, number: int) -> RefusedError:
    text = f"Conversion of JSON Value: {_shown(value)} to type: {type_name(number)}"
    return RefusedError(grpc.StatusCode.UNIMPLEMENTED, text)


def _format(value: Any, reason: str) -> RefusedError:
    return invalid(f"JSON Value: {_shown(value)} {reason}")


def _shown(value: Any) -> str:
    """A value as upstream's errors show it: no further token once there are 256 bytes."""
    shown = ""
    for token in _tokens(value, before="", level=0):
        shown += token
        if len(shown.encode()) >= 256:
            break
    return shown


def _tokens(value: Any, *, before: str, level: int) -> Iterator[str]:
    if type(value) is list:
        yield before + "["
        for index, item in enumerate(value):
            yield from _tokens(item, before=", " if index else "", level=level + 1)
        yield "]"
    elif _is_object(value):
        yield before + "{"
        for index, (name, item) in enumerate(rapidjson.pairs(value)):
            yield ("," if index else "") + "\n" + _INDENT * (level + 1) + _quoted(name)
            yield from _tokens(item, before=": ", level=level + 1)
        yield ("\n" + _INDENT * level if value else "") + "}"
    else:
        yield before + json.dumps(value, ensure_ascii=False)


def _example(value: Any) -> Example:
    if not _is_object(value):
        raise invalid(f"Example must be JSON object but got JSON {_kind(value)}")
    example = Example()
    for name, content in rapidjson.pairs(value):
        feature = example.features.feature[name]
        feature.Clear()  # of a repeated key the last holds
        kind, values = None, []
        for item in content if type(content) is list else [content]:
            came, element = _element(name, item)
            if kind not in (None, came):
                raise invalid(f"Unexpected element type in feature: {name} expecting type: {kind}")
            if came == "int64" and element >= 2**63:
                raise invalid(f"Feature: {name} has uint64_t element. Only int64_t is supported.")
            kind = came
            values.append(_unescaped(element) if _is_object(element) else element)
        if kind:
            getattr(feature, f"{kind}_list").value.extend(values)
    return example


def _element(name: str, value: Any) -> tuple[str, Any]:
    if type(value) is str:
        return "bytes", value.encode()
    if _is_base64(value):
        return "bytes", value
    if type(value) in (bool, int) and -(2**63) <= value < 2**64:
        return "int64", int(value)
    if type(value) in (int, float):
        return "float", _double(value)
    raise invalid(f"Feature: {name} has element with unexpected JSON type: {_KINDS[type(value)]}")


def _object(name: str, text: str) -> bytes:
    # Strings of a model need not be UTF-8; their bytes pass as they are.
    return (_members({name: text}, level=0)).encode(errors="surrogateescape")


def _members(texts: Mapping[str, str], *, level: int) -> str:
    inner = "\n" + _INDENT * (level + 1)
    return "{" + ",".join(f"{inner}{_quoted(name)}: {text}" for name, text in texts.items()) + f"\n{_INDENT * level}}}"


def _texts(name: str, array: np.ndarray, *, level: int, lines: bool) -> list[str]:
    """The text of a whole array as one with `lines`, an element a line; else the texts of its rows, a line each."""
    first = 0 if lines else 1
    texts = _elements(array, name.endswith("_bytes"), level=level + array.ndim - first)
    for axis in reversed(range(first, array.ndim)):
        outer = "\n" + _INDENT * (level + axis - first) if lines else ""
        inner = outer + _INDENT if lines else ""
        comma = f",{inner}" if lines else ", "
        size = array.shape[axis]
        if size:
            starts = range(0, len(texts), size)
            texts = ["[" + inner + comma.join(texts[start : start + size]) + outer + "]" for start in starts]
        else:
            texts = ["[]"] * math.prod(array.shape[:axis])
    return texts


def _elements(array: np.ndarray, is_bytes: bool, *, level: int) -> list[str]:
    number = number_of(array.dtype)
    if array.size and number not in _ELEMENTS:
        raise invalid(f"Failed to write JSON value for tensor type: {type_name(number)}")
    if number != STRING and array.dtype.kind == "f":
        return _decimals(array)
    flat = array.ravel().tolist()
    if number == STRING:
        flat = [one.encode() if isinstance(one, str) else one for one in flat]
        if not is_bytes:
            return [_quoted(one.decode(errors="surrogateescape")) for one in flat]
        encoded = [binascii.b2a_base64(one, newline=False).decode() for one in flat]
        return [_members({"b64": f'"{one}"'}, level=level) for one in encoded]
    if array.dtype.kind == "b":
        return ["true" if one else "false" for one in flat]
    return list(map(str, flat))


def _decimals(array: np.ndarray) -> list[str]:
    """Six digits where they read back as the same number, else as many as always do; never like an integer."""
    flat = array.ravel()
    values = flat.tolist()
    texts = ("%g " * len(values) % tuple(values)).split()
    full = "%.9g" if flat.dtype == np.float32 else "%.17g"
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        short = np.array(list(map(float, texts)), np.float64).astype(flat.dtype) == flat
        whole = np.trunc(flat) == flat
    for index in np.flatnonzero(~short).tolist():
        texts[index] = full % values[index]
    for index in np.flatnonzero(whole).tolist():
        if "." not in texts[index] and "e" not in texts[index]:
            texts[index] += ".0"
    for index in np.flatnonzero(~np.isfinite(flat)).tolist():
        texts[index] = "NaN" if math.isnan(values[index]) else "Infinity" if values[index] > 0 else "-Infinity"
    return texts


def _quoted(text: str) -> str:
    return json.encoder.encode_basestring(text)


def _message(message: Any) -> str:
    text = json_format.MessageToJson(
        message,
        indent=1,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
        descriptor_pool=pool,
    )
    return text + "\n"
