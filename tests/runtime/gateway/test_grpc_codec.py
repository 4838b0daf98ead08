"""Requests over gRPC: sizes are compared with limits and shapes before anything is decoded."""

from __future__ import annotations

import pytest

pytest.importorskip("grpc", reason="needs the extra serve")
from tritonclient.grpc import service_pb2 as pb

from onnxsplit.errors import InputError
from runtime.gateway.errors import TooLarge
from runtime.gateway.grpc import codec as grpc_codec
from runtime.gateway.protocol import tensor_data
from runtime.gateway.protocol.inference import RegionSlice
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
