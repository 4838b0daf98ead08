"""Requests as bytes and back: a client's request is decoded unchanged, and garbage is refused with a message."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from msgspec import Raw

from onnxsplit.errors import InputError
from onnxsplit.tensors import dtype_name, numpy_dtype
from runtime.gateway.http.bodies import coding_of, compress
from runtime.gateway.http.codec import answer, ask, parse
from runtime.gateway.protocol.inference import DATATYPES, InferResponse, RegionSlice, RequestedOutput
from runtime.gateway.protocol.tensor_data import classify, from_bytes, from_json, to_bytes, to_json

KINDS = [dtype for dtype in DATATYPES if dtype not in ("string", "bfloat16")]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
ARRAYS = st.sampled_from(KINDS).flatmap(lambda dtype: hnp.arrays(numpy_dtype(dtype), SHAPES))
TEXTS = SHAPES.flatmap(lambda shape: hnp.arrays(object, shape, elements=st.text(max_size=5)))


def nowhere(place: RegionSlice) -> bytes:
    raise AssertionError(place)


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@given(st.dictionaries(st.text(min_size=1), st.one_of(ARRAYS, TEXTS), max_size=3))
def test_a_client_s_request_is_decoded_as_it_was_made(inputs):
    pieces, length = ask(inputs)
    found = parse(b"".join(pieces), length, nowhere).inputs
    assert list(found) == list(inputs)
    for name, array in inputs.items():
        if array.dtype == object:
            assert np.array_equal(found[name], array)
        else:
            assert same(found[name], array)


@given(st.one_of(ARRAYS, TEXTS), st.booleans())
def test_an_answer_says_what_the_model_gave(array, binary):
    if array.dtype.kind == "f" and not np.isfinite(array).all() and not binary:
        with pytest.raises(InputError, match="binary"):
            answer(InferResponse("7", "m", "1", {"y": array}, (RequestedOutput("y", binary),)))
        return
    pieces, length = answer(InferResponse("7", "m", "1", {"y": array}, (RequestedOutput("y", binary),)))
    body = b"".join(pieces)
    said = json.loads(body[:length])
    (output,) = said["outputs"]
    assert (said["id"], output["shape"]) == ("7", list(array.shape))
    if binary:
        found = from_bytes("y", output["datatype"], output["shape"], body[length:])
    else:
        import msgspec

        data = msgspec.Raw(json.dumps(output["data"]).encode())
        found = from_json("y", output["datatype"], output["shape"], data)
    assert np.array_equal(found, array, equal_nan=array.dtype.kind == "f")


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(-5, 250)))
def test_garbage_is_refused_with_words(body, length):
    with pytest.raises(InputError, match=r".{10}"):
        parse(body, length, nowhere)


@given(st.data())
def test_a_request_with_a_byte_changed_is_understood_or_refused(data):
    pieces, length = ask({"x": np.arange(6, dtype=np.int16).reshape(2, 3), "s": np.array(["ab", ""], object)})
    body = bytearray(b"".join(pieces))
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] = data.draw(st.integers(0, 255))
    with suppress(InputError):
        assert all(array.size < 100 for array in parse(body, length, nowhere).inputs.values())


def test_a_place_in_shared_memory_is_read_where_it_is():
    tensor = {"name": "x", "shape": [2], "datatype": "INT32", "parameters": {
        "shared_memory_region": "r", "shared_memory_byte_size": 8, "shared_memory_offset": 4}}  # fmt: skip
    asked = []

    def read(place):
        asked.append(place)
        return np.array([1, 2], np.int32).tobytes()

    found = parse(json.dumps({"inputs": [tensor]}).encode(), None, read)
    assert asked == [RegionSlice("r", 4, 8)]
    assert found.inputs["x"].tolist() == [1, 2]


def test_classes_are_the_greatest_first_and_ties_by_position():
    rows = np.array([[0.5, 2.0, 2.0, -1.0], [3.0, 0.0, 1.0, 2.0]], np.float32)
    assert classify(rows, 2, batched=True).tolist() == [
        ["2.000000:1", "2.000000:2"], ["3.000000:0", "2.000000:3"],
    ]  # fmt: skip
    assert classify(rows, 1, batched=False).tolist() == ["3.000000:4"]
    assert classify(rows, 99, batched=True).shape == (2, 4)


def test_tensors_that_lie_in_order_are_not_copied():
    array = np.arange(4, dtype=np.float32)
    assert np.shares_memory(np.frombuffer(to_bytes(array), np.float32), array)
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert bytes(to_bytes(turned)) == turned.tobytes()


@pytest.mark.parametrize(("accepted", "coding"), [
    ("gzip", "gzip"), ("deflate", "deflate"), ("gzip, deflate", ""), ("", ""), ("br", ""), ("*", ""),
])  # fmt: skip
def test_answers_are_compressed_for_clients_that_ask_for_one_coding(accepted, coding):
    import gzip
    import zlib

    assert coding_of(accepted) == coding
    if coding:
        whole = b"".join(compress([b"head", memoryview(b"tail" * 100)], coding))
        unpack = {"gzip": gzip.decompress, "deflate": zlib.decompress}[coding]
        assert unpack(whole) == b"head" + b"tail" * 100


def raw(text: str) -> Raw:
    return Raw(text.encode())


@pytest.mark.parametrize(
    ("datatype", "shape", "text"),
    [
        ("FP32", [2, 2], "[1, 2, 3, 4]"),
        ("FP32", [2, 2], "[[1, 2], [3, 4]]"),
        ("INT8", [4], " [1,2 ,3,4] "),
        ("BOOL", [2], "[true, false]"),
        ("BYTES", [2], '["a,[", "b\\\\"]'),
        ("BYTES", [1, 1], '[["\\"\\""]]'),
        ("FP32", [0], "[]"),
        ("FP32", [2, 0], "[[], []]"),
        ("FP64", [], "[5]"),
    ],
)
def test_json_is_read_flat_or_nested(datatype, shape, text):
    found = from_json("x", datatype, shape, raw(text))
    assert found.tolist() == np.array(json.loads(text)).reshape(shape).tolist()


@pytest.mark.parametrize(
    ("datatype", "shape", "text", "words"),
    [
        ("FP32", [1], "[1,2]", "has 2 elements"),
        ("FP32", [1], "5", "0 lists deep"),
        ("FP32", [1], '{"a":1}', "0 lists deep"),
        ("FP32", [1], "[[[1]]]", "3 lists deep"),
        ("FP32", [1], "[1e39]", "too large for float32"),
        ("FP32", [1], '["1"]', "are not FP32"),
        ("INT64", [1], "[1.5]", "are not INT64"),
        ("INT64", [1], "[99999999999999999999]", "are not INT64"),
        ("BYTES", [1], '["a", "b"]', "has 2 strings"),
        ("BYTES", [1], "[1]", "are not BYTES"),
        ("FP32", [0, 2**62], "[]", "fit into memory together"),
        ("FP32", [2**70], "[]", "fit into memory together"),
    ],
)
def test_json_that_is_no_such_tensor_is_refused(datatype, shape, text, words):
    with pytest.raises(InputError, match=words):
        from_json("x", datatype, shape, raw(text))


def test_many_numbers_are_read_in_pieces_and_are_the_same():
    values = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    found = from_json("x", "FP32", [400, 500], raw(json.dumps(values.reshape(400, 500).tolist())))
    assert np.array_equal(found, values.reshape(400, 500))
    assert json.loads(bytes(to_json("y", values))) == values.tolist()


def test_a_list_is_compared_with_its_shape_before_it_is_decoded():
    """Ten million numbers take about 300 MB as Python objects; the shape allows one."""
    text = raw("[" + "0.5," * 10_000_000 + "0.5]")
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="10000001 elements"):
            from_json("x", "FP32", [1], text)
        assert tracemalloc.get_traced_memory()[1] < 120 << 20
    finally:
        tracemalloc.stop()


def test_names_and_values_of_any_length_make_short_messages():
    name = "x" * 8_000_000
    body = json.dumps({"inputs": [{"name": name, "shape": [1], "datatype": name, "data": [1]}]}).encode()
    with pytest.raises(InputError) as caught:
        parse(body, None, nowhere)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("timeout", [2**63 - 1, -1, 10**400, "5", 1.5, True])
def test_an_invalid_timeout_is_refused(timeout):
    body = json.dumps({"inputs": [], "parameters": {"timeout": timeout}}).encode()
    with pytest.raises(InputError):
        parse(body, None, nowhere)


@pytest.mark.parametrize(
    ("datatype", "shape", "text"),
    [
        ("FP32", [2, 3], "[[1, 2, 3, 4, 5], [6]]"),
        ("FP32", [2, 2], "[[1, 2], 3, 4]"),
        ("FP32", [3], "[1, [2], 3]"),
        ("FP32", [2, 3], "[[1, 2], [3, 4], [5, 6]]"),
        ("FP32", [1, 2], "[[1, [2]]]"),
        ("FP32", [2, 2], "[[], [1, 2, 3]]"),
        ("INT8", [2, 1, 2], "[[[1, 2]], [[3], [4]]]"),
        ("FP32", [2, 0], "[[], [], []]"),
        ("FP32", [10**9, 0], "[[], []]"),
        ("FP32", [0], "[[]]"),
        ("BYTES", [2, 2], '[["a", "b", "c"], ["d"]]'),
        ("BYTES", [2, 2], '[["a", "b"], "c", "d"]'),
        ("BYTES", [2, 2], '[["a", "b"], ["c", "d"], []]'),
        ("BYTES", [2], '["a", ["b"]]'),
        ("BYTES", [2, 0], "[[], [], []]"),
    ],
)
def test_json_that_is_not_nested_as_its_shape_is_refused(datatype, shape, text):
    with pytest.raises(InputError, match="data of tensor 'x' are not"):
        from_json("x", datatype, shape, raw(text))


@given(st.one_of(ARRAYS, TEXTS))
def test_json_nested_as_numpy_nests_it_is_read(array):
    if array.ndim and (array.dtype.kind != "f" or np.isfinite(array).all()):
        found = from_json("x", DATATYPES[dtype_name(array.dtype)], array.shape, raw(json.dumps(array.tolist())))
        assert np.array_equal(found, array)


def test_a_list_of_empty_lists_is_refused_before_it_is_held():
    text = raw('[["a"]' + ",[]" * 5_000_000 + "]")
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="are not BYTES"):
            from_json("x", "BYTES", [1, 1], text)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


ONE = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"parameters": {"a": [[]] * 40_000}}, "the parameters of the request have"),
        ({"inputs": [{**ONE, "parameters": {"a": [[]] * 40_000}}]}, "the parameters of input 'x' have"),
        ({"outputs": [{"name": "y", "parameters": {"a": [[]] * 40_000}}]}, "the parameters of output 'y' have"),
        ({"inputs": [{**ONE, "shape": [1] * 3000}]}, "the shape of input 'x' have"),
        ({"parameters": 5}, "parameters of the request do not"),
        ({"inputs": [{**ONE, "parameters": []}]}, "parameters of input 'x' do not"),
        ({"inputs": [{**ONE, "shape": ["1"]}]}, "shape of input 'x' do not"),
        ({"inputs": [{**ONE, "shape": None}]}, "shape of input 'x' do not"),
    ],
)
def test_parameters_and_shapes_are_bounded_before_they_are_decoded(changed, words):
    body = json.dumps({"inputs": [ONE], **changed}).encode()
    with pytest.raises(InputError, match=words):
        parse(body, None, nowhere)


def test_parameters_that_are_null_are_none():
    body = {"inputs": [{**ONE, "parameters": None}], "outputs": [{"name": "y", "parameters": None}], "parameters": None}
    assert parse(json.dumps(body).encode(), None, nowhere).parameters == {}


def test_a_batch_of_no_rows_has_classes_of_none():
    assert classify(np.empty((0, 4), np.float32), 2, batched=True).shape == (0, 2)
    assert classify(np.empty((0, 2, 3), np.float32), 99, batched=True).shape == (0, 6)
    assert classify(np.empty((0, 4), np.float32), 2, batched=False).shape == (0,)
    assert classify(np.empty((3, 0), np.float32), 2, batched=True).shape == (3, 0)
