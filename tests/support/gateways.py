"""A gateway in the process of the test, whose models and pipelines a test can look at."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from runtime import Pipeline
from runtime.gateway.access import AccessControl
from runtime.gateway.models.version import Version, find_versions
from runtime.gateway.serve_options import ServeOptions
from runtime.gateway.server import Serving, _Gateway, listen


@asynccontextmanager
async def gateway(
    plan: Path, *, running: dict[str, Any] | None = None, sent_ahead: int | None = None, **options: Any
) -> AsyncIterator[tuple[str, Version, Callable[[], None]]]:
    """Serve a plan in the present event loop.

    Args:
        plan: its folder.
        running: options of the pipeline.
        sent_ahead: bytes that the kernel keeps for a client that does not read; None for its own choice.
        options: those of the gateway.

    Yields:
        The URL, the model, and a function that asks the gateway to stop, as SIGTERM does.
    """
    versions = find_versions([plan])
    chosen = ServeOptions(http_port=0, grpc_port=None, **{"drain_s": 5.0, **options})

    def start(folder: Path, abandoned: Callable[[], bool]) -> Pipeline:
        return Pipeline.launch(folder, abandoned=abandoned, threads=1, **(running or {}))

    with listen(chosen.host, 0) as listener:
        if sent_ahead is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sent_ahead)
        serving = asyncio.get_running_loop().create_future()
        inside = _Gateway(chosen, versions, start, AccessControl())

        def ready(where: Serving) -> None:
            serving.set_result(where.http)

        task = asyncio.ensure_future(inside.run(listener, ready, lambda _: None))
        await asyncio.wait((task, serving), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        try:
            yield await serving, versions[0], inside._stop
        finally:
            inside._stop()
            await task


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
