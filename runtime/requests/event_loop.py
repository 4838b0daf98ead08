"""Requests of event loops: nothing here blocks the loop that the caller runs in.

    prepare -> wait in line -> enter -> wait for the answer
    |                          |
    '-- in a thread where it takes long: tensors are converted, and copied into shared memory

Requests of event loops and of threads wait in one line.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import Protocol, TypeVar

from onnxsplit.tensors import Array
from runtime.requests.admission import Admission
from runtime.requests.entrance import Entrance
from runtime.requests.request import Enterable

T = TypeVar("T")

_COPIED_BYTES = 1 << 20  # copying more takes about a tenth of a millisecond
_THREADS = 2


class HasEntrance(Protocol):
    """A plan that runs."""

    @property
    def entrance(self) -> Entrance:
        """Checks and admits its requests."""


class Doorway(Protocol):
    """Leads to the plan that runs now; see :class:`runtime.recut.door.Door`."""

    @property
    def admission(self) -> Admission:
        """Limits the requests in flight."""

    def entering(self) -> AbstractContextManager[HasEntrance]:
        """The plan that runs now, which stays while a request enters it."""

    def check_open(self) -> None:
        """Check that the pipeline can be used; raises as :meth:`.Entrance.check_open`."""


class EventLoopEntrance:
    """The entrance of a pipeline for callers in event loops. Its methods can be called from any number of loops.

    Args:
        door: leads to the plan that runs.
    """

    def __init__(self, door: Doorway) -> None:
        self._door = door
        self._admission = door.admission
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="pipeline-inputs")

    async def run(self, inputs: object, outputs: object, deadline_ns: int | None) -> dict[str, Array]:
        """Run one request; see :meth:`runtime.pipeline.Pipeline.arun`."""
        return await (await self.submit(inputs, outputs, deadline_ns))

    async def submit(
        self, inputs: object, outputs: object, deadline_ns: int | None
    ) -> asyncio.Future[dict[str, Array]]:
        """Send one request; when this has returned, the inputs may be changed. Returns the future of its outputs."""
        with self._door.entering() as running:
            return await self._submit(running.entrance, inputs, outputs, deadline_ns)

    async def _submit(
        self, entrance: Entrance, inputs: object, outputs: object, deadline_ns: int | None
    ) -> asyncio.Future[dict[str, Array]]:
        entrance.check_open()
        if entrance.is_ordinary(inputs, outputs):
            request = entrance.prepare(inputs, outputs, deadline_ns)
        else:
            preparing = self._in_thread(lambda: entrance.prepare(inputs, outputs, deadline_ns))
            request = await self._until(deadline_ns, preparing)
        if not request.future.done():
            try:
                await self._admit(request, deadline_ns)
                await self._enter(request)
            except GeneratorExit:  # the task was dropped, perhaps by the garbage collector, which may hold a lock
                entrance.later(request.abandon)
                raise
            except BaseException:
                request.abandon()
                raise
        return asyncio.wrap_future(request.future)

    async def _enter(self, request: Enterable) -> None:
        """Send a request that was admitted."""
        if request.whole_size <= _COPIED_BYTES:
            request.enter()
            return
        entering = asyncio.ensure_future(self._in_thread(request.enter))
        try:
            await asyncio.shield(entering)
        except asyncio.CancelledError:  # the thread goes on, and the request is abandoned again when it has sent it
            entering.add_done_callback(lambda _: request.abandon())
            raise

    async def _admit(self, request: Enterable, deadline_ns: int | None) -> None:
        """Wait until a request is admitted."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()

        def wake() -> None:
            if not turn.done():
                turn.set_result(None)

        def admitted() -> bool:
            try:
                loop.call_soon_threadsafe(wake)
            except RuntimeError:  # the loop was closed
                return False
            return True

        if not self._admission.join(request.place, request.size, admitted):
            await self._until(deadline_ns, turn)

    async def _until(self, deadline_ns: int | None, waiting: Awaitable[T]) -> T:
        """Wait for something, at most until a deadline.

        Raises:
            DeadlineExceeded: it did not come in time.
        """
        limit_s = None if deadline_ns is None else max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9)
        try:
            async with asyncio.timeout(limit_s):
                return await waiting
        except TimeoutError:
            raise self._admission.out_of_time() from None

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            future = self._threads.submit(work)
        except RuntimeError:
            self._door.check_open()  # the threads end after the entrance is closed
            raise
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the threads; returns at once."""
        self._threads.shutdown(wait=False)


async def off_the_loop(work: Callable[[], T], give_up: Callable[[], None] | None = None) -> T:
    """Run blocking work in a thread of its own, which may take as long as it likes.

    Args:
        work: what to run.
        give_up: is called when the present task is cancelled, and makes ``work`` return soon. The cancellation goes on
            when it has.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # there is a result when there is no error

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as problem:
            error = problem
        with suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="pipeline", daemon=True).start()
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        if give_up is not None:
            give_up()
        await asyncio.wait((done,))
        with suppress(BaseException):
            done.result()
        raise
