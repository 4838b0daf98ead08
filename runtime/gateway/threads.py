"""The threads beside the event loop, for work that takes long, so that other requests continue meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

_PARSED_BYTES = 256 << 10
_COPIED_BYTES = 4 << 20

P = ParamSpec("P")
T = TypeVar("T")


def takes_long(*, parsed_bytes: int = 0, copied_bytes: int = 0) -> bool:
    """True when work belongs in a thread of its own: it takes about a millisecond or more.

    Args:
        parsed_bytes: Bytes that are looked at one by one, as JSON and strings are.
        copied_bytes: Bytes that are only copied.
    """
    return parsed_bytes > _PARSED_BYTES or copied_bytes > _COPIED_BYTES


class Workers:
    """The threads beside the event loop.

    Args:
        threads: Number of threads. Few, so that only few large requests are decoded at once.
    """

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="gateway")

    async def run(self, long: bool, work: Callable[P, T], *args: P.args, **keywords: P.kwargs) -> T:
        """Do some work: in a thread if it is ``long``, otherwise at once."""
        if not long:
            return work(*args, **keywords)
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: work(*args, **keywords))

    def close(self) -> None:
        """Start no more work; do not wait for running work."""
        self._executor.shutdown(wait=False, cancel_futures=True)
