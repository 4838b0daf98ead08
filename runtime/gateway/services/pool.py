"""The workers of one service, and the calls that they execute."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from onnxsplit.errors import InputError
from runtime.errors import Busy, DeadlineExceeded, LaunchFailed, ProtocolError, StageUnavailable
from runtime.gateway.counters import failure_reason
from runtime.gateway.errors import NotLoaded, client_message
from runtime.gateway.services.dispatch import Dispatch
from runtime.gateway.services.process import ServiceTarget, WorkerProcess
from runtime.logs import log_event
from runtime.services.messages import (
    Ask,
    Begin,
    CallEnded,
    CallEndpoint,
    CancelCall,
    Drop,
    More,
    ResponseHead,
    ResponsePart,
    ServiceDescription,
    Unusable,
    Up,
    error_of,
)

_log = logging.getLogger("runtime.gateway")
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.5, 30.0
_STABLE_S = 10.0  # a worker that lives longer is started again at once
_OVERDUE_S = 5.0  # for a call to stop after its time is up
_FAILURES = 3  # workers that end one after another before they are up; then calls are refused

AnswerAsk = Callable[[WorkerProcess, Ask, list[bytes]], Awaitable[None]]
"""Answers what a worker asks a model."""


class ServiceCall:
    """A call of an endpoint, for one ``async with`` block, within which its parts are taken.

    Attributes:
        message: what the worker is told, and the body.
        deaths: number of workers that have died while they executed it.
        begun: whether a part of the response was received.
    """

    def __init__(self, pool: ServicePool, message: CallEndpoint, body: bytes | bytearray) -> None:
        self.message = message
        self.body = body
        self.deaths = 0
        self.begun = False
        self._pool = pool
        self._parts: asyncio.Queue[tuple[ResponseHead | ResponsePart | CallEnded, bytes]] = asyncio.Queue()

    def give(self, part: ResponseHead | ResponsePart | CallEnded, data: bytes = b"") -> None:
        """A part was received, or the call is over."""
        self.begun = self.begun or isinstance(part, ResponseHead)
        self._parts.put_nowait((part, data))

    async def __aenter__(self) -> ServiceCall:
        self._pool.enter(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._pool.leave(self, error)

    async def head(self) -> ResponseHead:
        """The beginning of the response.

        Raises:
            OnnxsplitError: the call failed, or its time is up.
        """
        limit = self._pool.description.timeout
        try:
            async with asyncio.timeout(limit):
                part, _ = await self._parts.get()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{self._pool.description.name} has not begun to answer within its timeout of {limit:g} s"
            ) from error
        if isinstance(part, CallEnded):
            raise error_of(part.kind, part.message)
        assert isinstance(part, ResponseHead)
        return part

    async def parts(self) -> AsyncIterator[tuple[bytes, bool]]:
        """The parts of the response, and whether more follow. The worker sends the next when the last was taken.

        Raises:
            OnnxsplitError: the call failed.
        """
        while True:
            part, data = await self._parts.get()
            if isinstance(part, CallEnded):
                raise error_of(part.kind or "PipelineError", part.message or "the response ended early")
            assert isinstance(part, ResponsePart)
            yield data, part.more
            if not part.more:
                return
            self._pool.taken(self)


@dataclass
class ServiceCounters:
    """What has become of the calls of a service: by endpoint and outcome, their number and their seconds."""

    calls: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    restarts: int = 0

    def count(self, endpoint: str, outcome: str, seconds: float) -> None:
        """Count a call."""
        row = self.calls.setdefault((endpoint, outcome), [0, 0.0])
        row[0] += 1
        row[1] += seconds


class ServicePool:
    """The workers of one service.

    Args:
        target: where the service is found.
        description: what it is.
        folders: the folders of its models' plans, by its names for them.
        answer: answers what a worker asks a model.
        most_waiting: the most calls that wait for a worker; more are refused.
    """

    def __init__(
        self,
        target: ServiceTarget,
        description: ServiceDescription,
        folders: Callable[[], Mapping[str, str]],
        answer: AnswerAsk,
        most_waiting: int,
    ) -> None:
        self.description = description
        self.counters = ServiceCounters()
        self._target = target
        self._folders = folders
        self._answer = answer
        self._most_waiting = most_waiting
        self._dispatch: Dispatch[WorkerProcess, ServiceCall] = Dispatch(description.calls)
        self._calls: dict[int, ServiceCall] = {}
        self._begun: dict[ServiceCall, float] = {}
        self._sent: dict[int, ServiceCall] = {}  # that a worker executes, whether or not anybody waits for them
        self._overdue: set[ServiceCall] = set()  # that do not stop
        self._numbers = itertools.count(1)
        self._keeping: list[asyncio.Task[None]] = []
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changed = asyncio.Event()
        self._failures = 0
        self._trouble = "its workers are starting"
        self._closing = False

    # State

    @property
    def workers(self) -> int:
        """Number of workers that take calls."""
        return self._dispatch.workers

    @property
    def waiting(self) -> int:
        """Number of calls that wait for a worker."""
        return self._dispatch.waiting

    @property
    def executing(self) -> int:
        """Number of calls that workers execute."""
        return self._dispatch.executing

    def why_not(self) -> str | None:
        """Why a call would not be executed now; None when it would."""
        if self._closing:
            return "the server is stopping"
        return None if self.workers else f"no worker of {self.description.name} is up: {self._trouble}"

    # Life

    async def start(self) -> None:
        """Start the workers; returns when all are up.

        Raises:
            InputError, LaunchFailed: a worker cannot read the file or make the service.
        """
        self._keeping = [asyncio.ensure_future(self._keep()) for _ in range(self.description.workers)]
        await self._started
        if not self._closing:
            name, workers = self.description.name, self.description.workers
            log_event(_log, logging.INFO, "service loaded", service=name, workers=workers)

    def stop(self) -> None:
        """Take no more calls, and do not wait for workers that are starting."""
        self._closing = True
        if not self._started.done():
            self._started.set_result(None)

    async def close(self, patience_s: float) -> None:
        """Take no more calls, wait for those there are at most ``patience_s`` seconds, and end all workers."""
        self.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while self._calls:
                    self._changed.clear()
                    await self._changed.wait()
        for call in list(self._calls.values()):
            call.give(CallEnded(0, "PipelineClosed", "the server stopped before it had executed the call"))
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)

    async def _keep(self) -> None:
        """Keep one worker running. Its failure is an error only at the start of the service."""
        pause = 0.0
        while True:
            await asyncio.sleep(pause)
            begun = time.monotonic()
            try:
                await self._run()
            except Exception as error:
                if not self._started.done():
                    self._started.set_exception(error)
                    return
                self._trouble = client_message(error)
                lived = time.monotonic() - begun
                pause = 0.0 if lived > _STABLE_S else min(max(2 * pause, _FIRST_PAUSE_S), _MOST_PAUSE_S)
                self.counters.restarts += 1
                log_event(
                    _log, logging.ERROR, "worker ended", service=self.description.name, reason=self._trouble,
                    again_s=pause,
                )  # fmt: skip

    async def _run(self) -> None:
        """Run one worker to its end.

        Raises:
            OnnxsplitError: it has ended; the message says how.
        """
        worker = await WorkerProcess.start(self._target)
        asks: dict[int, asyncio.Task[None]] = {}
        up = False
        try:
            if await worker.described() != self.description:
                raise InputError(f"{self._target} has changed; start the server again to serve what it is now")
            worker.channel.send(Begin(dict(self._folders())))
            while (received := await worker.channel.receive()) is not None:
                message, frames = received
                if isinstance(message, Up):
                    up, self._failures = True, 0
                    self._dispatch.up(worker)
                    self._send_calls()
                    if self.workers == self.description.workers and not self._started.done():
                        self._started.set_result(None)
                elif isinstance(message, Unusable):
                    raise InputError(message.message)
                elif isinstance(message, Ask):
                    task = asks[message.ask] = asyncio.ensure_future(self._answer(worker, message, frames))
                    task.add_done_callback(lambda _, number=message.ask: asks.pop(number, None))  # type: ignore[misc]
                elif isinstance(message, Drop):
                    if (asked := asks.get(message.ask)) is not None:
                        asked.cancel()
                else:
                    self._told(message, frames)
            await worker.end()
            raise LaunchFailed(f"a worker of {self.description.name} {await worker.story()}")
        except ProtocolError as error:
            raise LaunchFailed(f"a worker of {self.description.name} sent what it must not: {error}") from error
        finally:
            for task in list(asks.values()):
                task.cancel()
            self._lost(worker, up=up)
            await asyncio.shield(worker.end())

    def _lost(self, worker: WorkerProcess, *, up: bool) -> None:
        """A worker has ended. Its calls are executed again, unless too many workers have died of them."""
        self._failures += not up
        calls = self._dispatch.down(worker)
        innocent = not self._overdue.isdisjoint(calls)  # it was killed for another call
        for call in calls:
            self._sent.pop(call.message.call, None)
            self._overdue.discard(call)
            call.deaths += not innocent
            if call.begun:
                call.give(CallEnded(0, "NodeFailed", "the worker that executed the call has died"))
            elif call.deaths >= self.description.attempts:
                again = "" if call.deaths == 1 else f"; {call.deaths} workers died of this call"
                call.give(CallEnded(0, "NodeFailed", f"the worker that executed the call has died{again}"))
            elif call.message.call in self._calls:
                self._dispatch.add(call, suspected=True)
        if self._failures >= _FAILURES and not self.workers:
            for call in list(self._calls.values()):
                call.give(CallEnded(0, "StageUnavailable", str(self.why_not())))
        self._send_calls()

    # Calls

    def call(self, endpoint: str, path: str, query: bytes, headers: Any, body: bytes | bytearray) -> ServiceCall:
        """A call, which begins with its ``async with`` block."""
        return ServiceCall(self, CallEndpoint(next(self._numbers), endpoint, path, query, headers), body)

    def enter(self, call: ServiceCall) -> None:
        """A call arrives.

        Raises:
            OnnxsplitError: it is refused.
        """
        if self._closing:
            raise NotLoaded("the server is stopping and takes no more requests")
        if self._failures >= _FAILURES and not self.workers:
            raise StageUnavailable(str(self.why_not()))
        if self.waiting >= self._most_waiting:
            raise Busy(f"{self.waiting} calls wait for {self.description.name}, as many as may (--max-queue)")
        self._calls[call.message.call] = call
        self._begun[call] = time.monotonic()
        self._dispatch.add(call)
        self._send_calls()

    def leave(self, call: ServiceCall, error: BaseException | None) -> None:
        """Nobody waits for a call any more: it was answered, it failed, or the client went away."""
        if (begun := self._begun.pop(call, None)) is None:
            return
        outcome = "success" if error is None else failure_reason(error)
        self.counters.count(call.message.endpoint, outcome, time.monotonic() - begun)
        self._calls.pop(call.message.call, None)
        worker = self._dispatch.worker_of(call)
        if worker is None:
            self._dispatch.over(call)
        elif error is not None:
            worker.channel.send(CancelCall(call.message.call))  # it has its place until the worker says that it is over
            if isinstance(error, DeadlineExceeded) and not call.begun:
                asyncio.get_running_loop().call_later(_OVERDUE_S, self._end_overdue, worker, call)
        self._changed.set()

    def taken(self, call: ServiceCall) -> None:
        """The client has taken the last part of a response."""
        if (worker := self._dispatch.worker_of(call)) is not None:
            worker.channel.send(More(call.message.call))

    def _end_overdue(self, worker: WorkerProcess, call: ServiceCall) -> None:
        """End a worker that has not stopped executing a call, once its other calls are over."""
        if self._dispatch.worker_of(call) is worker:
            name, endpoint = self.description.name, call.message.endpoint
            log_event(_log, logging.ERROR, "a call does not stop; its worker ends", service=name, endpoint=endpoint)
            self._overdue.add(call)
            self._dispatch.retire(worker)
            self._end_if_overdue(worker)

    def _end_if_overdue(self, worker: WorkerProcess) -> None:
        """End a retired worker that executes nothing, or nothing but what does not stop."""
        if self._dispatch.calls_of(worker) <= self._overdue:
            worker.kill()

    def _send_calls(self) -> None:
        while (found := self._dispatch.next()) is not None:
            call, worker = found
            try:
                worker.channel.send(call.message, [memoryview(call.body)])
            except InputError as error:
                self._dispatch.over(call)
                call.give(CallEnded(0, "InputError", str(error)))
            else:
                self._sent[call.message.call] = call

    def _told(self, message: ResponseHead | ResponsePart | CallEnded, frames: list[bytes]) -> None:
        call = self._calls.get(message.call)
        if call is not None:
            call.give(message, frames[0] if frames else b"")
        if isinstance(message, CallEnded) and (sent := self._sent.pop(message.call, None)) is not None:
            worker = self._dispatch.over(sent)
            if worker is not None and self._dispatch.is_retired(worker):
                self._end_if_overdue(worker)
            self._overdue.discard(sent)
            self._send_calls()
