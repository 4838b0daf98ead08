"""What goes over the wire comes back, and what is no message of ours is refused before anything is allocated."""

from __future__ import annotations

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runtime import codec
from runtime.errors import ProtocolError
from runtime.messages import Assign, Cancel, Finished, Fragment, Hello, TensorHead, Wire

KINDS = ["f4", "f8", "f2", "i1", "i4", "i8", "u1", "u8", "?"]
ARRAYS = st.sampled_from(KINDS).flatmap(
    lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0))
)


def over_the_wire(array):
    heads, frames = codec.encode_tensors({"x": array})
    return codec.decode_tensors(heads, [bytes(frame) for frame in frames])["x"]


@given(ARRAYS)
def test_numbers_survive(array):
    back = over_the_wire(array)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@given(
    hnp.arrays(
        object,
        hnp.array_shapes(max_dims=2, min_side=0),
        elements=st.text(st.characters(exclude_categories=["Cs"])),
    )
)
def test_strings_survive(array):
    assert over_the_wire(array).tolist() == array.tolist()


def test_bfloat16_survives():
    array = np.array([[1.5], [-3]], dtype=ml_dtypes.bfloat16)
    assert over_the_wire(array).tolist() == array.tolist()
    assert over_the_wire(array).dtype == array.dtype


def test_a_view_is_sent_as_what_it_shows():
    array = np.arange(12).reshape(3, 4).T[::2]
    assert np.array_equal(over_the_wire(array), array)


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (codec.decode_node_control, Hello(1, 2, "h", "a", -1, -1)),
        (codec.decode_coordinator_control, Assign("id", "f", 0, 1, "cpu", 0, "a")),
        (codec.decode_coordinator_control, Wire((("a", "b"), ("c",)))),
        (codec.decode_coordinator_control, Cancel(7)),
        (codec.decode_data, Fragment(1, -1, (0, -1), ("y",), (TensorHead("x", "float32", (1,)),))),
        (codec.decode_data, Finished(1, 2, 3, 4, 5)),
    ],
)
def test_headers_survive(decode, message):
    assert decode(codec.encode(message)) == message


@given(st.binary(max_size=200))
def test_garbage_is_refused(frame):
    for decode in (codec.decode_data, codec.decode_node_control, codec.decode_coordinator_control):
        with pytest.raises(ProtocolError):
            decode(frame)


@given(st.data())
def test_a_mutated_header_is_refused_or_read(data):
    header = bytearray(codec.encode(Fragment(1, -1, (0,), ("y",), (TensorHead("x", "float32", (4,)),))))
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = codec.decode_data(bytes(header))
        if isinstance(message, Fragment):
            codec.decode_tensors(message.tensors, [bytes(16)])
    except ProtocolError:
        pass


def test_an_oversized_header_is_refused():
    with pytest.raises(ProtocolError, match="at most"):
        codec.decode_data(bytes(codec.MAX_HEADER_BYTES + 1))


@pytest.mark.parametrize(
    "head",
    [
        TensorHead("x", "float32", (1 << 40, 1 << 40)),
        TensorHead("x", "float32", (5,)),
        TensorHead("x", "float32", (-1, -4)),
        TensorHead("x", "string", (1 << 40,)),
        TensorHead("x", "object", (4,)),
        TensorHead("x", "float32", (1,) * 33),
    ],
)
def test_a_head_that_does_not_fit_its_frame_is_refused(head):
    with pytest.raises(ProtocolError):
        codec.decode_tensors((head,), [bytes(16)])


def test_unknown_fields_are_refused():
    with pytest.raises(ProtocolError):
        codec.decode_data(msgspec.msgpack.encode(["finished", 1, 2, 3, 4, 5, "more"]))
