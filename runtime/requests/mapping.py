"""Runs a request for each item of an iterable, with a bounded number of items between the source and the reader.

    source -> at most ``window`` items: waiting, in the pipeline, or answered and not yet taken -> reader

The next item is taken from the source when the reader has taken a result, so a slow reader holds the source back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sized
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

from onnxsplit.tensors import Array

Outputs: TypeAlias = "dict[str, Array]"
Progress: TypeAlias = "Callable[[int, int | None], None]"
T = TypeVar("T")


class Counted:
    """Calls ``progress`` with the number of results so far, and of all items where it is known."""

    def __init__(self, items: object, progress: Progress | None) -> None:
        self._total = len(items) if isinstance(items, Sized) else None
        self._progress = progress
        self._done = 0

    def __call__(self, result: T) -> T:
        """Count a result, and return it."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
        return result


def in_order(
    items: Iterable[T], submit: Callable[[T], Future[Outputs]], window: int, counted: Counted
) -> Iterator[Outputs]:
    """The results in the order of the items. When the reader stops, or a request fails, the others are cancelled."""
    pending: deque[Future[Outputs]] = deque()
    try:
        for item in items:
            pending.append(submit(item))
            while len(pending) >= window or (pending and pending[0].done()):
                yield counted(_first(pending))
        while pending:
            yield counted(_first(pending))
    finally:
        for future in pending:
            future.cancel()


def as_they_come(
    items: Iterable[T], submit: Callable[[T], Future[Outputs]], window: int, counted: Counted
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
        for future in positions:
            future.cancel()


async def in_order_async(
    items: Iterable[T] | AsyncIterable[T],
    run: Callable[[T], Coroutine[Any, Any, Outputs]],
    window: int,
    counted: Counted,
) -> AsyncIterator[Outputs]:
    """The same as :func:`in_order`, for an event loop."""
    pending: deque[asyncio.Task[Outputs]] = deque()
    try:
        async for item in _each(items):
            pending.append(asyncio.create_task(run(item)))
            while len(pending) >= window or (pending and pending[0].done()):
                yield counted(await pending[0])
                pending.popleft()
        while pending:
            yield counted(await pending[0])
            pending.popleft()
    finally:
        await _cancelled(pending)


async def as_they_come_async(
    items: Iterable[T] | AsyncIterable[T],
    run: Callable[[T], Coroutine[Any, Any, Outputs]],
    window: int,
    counted: Counted,
) -> AsyncIterator[tuple[int, Outputs]]:
    """The same as :func:`as_they_come`, for an event loop."""
    done: asyncio.Queue[asyncio.Task[Outputs]] = asyncio.Queue()
    positions: dict[asyncio.Task[Outputs], int] = {}

    async def next_done() -> tuple[int, Outputs]:
        task = await done.get()
        return positions.pop(task), counted(task.result())

    try:
        position = 0
        async for item in _each(items):
            task = asyncio.create_task(run(item))
            positions[task] = position
            task.add_done_callback(done.put_nowait)
            position += 1
            while len(positions) >= window or not done.empty():
                yield await next_done()
        while positions:
            yield await next_done()
    finally:
        await _cancelled(positions)


def _first(pending: deque[Future[Outputs]]) -> Outputs:
    """Wait for the first result, and remove it; a wait that is interrupted leaves it, so that it is cancelled."""
    result = pending[0].result()
    pending.popleft()
    return result


async def _cancelled(tasks: Iterable[asyncio.Task[Outputs]]) -> None:
    """Cancel the tasks, and wait until they have ended."""
    present = list(tasks)
    for task in present:
        task.cancel()
    await asyncio.gather(*present, return_exceptions=True)


async def _each(items: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
        return
    for item in items:
        yield item
        await asyncio.sleep(0)  # a source that is never waited for does not keep the loop from others
