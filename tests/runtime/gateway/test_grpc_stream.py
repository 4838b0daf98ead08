"""A stream hands on its requests in the order in which they stand in it, however long each takes to parse."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("grpc", reason="needs the extra serve")
from tritonclient.grpc import service_pb2 as pb

from runtime.gateway.budget import Budget
from runtime.gateway.grpc import codec
from runtime.gateway.grpc.stream import InferStream


def test_requests_are_executed_in_their_order_if_an_earlier_one_is_parsed_for_longer():
    """Otherwise the second request of a sequence would take the turn of the first."""
    messages = [pb.ModelInferRequest(model_name="m", id=str(number)).SerializeToString() for number in range(3)]
    executed: list[str] = []

    async def scene() -> list[str]:
        unread = list(messages)

        async def read():
            return unread.pop(0) if unread else None

        async def split(message):
            request = codec.split(message)
            for _ in range(20 if request.message.id == "0" else 0):  # turns of the event loop
                await asyncio.sleep(0)
            return request

        async def infer(_, request):
            executed.append(request.message.id)
            await asyncio.sleep(0)
            return pb.ModelInferResponse(id=request.message.id)

        texts = SimpleNamespace(asks_for_text=lambda *_: False)
        stream = InferStream(read, split, infer, texts, None, Budget(1 << 20, 1 << 20), str)
        return [response.infer_response.id async for response in stream.responses()]

    assert asyncio.run(asyncio.wait_for(scene(), 60)) == executed == ["0", "1", "2"]
