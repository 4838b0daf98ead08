"""Opens a pipeline from an event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from runtime.errors import PipelineError
from runtime.requests.event_loop import off_the_loop


class _Closable(Protocol):
    async def aclose(self) -> None: ...


T = TypeVar("T", bound=_Closable)


class PipelineOpening(AbstractAsyncContextManager[T], Generic[T]):
    """What :meth:`runtime.pipeline.Pipeline.open` returns: it is awaited, or entered with ``async with``.

    Args:
        start: opens it; called in a thread of its own, with a function that says whether nobody wants it any more.
    """

    def __init__(self, start: Callable[[Callable[[], bool]], T]) -> None:
        self._start = start
        self._opened: T | None = None
        self._used = False

    def __await__(self) -> Generator[Any, None, T]:
        return self._open().__await__()

    async def __aenter__(self) -> T:
        self._opened = await self._open()
        return self._opened

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened.aclose()

    async def _open(self) -> T:
        if self._used:
            raise PipelineError("this was opened before; call Pipeline.open again for another pipeline")
        self._used = True
        abandoned = threading.Event()
        opened: list[T] = []

        def start() -> T:
            opened.append(self._start(abandoned.is_set))
            return opened[0]

        try:
            return await off_the_loop(start, abandoned.set)
        except BaseException:  # cancelled, perhaps when it was already open
            for one in opened:
                await one.aclose()
            raise
