"""One stream of ``ModelStreamInfer``: requests in, responses out.

A request for tensors has one response, and these responses keep the order of their requests. A request for a text has
a response for each part of it; those of several texts come as the texts do. Requests of a sequence are executed in the
order in which they stand in the stream.

    requests    tensors 1    text 2     tensors 3
    responses   1            2a         3            2b         2c
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from runtime.gateway.budget import Budget
from runtime.gateway.errors import TooLarge, Unsupported
from runtime.gateway.grpc import codec
from runtime.gateway.protocol.inference import RegionSlice
from runtime.gateway.protocol.text import MOST_BYTES, TextRequest, of_tensors
from runtime.gateway.protocol.text import response as text_response
from runtime.gateway.texts import Texts
from runtime.gateway.threads import Workers, takes_long

_MOST_RUNNING = 64  # requests of one stream that are executed at once
_MOST_UNSENT = 8  # responses that wait for the client to read
_FINAL = "triton_final_response"  # the parameter of a request's last response

Infer = Callable[[bytes, codec.SplitRequest], Awaitable[Any]]
"""Executes a request for tensors: the message, and the same parsed."""

Split = Callable[[bytes], Awaitable[codec.SplitRequest]]
"""Parses a message."""


class InferStream:
    """One stream.

    Args:
        read: reads the next message; gives something other than bytes at the end.
        split: parses a message.
        infer: executes a request for tensors.
        texts: completes texts.
        workers: threads for work that takes long.
        budget: the memory for requests and responses.
        message_of: the message for a client about an error.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[Any]],
        split: Split,
        infer: Infer,
        texts: Texts,
        workers: Workers,
        budget: Budget,
        message_of: Callable[[Exception], str],
    ) -> None:
        self._read = read
        self._split = split
        self._infer = infer
        self._texts = texts
        self._workers = workers
        self._budget = budget
        self._message_of = message_of
        self._parsing = asyncio.Lock()
        self._room = asyncio.Semaphore(_MOST_RUNNING)
        self._unsent: asyncio.Queue[tuple[Any, int] | None] = asyncio.Queue(_MOST_UNSENT)
        self._running: set[asyncio.Task[None]] = set()

    async def responses(self) -> AsyncGenerator[Any, None]:
        """All responses. Closing the iterator ends everything that still runs."""
        receiving = asyncio.ensure_future(self._receive())
        try:
            while (entry := await self._unsent.get()) is not None:
                response, held = entry
                try:
                    yield response
                finally:
                    self._budget.give(held)
        finally:
            tasks = [receiving, *self._running]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            while not self._unsent.empty():
                left = self._unsent.get_nowait()
                self._budget.give(left[1] if left is not None else 0)

    async def _receive(self) -> None:
        try:
            before = asyncio.Event()
            before.set()
            while isinstance(message := await self._read(), bytes):
                await self._room.acquire()
                after = asyncio.Event()
                task = asyncio.ensure_future(self._answer(message, before, after))
                del message  # only the task holds it now
                before = after
                self._running.add(task)
                task.add_done_callback(self._ended)
            await asyncio.gather(*self._running)
        finally:
            await self._unsent.put(None)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._room.release()

    async def _answer(self, message: bytes, before: asyncio.Event, after: asyncio.Event) -> None:
        """Answer a request.

        Args:
            message: the request.
            before: set when the request before it no longer holds up responses.
            after: to be set when this one no longer does.
        """
        request = pb.ModelInferRequest()
        try:
            with self._budget.holding(len(message)):
                async with self._parsing:  # what follows up to the next await is done in the order of the requests
                    request, raw = await self._split(message)
                names = [tensor.name for tensor in request.inputs]
                if self._texts.asks_for_text(request.model_name, request.model_version, names):
                    after.set()
                    wanted = await self._workers.run(takes_long(parsed_bytes=len(message)), _wanted, request, raw)
                else:
                    response = await self._infer(message, codec.SplitRequest(request, raw))
                    if request.parameters["triton_enable_empty_final_response"].bool_param:
                        response.parameters[_FINAL].bool_param = True
                    await before.wait()
                    await self._send(response)
                    return
            del message, raw
            await self._complete(request.model_name, request.model_version, wanted)
        except Exception as error:
            if not after.is_set():
                await before.wait()
            await self._unsent.put((self._failed(request, error), 0))
        finally:
            after.set()

    async def _complete(self, name: str, number: str, wanted: TextRequest) -> None:
        """Answer a request for a text. The last response says that it is the last one."""
        version = self._texts.find(name, number)
        async with aclosing(self._texts.answers(version, wanted)) as answers:
            async for answer in answers:
                message = codec.answer(text_response(wanted, answer, name, version.number))
                message.parameters[_FINAL].bool_param = answer.reason is not None
                await self._send(message)

    async def _send(self, response: Any) -> None:
        """Send a response; its bytes are held until then."""
        held = response.ByteSize()
        self._budget.take(held)
        try:
            await self._unsent.put((pb.ModelStreamInferResponse(infer_response=response), held))
        except BaseException:
            self._budget.give(held)
            raise

    def _failed(self, request: Any, error: Exception) -> Any:
        name, number = request.model_name, request.model_version
        response = pb.ModelInferResponse(model_name=name, model_version=number, id=request.id)
        response.parameters[_FINAL].bool_param = True
        return pb.ModelStreamInferResponse(error_message=self._message_of(error), infer_response=response)


def _wanted(request: Any, raw: list[memoryview]) -> TextRequest:
    if (size := request.ByteSize() + sum(map(len, raw))) > MOST_BYTES:
        raise TooLarge(f"the request has {size} bytes; at most {MOST_BYTES} are allowed for a text")
    return of_tensors(codec.parse(request, raw, _no_region))


def _no_region(_: RegionSlice) -> bytes:
    raise Unsupported("a request for a text cannot have inputs in shared memory; send them in the request")
