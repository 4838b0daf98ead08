"""Which requests of a load start now, and what their ends mean. It takes and returns values; the loop is elsewhere."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from runtime.load.histogram import TimeHistogram
from runtime.load.patterns import ClosedLoop, OpenLoop, Pattern
from runtime.load.target import NOTHING, EndDetail
from runtime.load.windows import LoadWindow, Measuring, is_overwhelmed, is_refused, is_stable

MOST_OUTSTANDING = 100_000
"""The most requests in flight. Further ones that are due count as failures, so that memory is bounded."""

NOT_SENT = f"not sent, because {MOST_OUTSTANDING:,} requests were in flight"
_BURST = 64  # requests started at once, so that a late generator still reads answers
_ONE_WINDOW_NS = 1 << 62  # where a number of requests is measured instead of windows
_SILENCE_NS = 300_000_000_000  # without any end, after which a load of a number of requests ends
_PAUSE_NS = 10_000_000  # after a failure in a closed loop, so that a dead server is not asked as fast as possible


@dataclass(slots=True)
class LoadRequest:
    """One request.

    Attributes:
        number: counts the requests of a load from 0.
        due_ns: when it should have started: the schedule's time in an open loop, the time it was sent in a closed one.
        sent_ns: when it was handed to the target.
    """

    number: int
    due_ns: int
    sent_ns: int


class Driver:
    """Decides when requests of one load start, and records how they end. All times are of one clock, in ns.

    Args:
        pattern: when requests start.
        rules: how the load is measured.
        now_ns: the present time, at which the load begins.

    Attributes:
        outstanding: number of requests in flight.
        windows: the windows so far. Requests of the warm-up are in none.
        complete: number of windows that are over.
        over: whether the measurement has ended; no request starts after that.
        stable: whether the last windows agreed.
        begins_ns: when measuring begins.
        last_end_ns: when the last answer came.
        service: times of all answers from when their requests were sent, those of the warm-up included.
    """

    def __init__(self, pattern: Pattern, rules: Measuring, now_ns: int) -> None:
        self._pattern = pattern
        self._rules = rules
        self._begun_ns = now_ns
        self._width_ns = max(1, round(rules.window_s * 1e9)) if rules.requests is None else _ONE_WINDOW_NS
        self._number = self._measured = 0
        self._schedule: Iterator[int] = iter(())
        self._ready: list[int] = []  # a heap of the times at which requests of a closed loop may start
        self.begins_ns = self.last_end_ns = self._heard_ns = now_ns + round(rules.warmup_s * 1e9)
        self.outstanding = self.complete = 0
        self.windows: list[LoadWindow] = []
        self.service = TimeHistogram()
        self.over = self.stable = False
        match pattern:
            case OpenLoop():
                self._schedule = pattern.due_ns()
                self._next_ns = now_ns + next(self._schedule)
            case ClosedLoop():
                self._ready = [now_ns] * pattern.concurrency

    @property
    def wake_ns(self) -> int | None:
        """When :meth:`due` has something to do next, apart from requests that end; None when the load is over."""
        if self.over:
            return None
        edge = self._edge_ns(self.complete + 1)
        if self._rules.requests is not None:
            edge = min(edge, self._heard_ns + _SILENCE_NS)
        if isinstance(self._pattern, OpenLoop):
            return min(edge, self._next_ns)
        return min(edge, self._ready[0]) if self._ready else edge

    def due(self, now_ns: int) -> list[LoadRequest]:
        """Take the requests that start now, at most a few at once; closes the windows that are over."""
        self._close_windows(now_ns)
        if self._rules.requests is not None and now_ns >= self._heard_ns + _SILENCE_NS:
            self.over = True
        started: list[LoadRequest] = []
        while len(started) < _BURST and not self.over and (due_ns := self._take(now_ns)) is not None:
            window = self._window_of(due_ns)
            if window is not None:
                window.due += 1
                self._measured += 1
            if self.outstanding >= MOST_OUTSTANDING:
                if window is not None:
                    window.failures[NOT_SENT] += 1
            else:
                started.append(LoadRequest(self._number, due_ns, now_ns))
                self.outstanding += 1
            self._number += 1
            self.over = self._measured == self._rules.requests
        return started

    def sent(self, request: LoadRequest, now_ns: int) -> None:
        """Record when a request was handed to the target, which in a closed loop is also when it was due."""
        request.sent_ns = now_ns
        if isinstance(self._pattern, ClosedLoop):
            request.due_ns = now_ns

    def ended(
        self,
        request: LoadRequest,
        end_ns: int,
        failure: str | None = None,
        detail: EndDetail = NOTHING,
    ) -> None:
        """Record the end of a request.

        Args:
            request: one that :meth:`due` returned.
            end_ns: when its answer came, or when it failed.
            failure: the kind of its failure; None for an answer.
            detail: what else is known of it.
        """
        self.outstanding -= 1
        self._heard_ns = max(self._heard_ns, end_ns)
        if isinstance(self._pattern, ClosedLoop):
            heapq.heappush(self._ready, end_ns + (_PAUSE_NS if failure else 0))
        window = self._window_of(request.due_ns)
        if failure is not None:
            if window is not None:
                window.failures[failure] += 1
                window.messages.setdefault(failure, detail.message)
            return
        self.service.add(end_ns - request.sent_ns)
        if (came := self._window_of(end_ns)) is not None:
            came.answered += 1
            came.counts.update(detail.counts)
            self.last_end_ns = max(self.last_end_ns, end_ns)
        if window is None:
            return
        window.latency.add(end_ns - request.due_ns)
        window.service.add(end_ns - request.sent_ns)
        window.lag.add(request.sent_ns - request.due_ns)
        window.add_times(detail.times)

    def stop(self) -> None:
        """End the measurement now; what was measured stays."""
        self.over = True

    def _take(self, now_ns: int) -> int | None:
        """Take the time of the next request that is due; None when none is."""
        if isinstance(self._pattern, OpenLoop):
            due_ns = self._next_ns
            if due_ns > now_ns:
                return None
            self._next_ns = self._begun_ns + next(self._schedule)
            return due_ns
        if not self._ready or self._ready[0] > now_ns:
            return None
        heapq.heappop(self._ready)
        return now_ns

    def _edge_ns(self, number: int) -> int:
        """When a window begins."""
        return self.begins_ns + number * self._width_ns

    def _window_of(self, time_ns: int) -> LoadWindow | None:
        """The window of a time; None for the warm-up."""
        number = (time_ns - self.begins_ns) // self._width_ns
        if number < 0:
            return None
        while len(self.windows) <= number:
            self.windows.append(LoadWindow())
        return self.windows[number]

    def _close_windows(self, now_ns: int) -> None:
        """Close the windows whose end has come, and end the measurement when it is stable, or hopeless."""
        while not self.over and now_ns >= self._edge_ns(self.complete + 1):
            window = self._window_of(self._edge_ns(self.complete))
            assert window is not None
            window.outstanding = self.outstanding
            if isinstance(self._pattern, OpenLoop):
                late_ns = max(0, self._edge_ns(self.complete + 1) - self._next_ns)
                window.unsent = round(late_ns * self._pattern.per_s / 1e9)
            self.complete += 1
            done = self.windows[: self.complete]
            self.stable = is_stable(done, self._rules)
            hopeless = is_overwhelmed(done) or is_refused(done)
            self.over = self.stable or hopeless or self.complete >= self._rules.most_windows
