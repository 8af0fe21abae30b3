"""The messages without TensorFlow are those of the official stubs, and their bytes mean the same."""

import make_protocol
import numpy as np
import tensorflow as tf
from google.protobuf import descriptor_pb2
from hypothesis import given, settings
from hypothesis import strategies as some
from hypothesis.extra import numpy as arrays
from tensorflow.core.framework import tensor_pb2

from shared.serving import protocol, tensors

DTYPES = ["float32", "float64", "float16", "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64",
          "uint64", "complex64", "complex128"]  # fmt: skip


def test_descriptors_are_those_of_the_stubs():
    kept = descriptor_pb2.FileDescriptorSet.FromString(make_protocol.TARGET.read_bytes())
    assert {file.name: file for file in kept.file} == {file.name: file for file in make_protocol.built().file}


def test_calls_of_the_services():
    assert set(protocol.methods(protocol.PREDICTION)) == {
        "Predict", "Classify", "Regress", "MultiInference", "GetModelMetadata"}  # fmt: skip
    assert set(protocol.methods(protocol.MODEL)) == {"GetModelStatus", "HandleReloadConfigRequest"}
    assert set(protocol.methods(protocol.PROFILER)) == {"Profile", "Terminate"}


numbers = some.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)


@settings(max_examples=200, deadline=None)
@given(numbers, some.booleans())
def test_any_numbers_survive(array, content):
    proto = protocol.TensorProto()
    tensors.fill(proto, array, content=content)
    found = tensors.from_proto(protocol.TensorProto.FromString(proto.SerializeToString()))
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found, array)
    theirs = tf.make_ndarray(tensor_pb2.TensorProto.FromString(proto.SerializeToString()))  # as TensorFlow reads it
    np.testing.assert_array_equal(theirs, array)
    sent = tf.make_tensor_proto(array, shape=array.shape, dtype=array.dtype)  # and as it writes it
    np.testing.assert_array_equal(tensors.from_proto(protocol.TensorProto.FromString(sent.SerializeToString())), array)


@settings(max_examples=50, deadline=None)
@given(some.lists(some.binary(), max_size=6), some.booleans())
def test_any_strings_survive(values, square):
    array = np.empty(len(values), object)
    array[:] = values
    array = array[:, None] if square else array
    found = tensors.from_proto(tensors.to_proto(array))
    assert found.shape == array.shape
    assert found.tolist() == array.tolist()


def test_bfloat16_survives():
    array = tf.constant([1.5, -2.0, 0.0], tf.bfloat16).numpy()
    found = tensors.from_proto(tensors.to_proto(array))
    assert found.dtype == array.dtype
    assert found.tolist() == array.tolist()


def test_large_floats_go_as_bytes_in_the_typed_field():
    array = np.random.default_rng(1).normal(size=(40, 50)).astype(np.float32)
    proto = tensors.to_proto(array)
    assert len(proto.float_val) == 2000
    assert not proto.tensor_content
    np.testing.assert_array_equal(tensors.from_proto(proto), array)
