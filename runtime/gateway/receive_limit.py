"""A limit on the messages of unknown size that arrive at once, as gRPC's do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from runtime.gateway.errors import TooSlow

T = TypeVar("T")

PATIENCE_S = 10.0
"""Longest time for which a message may arrive while others wait for its place."""


class ReceiveLimit:
    """Lets a number of messages arrive at once. While others wait, a message has :data:`PATIENCE_S` to arrive.

    Args:
        places: Number of messages that may arrive at once.
    """

    def __init__(self, places: int) -> None:
        self._places = asyncio.Semaphore(places)
        self._arriving: set[asyncio.Timeout] = set()
        self._waiting = 0

    async def receive(self, read: Callable[[], Awaitable[T]]) -> T:
        """Read a message in a place. Waits until one is free.

        Raises:
            TooSlow: The message took longer than :data:`PATIENCE_S` while others waited.
        """
        if self._places.locked():
            self._hurry()
            self._waiting += 1
            try:
                await self._places.acquire()
            finally:
                self._waiting -= 1
        else:
            await self._places.acquire()
        try:
            async with asyncio.timeout(PATIENCE_S if self._waiting else None) as limit:
                self._arriving.add(limit)
                try:
                    return await read()
                finally:
                    self._arriving.discard(limit)
        except TimeoutError as error:
            raise TooSlow(f"the message was not whole after {PATIENCE_S:g} s, and others waited") from error
        finally:
            self._places.release()

    def _hurry(self) -> None:
        """Give every arriving message that has no time limit one, since another message waits."""
        end = asyncio.get_running_loop().time() + PATIENCE_S
        for limit in self._arriving:
            if limit.when() is None:
                limit.reschedule(end)
