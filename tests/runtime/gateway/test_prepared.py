"""A request that is recognised is what decoding it would give, and another request is never taken for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("grpc", reason="needs the extra serve")
from tritonclient.grpc import service_pb2 as pb

from onnxsplit.tensors import numpy_dtype
from runtime.gateway.batcher import Checked
from runtime.gateway.grpc import codec as grpc_codec
from runtime.gateway.http import codec as http_codec
from runtime.gateway.prepared import PreparedRequest, PreparedRequests
from runtime.gateway.protocol.inference import InferResponse, RegionSlice, RequestedOutput, datatype_of
from runtime.requests.request import OutputSelection

CHECKED = Checked(OutputSelection((), (), (), frozenset(), (), None), None, 1, 0)
DTYPES = st.sampled_from(["float32", "int64", "uint8", "float16", "bfloat16"])
SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)


def nowhere(place: RegionSlice) -> bytes:
    raise AssertionError(place)


def http(inputs, **said):
    """The key and the message of a request over HTTP, and how it is decoded."""
    pieces, length = http_codec.ask(inputs)
    if said:
        text = pieces[0][:-1] + b"".join(b',"%s":"%s"' % (k.encode(), v.encode()) for k, v in said.items()) + b"}"
        pieces, length = [text, *pieces[1:]], len(text)
    message = b"".join(pieces)
    return ("m", "", length, len(message)), message, lambda body: http_codec.parse(body, length, nowhere)


def grpc(inputs, **said):
    """The same over gRPC."""
    asked = pb.ModelInferRequest(model_name="m", **said)
    for name, array in inputs.items():
        asked.inputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        asked.raw_input_contents.append(array.tobytes())
    message = asked.SerializeToString()
    return ("ModelInfer", len(message)), message, lambda body: grpc_codec.parse(*grpc_codec.split(body), nowhere)


WAYS = pytest.mark.parametrize("way", [http, grpc])


def learnt(key, message, parse, *, known=None, changes=0):
    """Requests of which one is remembered, if it can be."""
    known = known or PreparedRequests()
    known.find(changes, key, message)
    known.learn(changes, key, message, PreparedRequest("version", "batcher", parse(message), (), CHECKED))
    return known


@st.composite
def messages(draw, count=2):
    """The inputs of some requests that are alike."""
    specs = draw(st.lists(st.tuples(DTYPES, SHAPES), min_size=1, max_size=3))
    sizes = [int(np.prod(shape)) * numpy_dtype(dtype).itemsize for dtype, shape in specs]
    return [
        {
            f"x{number}": np.frombuffer(draw(st.binary(min_size=size, max_size=size)), numpy_dtype(dtype)).reshape(
                shape
            )
            for number, ((dtype, shape), size) in enumerate(zip(specs, sizes, strict=True))
        }
        for _ in range(count)
    ]


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        (found[n].dtype, found[n].shape, found[n].tobytes()) == (a.dtype, a.shape, a.tobytes())
        for n, a in wanted.items()
    )


@WAYS
@given(st.data())
def test_a_request_like_an_earlier_one_is_recognised_with_its_own_tensors(way, data):
    first, second = data.draw(messages())
    known = learnt(*way(first))
    key, message, parse = way(second)
    for body in (message, bytearray(message)):
        found = known.find(0, key, body)
        assert found is not None
        assert found[0].request.inputs == {}
        assert same(found[1], second)
        assert same(found[1], parse(message).inputs)


@WAYS
@given(st.data())
def test_one_other_byte_outside_the_tensors_makes_another_request(way, data):
    """A message with any byte changed is either not recognised, or decodes to what was recognised."""
    (inputs,) = data.draw(messages(1))
    key, message, parse = way(inputs)
    known = learnt(key, message, parse)
    at = data.draw(st.integers(0, len(message) - 1))
    changed = bytearray(message)
    changed[at] ^= data.draw(st.integers(1, 255))
    found = known.find(0, key, bytes(changed))
    if found is not None:
        decoded = parse(bytes(changed))
        assert same(found[1], decoded.inputs)
        assert decoded.outputs == found[0].request.outputs


def test_the_length_of_the_json_tells_requests_apart():
    """The same bytes with another length of the JSON are another request."""
    (name, number, length, size), message, parse = http({"x": np.zeros(4, np.uint8)})
    known = learnt((name, number, length, size), message, parse)
    assert known.find(0, (name, number, length - 1, size), message) is None
    assert known.find(0, ("other", number, length, size), message) is None


@WAYS
@pytest.mark.parametrize(
    "array",
    [np.array(["a"], object), np.array([True]), np.zeros((0, 3), np.float32)],
    ids=["strings", "truth values, which are copied", "nothing"],
)
def test_inputs_that_are_not_plain_bytes_of_the_message_are_decoded_each_time(way, array):
    key, message, parse = way({"x": array}) if array.dtype != object else http({"x": array})
    assert learnt(key, message, parse).find(0, key, message) is None


def test_numbers_in_json_are_decoded_each_time():
    message = b'{"inputs":[{"name":"x","shape":[2],"datatype":"FP32","data":[1,2]}]}'
    key = ("m", "", None, len(message))
    known = learnt(key, message, lambda body: http_codec.parse(body, None, nowhere))
    assert known.find(0, key, message) is None


@WAYS
def test_a_request_with_a_name_of_its_own_is_not_remembered(way):
    key, message, parse = way({"x": np.ones(2, np.float32)}, id="7")
    assert learnt(key, message, parse).find(0, key, message) is None


def test_what_is_remembered_is_bounded():
    known = PreparedRequests()
    for size in range(1000):
        learnt(*http({"x": np.ones(size + 1, np.uint8)}), known=known)
    for number in range(100):
        learnt(*http({f"x{number:02}": np.ones(1, np.uint8)}), known=known)
    assert len(known._known) <= 256
    assert max(map(len, known._known.values())) <= 4
    newest = http({"x99": np.ones(1, np.uint8)})
    assert known.find(0, *newest[:2]) is not None
    long = http({"x" * 5000: np.ones(1, np.uint8)})
    assert learnt(*long, known=known).find(0, *long[:2]) is None


def test_the_parameters_of_a_request_are_not_kept():
    """They may take many times the bytes of their text."""
    head = b'{"inputs":[{"name":"x","shape":[1],"datatype":"UINT8","parameters":{"binary_data_size":1}}],"parameters":'
    head += b'{"timeout":5000,"p":[' + b",".join([b"{}"] * 1000) + b"]}}"
    key, message = ("m", "", len(head), len(head) + 1), head + b"a"
    known = learnt(key, message, lambda body: http_codec.parse(body, len(head), nowhere))
    found = known.find(0, key, message)
    assert found is not None
    assert (found[0].request.parameters, found[0].request.timeout_ns) == ({}, 5_000_000)


def test_everything_is_forgotten_when_models_change():
    key, message, parse = http({"x": np.ones(2, np.float32)})
    known = learnt(key, message, parse)
    assert known.find(0, key, message) is not None
    assert known.find(1, key, message) is None
    known.learn(0, key, message, PreparedRequest("old version", "batcher", parse(message), (), CHECKED))
    assert known.find(1, key, message) is None, "its version was looked up before the models changed"
    learnt(key, message, parse, known=known, changes=1)
    assert known.find(1, key, message) is not None


@given(st.lists(st.tuples(DTYPES, SHAPES), max_size=3), st.text(max_size=3), st.data())
def test_an_answer_over_grpc_has_the_same_bytes_with_one_copy(specs, name, data):
    outputs = {
        f"y{number}": np.zeros(shape, numpy_dtype(dtype)) + data.draw(st.integers(0, 9))
        for number, (dtype, shape) in enumerate(specs)
    }
    requested = tuple(
        RequestedOutput(output, region_slice=RegionSlice("r", 0, 1) if data.draw(st.booleans()) else None)
        for output in outputs
    )
    response = InferResponse(name, "m", "1", outputs, requested)
    assert pb.ModelInferResponse.FromString(grpc_codec.encode(response)) == grpc_codec.answer(response)


def test_long_contents_have_the_length_that_protobuf_writes():
    sizes = [0, 1, 127, 128, 16383, 16384, 2_097_151, 2_097_152]
    for size in sizes:
        response = InferResponse("", "m", "1", {"y": np.ones(size, np.uint8)}, (RequestedOutput("y"),))
        found = pb.ModelInferResponse.FromString(grpc_codec.encode(response))
        assert [len(contents) for contents in found.raw_output_contents] == [size]
