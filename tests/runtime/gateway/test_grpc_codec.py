"""Requests over gRPC: sizes are compared with limits and shapes before anything is decoded."""

from __future__ import annotations

import pytest

pytest.importorskip("grpc", reason="needs the extra serve")
from tritonclient.grpc import service_pb2 as pb

from onnxsplit.errors import InputError
from runtime.gateway.errors import TooLarge
from runtime.gateway.grpc import codec as grpc_codec
from runtime.gateway.protocol import tensor_data
from runtime.gateway.protocol.inference import RegionSlice, SequencePlace
from runtime.gateway.protocol.parameters import MOST_JSON_BYTES
from runtime.gateway.protocol.tensor_data import from_items


def nowhere(place: RegionSlice) -> bytes:
    raise AssertionError(place)


def message(**changed):
    tensor = pb.ModelInferRequest.InferInputTensor(**{"name": "x", "datatype": "BYTES", "shape": [1], **changed})
    return pb.ModelInferRequest(model_name="m", inputs=[tensor])


def test_a_message_with_much_beside_its_raw_contents_is_refused_before_it_is_parsed():
    large = bytes(MOST_JSON_BYTES)
    asked = pb.ModelInferRequest(model_name="m", raw_input_contents=[large])
    assert [len(found) for found in grpc_codec.split(asked.SerializeToString())[1]] == [len(large)]
    with pytest.raises(TooLarge, match=f"at most {MOST_JSON_BYTES}"):
        grpc_codec.split(message(contents={"bytes_contents": [large]}).SerializeToString())


def test_elements_are_counted_before_they_are_decoded():
    with pytest.raises(InputError, match="has 2 elements; shape"):
        grpc_codec.parse(message(contents={"bytes_contents": [b"\xff", b"\xff"]}), [], nowhere)


def test_strings_are_limited_as_elements_too(monkeypatch):
    monkeypatch.setattr(tensor_data, "_MOST_STRINGS", 2)
    assert from_items("x", "BYTES", [2], ["a", "b"]).tolist() == ["a", "b"]
    with pytest.raises(InputError, match="at most 2"):
        from_items("x", "BYTES", [3], ["a", "b", "c"])


def test_a_shape_of_many_sizes_is_refused_over_grpc():
    with pytest.raises(InputError, match="1000000 dimensions"):
        grpc_codec.parse(message(shape=[1] * 1_000_000), [], nowhere)


@pytest.mark.parametrize(
    ("parameters", "place"),
    [
        ({}, None),
        ({"sequence_id": {"int64_param": 0}}, None),
        ({"sequence_id": {"string_param": ""}}, None),
        ({"sequence_id": {"int64_param": 5}}, SequencePlace(5)),
        (
            {"sequence_id": {"uint64_param": 2**64 - 1}, "sequence_end": {"bool_param": True}},
            SequencePlace(2**64 - 1, end=True),
        ),
        (
            {"sequence_id": {"string_param": "5"}, "sequence_start": {"bool_param": True}},
            SequencePlace("5", start=True),
        ),
    ],
)
def test_the_sequence_of_a_message_is_known_before_it_is_decoded(parameters, place):
    asked = message(contents={"bytes_contents": [b"a"]})
    for name, value in parameters.items():
        asked.parameters[name].CopyFrom(pb.InferParameter(**value))
    assert grpc_codec.sequence_of(asked) == place
    assert grpc_codec.parse(asked, [], nowhere).sequence == place


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"sequence_id": {"int64_param": -5}}, "sequence_id is -5; it must be a whole number from 1"),
        ({"sequence_id": {"double_param": 5.0}}, "sequence_id is 5.0"),
        ({"sequence_id": {"string_param": "x" * 129}}, "at most 128 characters"),
        ({"sequence_start": {"bool_param": True}}, "need the sequence_id of their sequence"),
        ({"sequence_id": {"int64_param": 5}, "sequence_end": {"int64_param": 1}}, "must be true or false"),
    ],
)
def test_a_sequence_that_is_not_named_rightly_is_refused(parameters, words):
    asked = message(contents={"bytes_contents": [b"a"]})
    for name, value in parameters.items():
        asked.parameters[name].CopyFrom(pb.InferParameter(**value))
    with pytest.raises(InputError, match=words):
        grpc_codec.sequence_of(asked)
