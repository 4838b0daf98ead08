"""Runs a request for each item of an iterable, with a bounded number of items between the source and the reader.

    source -> at most ``window`` items: waiting, in the pipeline, or answered and not yet taken -> reader

The next item is taken from the source when the reader has taken a result, so a slow reader holds the source back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Sequence,
    Sized,
)
from concurrent.futures import Future
from contextlib import aclosing
from queue import SimpleQueue
from typing import TypeAlias, TypedDict, TypeVar

from onnxsplit.arguments import check_names
from onnxsplit.errors import InputError, shown
from onnxsplit.tensors import Array

Outputs: TypeAlias = "dict[str, Array]"
Later: TypeAlias = "Callable[[Callable[[], object]], None]"
T = TypeVar("T")
Items: TypeAlias = Iterable[T] | AsyncIterable[T]


class MapArguments(TypedDict, total=False):
    """The options of a map, for editors and type checkers.

    Attributes:
        outputs: names of the outputs of each request; all outputs of the model when None.
        timeout: the most seconds of each request; None for no limit.
        progress: called with the number of results so far, and of items (None if it is not known).
    """

    outputs: Sequence[str] | None
    timeout: float | None
    progress: Callable[[int, int | None], None] | None


class EachArguments(TypedDict, total=False):
    """The options of each request of a map."""

    outputs: Sequence[str] | None
    timeout: float | None


class Counted:
    """The options of a map; calls ``progress`` with the number of results so far, and of all items where it is known.

    Args:
        items: the items.
        options: the options.

    Attributes:
        each: the options of each request.

    Raises:
        InputError: an option is unknown, or ``progress`` is not a function.
    """

    def __init__(self, items: object, options: MapArguments) -> None:
        check_names(options, [*MapArguments.__annotations__, "ordered"])
        self._progress = options.get("progress")
        if self._progress is not None and not callable(self._progress):
            raise InputError(f"progress must be a function, not {shown(self._progress)}")
        self._total = len(items) if isinstance(items, Sized) else None
        self._done = 0
        self.each: EachArguments = {"outputs": options.get("outputs"), "timeout": options.get("timeout")}

    def __call__(self, result: T) -> T:
        """Count a result, and return it."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
        return result


def in_order(
    items: Iterable[T], submit: Callable[[T], Future[Outputs]], window: int, counted: Counted, later: Later
) -> Iterator[Outputs]:
    """The results in the order of the items. When the reader stops, or a request fails, the others are cancelled.

    Args:
        items: the items.
        submit: sends the request of an item.
        window: the most items between the source and the reader.
        counted: counts the results.
        later: calls a function in another thread. The garbage collector may end an iterator that was not read to its
            end, at any place, also where its thread holds a lock.
    """
    pending: deque[Future[Outputs]] = deque()
    try:
        for item in items:
            pending.append(submit(item))
            while len(pending) >= window or (pending and pending[0].done()):
                yield counted(_first(pending))
        while pending:
            yield counted(_first(pending))
    finally:
        _cancel(pending, later)


def as_they_come(
    items: Iterable[T], submit: Callable[[T], Future[Outputs]], window: int, counted: Counted, later: Later
) -> Iterator[tuple[int, Outputs]]:
    """The results as they come, each with the position of its item; otherwise as :func:`in_order`."""
    done: SimpleQueue[Future[Outputs]] = SimpleQueue()
    positions: dict[Future[Outputs], int] = {}

    def next_done() -> tuple[int, Outputs]:
        future = done.get()
        return positions.pop(future), counted(future.result())

    try:
        for position, item in enumerate(items):
            future = submit(item)
            positions[future] = position
            future.add_done_callback(done.put)
            while len(positions) >= window or not done.empty():
                yield next_done()
        while positions:
            yield next_done()
    finally:
        _cancel(positions, later)


def _cancel(futures: Iterable[Future[Outputs]], later: Later) -> None:
    for future in futures:
        if not future.done():
            later(future.cancel)


def _first(pending: deque[Future[Outputs]]) -> Outputs:
    """Wait for the first result, and remove it; a wait that is interrupted leaves it, so that it is cancelled."""
    result = pending[0].result()
    pending.popleft()
    return result


class AsyncMap:
    """Sends the items of a source into a pipeline from an event loop, and collects the results.

    A task takes the items, each when there is room for it and when the inputs of the one before were copied. So a
    source may reuse a buffer, and may wait for results.

    Args:
        items: an iterable or an asynchronous iterable.
        submit: sends the request of an item, and returns the future of its result once the inputs were copied.
        window: the most items between the source and the reader.
        counted: counts the results.
    """

    def __init__(
        self,
        items: Items[T],
        submit: Callable[[T], Awaitable[asyncio.Future[Outputs]]],
        window: int,
        counted: Counted,
    ) -> None:
        self._items = items
        self._submit = submit
        self._counted = counted
        self._room = asyncio.Semaphore(window)
        self._positions: dict[asyncio.Future[Outputs], int] = {}
        self._next: asyncio.Queue[asyncio.Future[Outputs] | Exception | None] = asyncio.Queue()  # None: no more

    async def in_order(self) -> AsyncIterator[Outputs]:
        """The results in the order of the items. An error of the source comes after the results before it."""
        async with aclosing(self._futures(self._next.put_nowait)) as futures:
            async for future in futures:
                result = await future
                self._take(future)
                yield self._counted(result)

    async def as_they_come(self) -> AsyncIterator[tuple[int, Outputs]]:
        """The results as they come, each with the position of its item."""
        async with aclosing(self._futures(lambda sent: sent.add_done_callback(self._next.put_nowait))) as futures:
            async for future in futures:
                result = future.result()
                yield self._take(future), self._counted(result)

    def _take(self, future: asyncio.Future[Outputs]) -> int:
        """A result was taken, so there is room for another item; returns the position of its item."""
        self._room.release()
        return self._positions.pop(future)

    async def _futures(
        self, sent: Callable[[asyncio.Future[Outputs]], object]
    ) -> AsyncGenerator[asyncio.Future[Outputs], None]:
        """The futures of the requests, as ``sent`` puts them into the queue. At the end, the others are cancelled."""
        feeding = asyncio.create_task(self._feed(sent))
        try:
            while (found := await self._next.get()) is not None:
                if isinstance(found, Exception):
                    raise found
                yield found
        finally:
            feeding.cancel()
            for future in self._positions:
                future.cancel()
            await asyncio.gather(feeding, *self._positions, return_exceptions=True)

    async def _feed(self, sent: Callable[[asyncio.Future[Outputs]], object]) -> None:
        """Send a request for each item; then wait for those under way, and put the end into the queue."""
        source, position, error = _each(self._items), 0, None
        try:
            while True:
                await self._room.acquire()
                item = await anext(source)
                future = await self._submit(item)
                self._positions[future] = position
                position += 1
                sent(future)
        except StopAsyncIteration:
            if running := [future for future in self._positions if not future.done()]:
                await asyncio.wait(running)
        except Exception as problem:
            error = problem
        finally:
            await source.aclose()
        self._next.put_nowait(error)


async def _each(items: Items[T]) -> AsyncGenerator[T, None]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
        return
    for item in items:
        yield item
        await asyncio.sleep(0)  # a source that is never waited for does not keep the loop from others
