"""NumPy arrays to and from TensorProto, in the fields that TensorFlow Serving uses."""

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, types_pb2

# dtype -> the typed field of a reply; clients read `.float_val` and its like, never `tensor_content`.
_FIELDS = {
    tf.float32: "float_val", tf.float64: "double_val", tf.bool: "bool_val", tf.string: "string_val",
    tf.int64: "int64_val", tf.uint64: "uint64_val", tf.uint32: "uint32_val", tf.int32: "int_val",
    tf.int16: "int_val", tf.int8: "int_val", tf.uint16: "int_val", tf.uint8: "int_val",
    tf.float16: "half_val", tf.bfloat16: "half_val", tf.complex64: "scomplex_val", tf.complex128: "dcomplex_val",
}  # fmt: skip


def to_proto(array: np.ndarray) -> tensor_pb2.TensorProto:
    """A TensorProto with its values in the typed field; ValueError where TensorFlow has no such dtype."""
    array = np.asarray(array)
    dtype = tf.string if array.dtype.kind in "OSU" else tf.dtypes.as_dtype(array.dtype)
    if dtype not in _FIELDS:
        raise ValueError(f"no tensor holds {array.dtype}")
    proto = tensor_pb2.TensorProto(dtype=dtype.as_datatype_enum)
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    flat = array.ravel()
    if dtype == tf.string:
        values = [item.encode() if isinstance(item, str) else bytes(item) for item in flat]
    elif dtype in (tf.float16, tf.bfloat16):
        values = flat.view(np.uint16)
    elif dtype in (tf.complex64, tf.complex128):
        values = flat.view(flat.real.dtype)
    else:
        values = flat
    getattr(proto, _FIELDS[dtype]).extend(values if isinstance(values, list) else values.tolist())
    return proto


def from_proto(proto: tensor_pb2.TensorProto) -> np.ndarray:
    """The array of a TensorProto, typed fields or `tensor_content`; ValueError where it is not whole."""
    try:
        return tf.make_ndarray(proto)
    except (TypeError, ValueError, KeyError) as error:
        name = types_pb2.DataType.Name(proto.dtype) if proto.dtype in types_pb2.DataType.values() else proto.dtype
        raise ValueError(f"a {name} tensor that cannot be read: {error}") from error
