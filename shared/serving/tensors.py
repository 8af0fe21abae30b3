"""NumPy arrays to and from TensorProto, in the fields that TensorFlow Serving uses; without TensorFlow."""

import functools
import math
import sys
from collections.abc import Sequence

import numpy as np

from shared.serving.protocol import TensorProto

STRING, HALF, BFLOAT16 = 7, 19, 14
# Number of a data type -> its NumPy dtype, and the typed field of a reply: clients read `.float_val` and its like.
TYPES = {
    1: (np.dtype(np.float32), "float_val"), 2: (np.dtype(np.float64), "double_val"), 3: (np.dtype(np.int32), "int_val"),
    4: (np.dtype(np.uint8), "int_val"), 5: (np.dtype(np.int16), "int_val"), 6: (np.dtype(np.int8), "int_val"),
    STRING: (np.dtype(object), "string_val"), 8: (np.dtype(np.complex64), "scomplex_val"),
    9: (np.dtype(np.int64), "int64_val"), 10: (np.dtype(np.bool_), "bool_val"), 17: (np.dtype(np.uint16), "int_val"),
    18: (np.dtype(np.complex128), "dcomplex_val"), HALF: (np.dtype(np.float16), "half_val"),
    22: (np.dtype(np.uint32), "uint32_val"), 23: (np.dtype(np.uint64), "uint64_val"),
}  # fmt: skip
_NUMBERS = {dtype: number for number, (dtype, _) in TYPES.items()}
_LITTLE = sys.byteorder == "little"
_LARGE = 256  # elements from which copying bytes is faster than a list; measured


@functools.cache
def _bfloat16() -> np.dtype:
    """NumPy has none of its own; imported where one is met, for a client without it asks for none."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def dtype_of(number: int) -> np.dtype:
    """The NumPy dtype of a data type's number; strings are `object`; ValueError where NumPy has none."""
    if number == BFLOAT16:
        return _bfloat16()
    if number not in TYPES:
        raise ValueError(f"no NumPy array holds data type {number}")
    return TYPES[number][0]


def number_of(dtype: np.dtype) -> int:
    """The number of the data type that holds a NumPy dtype; ValueError where there is none."""
    if dtype.kind in "OSU":
        return STRING
    if dtype in _NUMBERS:
        return _NUMBERS[dtype]
    if dtype.name == "bfloat16":
        return BFLOAT16
    raise ValueError(f"no tensor holds {dtype}")


def to_proto(array: np.ndarray) -> TensorProto:
    """A TensorProto with its values in the typed field; ValueError where TensorFlow has no such dtype."""
    proto = TensorProto()
    fill(proto, np.asarray(array))
    return proto


def fill(proto: TensorProto, array: np.ndarray, *, content: bool = False) -> None:
    """Write an array into an empty TensorProto: in the typed field, or as `tensor_content`."""
    number = number_of(array.dtype)
    proto.dtype = number
    shape = proto.tensor_shape
    shape.SetInParent()  # a scalar has a shape too, one without dimensions
    for size in array.shape:
        shape.dim.add(size=size)
    if number == STRING:
        flat = array.ravel().tolist()
        proto.string_val.extend([item.encode() if isinstance(item, str) else bytes(item) for item in flat])
        return
    if content:
        proto.tensor_content = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        return
    flat = array.ravel()
    if number in (HALF, BFLOAT16):
        flat = flat.view(np.uint16)
    elif array.dtype.kind == "c":
        flat = np.ascontiguousarray(flat).view(flat.real.dtype)
    name = "half_val" if number == BFLOAT16 else TYPES[number][1]
    if flat.dtype.kind == "f" and flat.size >= _LARGE:
        # A packed field is its little-endian bytes, behind the field's tag and their length.
        body = np.ascontiguousarray(flat, flat.dtype.newbyteorder("<")).tobytes()
        tag = TensorProto.DESCRIPTOR.fields_by_name[name].number << 3 | 2
        proto.MergeFromString(_varint(tag) + _varint(len(body)) + body)
    else:
        getattr(proto, name).extend(flat.tolist())


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def from_proto(proto: TensorProto) -> np.ndarray:
    """The array of a TensorProto, typed field or `tensor_content`; strings are bytes in an array of objects.

    As in TensorFlow, of fewer values than elements the last one is repeated. ValueError where it is not whole.
    """
    number, sizes, content = proto.dtype, proto.tensor_shape, proto.tensor_content
    dtype = TYPES[number][0] if number in TYPES else dtype_of(number)
    shape = [dim.size for dim in sizes.dim]
    if sizes.unknown_rank or (shape and min(shape) < 0):
        raise ValueError("a tensor whose shape is not known")
    count = math.prod(shape)
    if count >= 2**63:
        raise ValueError(f"a tensor of {count} elements")
    if content:
        if number == STRING:
            raise ValueError("strings as tensor_content")
        if len(content) != count * dtype.itemsize:
            raise ValueError(f"{len(content)} bytes for {count} elements of {dtype}")
        array = np.frombuffer(content, dtype if _LITTLE else dtype.newbyteorder("<"))
        return (array if _LITTLE else array.astype(dtype)).reshape(shape)
    field: Sequence = getattr(proto, "half_val" if number == BFLOAT16 else TYPES[number][1])
    if number == STRING:
        values = np.empty(len(field), object)
        values[:] = field
    elif number in (HALF, BFLOAT16):
        values = np.array(field, np.uint16).view(dtype)
    elif dtype.kind == "c":
        values = np.array(field, np.float32 if dtype.itemsize == 8 else np.float64).view(dtype)
    elif dtype.kind in "iu" and dtype.itemsize < 4:  # as in TensorFlow, of an int32 the lowest bits stay
        values = np.array(field, np.int32).astype(dtype)
    else:
        values = np.array(field, dtype)
    if len(values) == count:
        return values.reshape(shape)
    if len(values) > count or not len(values):
        # Upstream takes a tensor without values for zeros of its shape.
        if len(values) > count:
            raise ValueError(f"{len(values)} values for {count} elements")
        values = np.full(1, b"", object) if number == STRING else np.zeros(1, dtype)
    return np.concatenate([values, np.repeat(values[-1:], count - len(values))]).reshape(shape)
