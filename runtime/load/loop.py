"""One event loop that sends the requests of a load when they are due."""

from __future__ import annotations

import asyncio
import select
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from runtime.load.driver import Driver, LoadRequest
from runtime.load.patterns import Pattern
from runtime.load.point import LoadPoint, summarise
from runtime.load.target import NOTHING, EndDetail, Ended, LoadTarget
from runtime.load.windows import Measuring

Progress = Callable[[Driver], None]
_PATIENCE = 2  # times the longest answer so far, which the last requests are awaited for


class _PreciseSelector(selectors.EpollSelector):
    """Waits to the microsecond. epoll alone rounds up to milliseconds, which would be added to each request's time."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0:
            select.select([self.fileno()], (), (), timeout)
            timeout = 0
        return super().select(timeout)


def precise_loop() -> asyncio.AbstractEventLoop:
    """An event loop whose timers are exact to the microsecond."""
    return asyncio.SelectorEventLoop(_PreciseSelector())


def measure(
    target: LoadTarget, pattern: Pattern, rules: Measuring | None = None, *, progress: Progress = lambda _: None
) -> LoadPoint:
    """Send one load to a target, and measure how it answers.

    Ctrl-C ends the measurement; what was measured so far is the result.

    Args:
        target: what the load is sent to. It is opened and closed.
        pattern: when requests start.
        rules: how to measure; the defaults when None.
        progress: called now and then with the state of the measurement.

    Raises:
        InputError: a number is out of range.
        OnnxsplitError: the target cannot be opened.
    """
    rules = rules or Measuring()
    pattern.check()
    rules.check()
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        return runner.run(_measure(target, pattern, rules, progress))


async def _measure(target: LoadTarget, pattern: Pattern, rules: Measuring, progress: Progress) -> LoadPoint:
    await target.open()
    try:
        return await _Run(target, pattern, rules, progress).result()
    finally:
        await target.close()


class _Run:
    """One measurement in a running loop."""

    def __init__(self, target: LoadTarget, pattern: Pattern, rules: Measuring, progress: Progress) -> None:
        self._target, self._pattern, self._rules, self._progress = target, pattern, rules, progress
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._driver = Driver(pattern, rules, time.perf_counter_ns())
        self._ends: deque[tuple[LoadRequest, int, str | None, EndDetail]] = deque()
        self._planned = False  # whether a turn is about to run
        self._timer: asyncio.TimerHandle | None = None
        self._over = asyncio.Event()  # no more requests start
        self._answered = asyncio.Event()  # and none is in flight
        self._windows = 0

    async def result(self) -> LoadPoint:
        begun_ns, used_ns = time.perf_counter_ns(), time.process_time_ns()
        self._turn()
        interrupted = False
        try:
            await self._over.wait()
        except asyncio.CancelledError:
            interrupted = True
            self._driver.stop()
        now_ns = time.perf_counter_ns()
        cores = (time.process_time_ns() - used_ns) / (now_ns - begun_ns)
        if not interrupted:
            try:
                patience_s = max(self._rules.drain_s, _PATIENCE * self._driver.service.most / 1e9)
                async with asyncio.timeout(patience_s):  # wait_for may lose an interrupt
                    await self._answered.wait()
            except TimeoutError:
                pass
            except asyncio.CancelledError:
                interrupted = True
        if self._timer is not None:
            self._timer.cancel()
        return summarise(
            self._driver, self._pattern, self._rules, now_ns=now_ns, client_cores=cores, interrupted=interrupted
        )

    def _ended(self, request: LoadRequest) -> Ended:
        """What the target calls at the end of a request, in any thread."""

        def ended(failure: str | None = None, detail: EndDetail = NOTHING) -> None:
            self._ends.append((request, time.perf_counter_ns(), failure, detail))
            if self._planned:
                return
            self._planned = True
            if threading.get_ident() == self._thread:
                self._loop.call_soon(self._turn)
            else:
                with suppress(RuntimeError):  # the loop has ended
                    self._loop.call_soon_threadsafe(self._turn)

        return ended

    def _turn(self) -> None:
        """Record the requests that ended, start those that are due, and plan the next turn."""
        self._planned = False
        while self._ends:
            self._driver.ended(*self._ends.popleft())
        now_ns = time.perf_counter_ns()
        for request in self._driver.due(now_ns):
            self._driver.sent(request, time.perf_counter_ns())
            self._target.start(request.number, self._ended(request))
        if self._driver.complete > self._windows:
            self._windows = self._driver.complete
            self._progress(self._driver)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wake_ns = self._driver.wake_ns
        if wake_ns is not None:
            delay_s = max(0.0, (wake_ns - time.perf_counter_ns()) / 1e9)
            self._timer = self._loop.call_later(delay_s, self._turn)
            return
        self._over.set()
        if not self._driver.outstanding and not self._ends:
            self._answered.set()
