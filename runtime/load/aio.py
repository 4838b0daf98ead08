"""Targets that send over HTTP connections of one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from msgspec import Struct

from onnxsplit.errors import MissingDependency, one_line
from runtime.load.target import EndDetail, Ended, LoadTarget

MOST_CONNECTIONS = 1000
"""The most connections at once. Requests above wait for one, and that time is part of their latency."""


class Post(Struct, frozen=True):
    """A request that is sent many times."""

    body: bytes
    headers: dict[str, str]


class ConnectionTarget(LoadTarget):
    """Sends each request on a free connection, or on a new one.

    Attributes:
        session: sends requests; set while the target is open.
    """

    def __init__(self) -> None:
        try:
            import aiohttp
        except ImportError as error:
            raise MissingDependency("load over HTTP needs one more package: pip install 'onnxsplit[load]'") from error
        self._aiohttp = aiohttp
        self._tasks: set[asyncio.Task[None]] = set()
        self.session: Any = None

    async def open(self) -> None:
        """Prepare the connections; each is made by the first request that needs it."""
        self.session = self._aiohttp.ClientSession(
            connector=self._aiohttp.TCPConnector(limit=MOST_CONNECTIONS),
            timeout=self._aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            trust_env=False,
        )

    async def close(self) -> None:
        """Give up the requests in flight, and close the connections."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.session.close()

    def run(self, request: Coroutine[Any, Any, None], ended: Ended) -> None:
        """Run one request, which calls ``ended`` unless it raises an error of its connection."""
        task = asyncio.get_running_loop().create_task(self._guarded(request, ended))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, request: Coroutine[Any, Any, None], ended: Ended) -> None:
        try:
            await request
        except Exception as error:  # of the connection, or of an answer that may be anything
            ended(_kind(error), EndDetail(message=one_line(error, 300)))


def _kind(error: Exception) -> str:
    """The kind of an error of a connection."""
    inner = getattr(error, "os_error", error)
    match inner:
        case ConnectionRefusedError():
            return "connection refused"
        case ConnectionError():
            return "connection lost"
        case _:
            return type(error).__name__
