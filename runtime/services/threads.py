"""The threads of a worker, in which the user's plain methods run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import copy_context
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(work: Callable[P, T], *args: P.args, **keywords: P.kwargs) -> T:
    """Do some work in one of the event loop's threads.

    A thread cannot be stopped: when the caller is cancelled, this ends only when the work has.
    """
    context = copy_context()

    def run() -> T:
        try:
            return context.run(work, *args, **keywords)
        except StopIteration as error:  # which no future can hold
            raise RuntimeError("StopIteration was raised outside an iterator") from error

    running = asyncio.get_running_loop().run_in_executor(None, run)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        if not running.done():
            await asyncio.wait([running])
        raise
