"""Decides by load how many nodes a stage has, within its range. Pure: the caller gives figures and times.

    load      busy time of a stage's ready nodes over elapsed time, in nodes: 1.6 nodes were busy on average
    pressed   over the last ``up_after_s``, requests waited for three quarters of the time, and the nodes were busy for
              more than 60 %. Nodes that catch up, because fewer requests wait now than on average in that time, need
              no help. A node that is busy while nothing waits is no reason for another one
    slack     for ``down_after_s`` without a break, the load of the last ``up_after_s`` would have kept one node fewer
              busy for less than 50 %, and no request waited

    nodes --- pressed, and the host has room ---> nodes + 1        the most pressed stage, one at a time
    nodes --- slack ----------------------------> nodes - 1        one for each ``down_after_s``

Why this does not flap. A node is added only when n nodes have a load above 0.6 n, and removed from n + 1 only when the
load is below 0.5 n: under a steady load, no node that was added is removed again. Figures count from the last change of
the stage's nodes, so no decision rests on figures of another number of nodes, and two additions are at least
``up_after_s`` apart. A load that returns more often than every ``down_after_s`` breaks the slack each time, so the
nodes for its peaks stay. A load that is steady only over times much longer than these, as that of long requests, looks
like one that comes and goes. So if a node is added within four hours of a removal, that removal came too soon: the
stage then needs slack for twice the time, up to an hour, until four hours have passed without such a return.

Nodes that are not ready count against the range. While one starts, no other is added. One that is dead prevents
nothing, and goes first.

The host has room when the new node has memory, and processors. A node takes as many processors as its process was seen
to use, or to wait for, while it ran, at most its threads; until that was seen, its threads. The nodes of all stages
together must not take more processors than there are, and half of what the new node takes must be idle, because a
replica that only shares busy processors does not help. A stage that hardly uses processors, because it waits for
something else, needs no idle one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.balance.replicas import ReplicaRange

_BUSY = 0.6  # share of the time above which a stage is pressed; above _FITS, so that the new node is not removed again
_WAITED = 0.75  # share of the time in which requests waited, from which a stage is pressed
_FITS = 0.5  # share of the time below which one node fewer would be busy
_FALLS = 0.9  # nodes catch up when fewer requests wait now than this share of the mean number
_NOTICEABLE = 0.25  # a node that uses less than this part of a processor does not depend on idle ones
_SEEN_SHARE = 0.1  # nodes must have been busy for this share of the time for their use of processors to be known
_RETRY_S, _MOST_RETRY_S = 30.0, 600.0  # time without further tries after a node did not start, doubled each time
_LONGEST_BREAK_NS = 30 * 10**9  # between two looks; after a longer one, what was seen before does not count
_PARTS = 64  # parts of a time whose figures are kept apart, however often the caller looks
_REGRET_NS = 4 * 3600 * 10**9  # a node that is added within this time of a removal says that the removal came too soon
_MOST_SLACK_NS = 3600 * 10**9  # the time of slack is doubled up to this
_NEVER_NS = -(1 << 62)
_TELL_AGAIN_S = 60.0  # time between two decisions that say that the same stage cannot grow


@dataclass(frozen=True, kw_only=True)
class StageTerms:
    """What does not change while a stage runs.

    Attributes:
        replicas: the allowed numbers of nodes.
        threads: threads of each node's session.
        replica_bytes: memory that one more node takes.
    """

    replicas: ReplicaRange
    threads: int
    replica_bytes: int


@dataclass(frozen=True, kw_only=True)
class StageLoad:
    """What happened at a stage since the last look.

    Attributes:
        ready: nodes that take requests.
        pending: further nodes, which start, or wait to be started again.
        starting: those of the pending ones that are expected to be ready soon.
        busy_s: time in which the ready nodes had no room for more, all together.
        needed_s: processor time that their processes used or waited for.
        waiting: requests before the nodes now, without those that run.
    """

    ready: int
    pending: int
    starting: int
    busy_s: float
    needed_s: float
    waiting: float


@dataclass(frozen=True, kw_only=True)
class HostLoad:
    """What the host had left since the last look.

    Attributes:
        processors: processors that the nodes may use.
        idle_processors: how many of them had nothing to do, on average.
        free_bytes: memory that is free now.
    """

    processors: int
    idle_processors: float
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The number of nodes that a stage is to have; the present one where it cannot have more, with the reason."""

    stage: int
    before: int
    after: int
    reason: str

    def __str__(self) -> str:
        if self.before == self.after:
            return f"stage {self.stage} stays at {_replicas(self.before)}: {self.reason}"
        return f"stage {self.stage}: {self.before} to {_replicas(self.after)}: {self.reason}"


class Autoscaler:
    """Follows the load of all stages. Call :meth:`look` once or a few times per second.

    Args:
        terms: the terms of every stage.
        up_after_s: how long a stage must be pressed before it gets another node.
        down_after_s: how long a stage must have slack before it loses one.
    """

    def __init__(self, terms: Sequence[StageTerms], *, up_after_s: float = 3.0, down_after_s: float = 30.0) -> None:
        self._stages = [_Stage(each, up_after_s, down_after_s) for each in terms]
        self._looked_ns: int | None = None
        self._idle = _Window(int(up_after_s * 1e9))  # seconds in which processors were idle

    def look(self, now_ns: int, loads: Sequence[StageLoad], host: HostLoad) -> list[Decision]:
        """Take note of what happened since the last look; returns what to change.

        The caller carries out every decision whose numbers differ, and tells the outcome by the next loads: a node that
        is added is pending until it is ready, and :meth:`failed` says that it never will be.
        """
        for stage, load in zip(self._stages, loads, strict=True):
            stage.note(now_ns, load)
        if self._looked_ns is not None and now_ns > self._looked_ns:
            self._idle.add(self._looked_ns, now_ns, host.idle_processors * (now_ns - self._looked_ns) / 1e9)
        self._looked_ns = now_ns
        decisions = [
            Decision(stage=index, before=stage.count, after=stage.count - 1, reason=stage.why_fewer)
            for index, stage in enumerate(self._stages)
            if stage.has_slack(now_ns)
        ] or self._grow(now_ns, host)
        for decision in decisions:
            self._stages[decision.stage].decided(decision.after - decision.before, now_ns)
        return decisions

    def failed(self, stage: int, now_ns: int) -> float:
        """The node that was added to a stage did not start; returns the seconds until the next one may be added."""
        return self._stages[stage].back_off(now_ns)

    def _grow(self, now_ns: int, host: HostLoad) -> list[Decision]:
        pressed = [(index, stage) for index, stage in enumerate(self._stages) if stage.is_pressed(now_ns)]
        pressed.sort(key=lambda one: (-one[1].busy, -one[1].waiting, one[0]))
        told: list[Decision] = []
        for index, stage in pressed:
            obstacle = self._obstacle(stage, host)
            if obstacle is None:
                grown = Decision(stage=index, before=stage.count, after=stage.count + 1, reason=stage.why_more)
                return [*told, grown]
            if stage.may_tell(now_ns):
                reason = f"{stage.why_more}, but {obstacle}"
                told.append(Decision(stage=index, before=stage.count, after=stage.count, reason=reason))
        return told

    def _obstacle(self, stage: _Stage, host: HostLoad) -> str | None:
        """Why the host has no room for another node of a stage; None where it has."""
        starting = sum(each.starting * each.terms.replica_bytes for each in self._stages)  # they may not use it yet
        free_bytes = max(0, host.free_bytes - starting)
        if free_bytes < stage.terms.replica_bytes:
            return f"another node takes {_mib(stage.terms.replica_bytes)}, and {_mib(free_bytes)} are free"
        needed = stage.processors
        if needed < _NOTICEABLE:
            return None
        taken = sum((each.ready + each.starting) * each.processors for each in self._stages)
        if taken + needed > host.processors + 0.01:  # sums of measured values may be off in the last digits
            return f"the nodes take {taken:.3g} of {host.processors} processors, and another one takes {needed:.2g}"
        seconds, (idle_s,) = self._idle.sums()
        idle = idle_s / seconds
        if idle < needed / 2:
            return f"{idle:.2g} of {host.processors} processors are idle, and another node takes {needed:.2g}"
        return None


class _Window:
    """Sums of figures over the last ``span_ns``, in parts of at least a 64th of it."""

    def __init__(self, span_ns: int) -> None:
        self._span_ns = span_ns
        self._parts: deque[tuple[int, int, tuple[float, ...]]] = deque()  # from, to, the sums

    def add(self, from_ns: int, to_ns: int, *figures: float) -> None:
        """Add the figures of a time that follows what was added before."""
        if self._parts and to_ns - self._parts[-1][0] <= self._span_ns // _PARTS:
            from_ns, _, before = self._parts.pop()
            figures = tuple(map(sum, zip(before, figures, strict=True)))
        self._parts.append((from_ns, to_ns, figures))
        while len(self._parts) > 1 and self._parts[1][0] <= to_ns - self._span_ns:
            self._parts.popleft()

    def sums(self) -> tuple[float, tuple[float, ...]]:
        """The seconds that the window covers, and the sum of each figure."""
        seconds = sum(to_ns - from_ns for from_ns, to_ns, _ in self._parts) / 1e9
        return seconds, tuple(map(sum, zip(*(figures for *_, figures in self._parts), strict=True)))

    def clear(self) -> None:
        """Forget all figures."""
        self._parts.clear()

    def __len__(self) -> int:
        return len(self._parts)


class _Stage:
    """The load of one stage over the last seconds, since its nodes changed.

    Attributes:
        terms: what does not change.
        ready: its nodes that take requests.
        pending: its other nodes.
        starting: those of the pending ones that will be ready soon.
        busy: share of the time in which its ready nodes were busy, 0 to 1.
        waiting: the mean number of requests that waited.
        processors: processors that one of its nodes takes while it is busy.
    """

    def __init__(self, terms: StageTerms, up_after_s: float, down_after_s: float) -> None:
        self.terms = terms
        self.ready = self.pending = self.starting = 0
        self.busy = self.waiting = 0.0
        self.processors = float(terms.threads)
        self._queues = self._catches_up = False
        self._up_ns, self._down_ns = int(up_after_s * 1e9), int(down_after_s * 1e9)
        self._window = _Window(self._up_ns)
        self._looked_ns: int | None = None
        self._since_ns = 0  # when the nodes changed last
        self._slack_ns: int | None = None  # since when there is slack
        self._failures = 0
        self._adds = False  # whether a node that was added is not ready yet
        self._regrets = 0  # removals that came too soon
        self._removed_ns = self._regret_ns = self._retry_ns = self._tell_ns = _NEVER_NS

    @property
    def count(self) -> int:
        """Its nodes, with those that are not ready."""
        return self.ready + self.pending

    def note(self, now_ns: int, load: StageLoad) -> None:
        """Take note of the load since the last look."""
        before_ns, self._looked_ns, self.starting = self._looked_ns, now_ns, load.starting
        if self._adds and load.ready > self.ready and not load.starting:
            self._adds, self._failures = False, 0
        gap = before_ns is None or now_ns - before_ns > max(self._up_ns, _LONGEST_BREAK_NS)
        if gap or (load.ready, load.pending) != (self.ready, self.pending):  # or this process was stopped for a while
            self.ready, self.pending = load.ready, load.pending
            self._since_ns, self._slack_ns = now_ns, None
            self._window.clear()
            self.busy = self.waiting = 0.0
            self._queues = self._catches_up = False
            return
        assert before_ns is not None
        if now_ns > before_ns:
            self._measure(before_ns, now_ns, load)
        if not self._fits_in_fewer:
            self._slack_ns = None
        elif self._slack_ns is None:
            self._slack_ns = now_ns - self._up_ns

    def _measure(self, before_ns: int, now_ns: int, load: StageLoad) -> None:
        passed_s = (now_ns - before_ns) / 1e9
        waited_s = passed_s if load.waiting >= 1 else 0.0
        self._window.add(before_ns, now_ns, load.busy_s, load.needed_s, passed_s * load.waiting, waited_s)
        seconds, (busy_s, needed_s, waiting_s, waited_s) = self._window.sums()
        node_s = seconds * max(1, self.ready)
        self.busy = min(1.0, busy_s / node_s)
        self.waiting = waiting_s / seconds
        self._queues = waited_s >= _WAITED * seconds
        self._catches_up = load.waiting < _FALLS * self.waiting
        if busy_s >= _SEEN_SHARE * node_s:
            self.processors = min(float(self.terms.threads), needed_s / busy_s)

    @property
    def _is_known(self) -> bool:
        """Whether the figures cover the whole time before a decision."""
        covered = self._looked_ns is not None and self._looked_ns - self._since_ns >= self._up_ns
        return covered and len(self._window) > 0

    @property
    def _fewer(self) -> int:
        """The nodes that take requests once there is one node fewer: one that is not ready goes first."""
        return min(self.ready, self.count - 1)

    @property
    def _fits_in_fewer(self) -> bool:
        fewer = self._fewer
        return self._is_known and self.waiting < 1 and fewer > 0 and self.busy * self.ready < _FITS * fewer

    def is_pressed(self, now_ns: int) -> bool:
        """Whether another node would help, and is allowed."""
        allowed = self.count < self.terms.replicas.most and not self.starting and now_ns >= self._retry_ns
        return allowed and self._is_known and self._queues and self.busy > _BUSY and not self._catches_up

    @property
    def _needed_slack_ns(self) -> int:
        return min(self._down_ns << self._regrets, max(self._down_ns, _MOST_SLACK_NS))

    def has_slack(self, now_ns: int) -> bool:
        """Whether one node fewer is enough, and allowed. Slack counts once: each node needs its own time."""
        allowed = self.count > self.terms.replicas.least
        return allowed and self._slack_ns is not None and now_ns - self._slack_ns >= self._needed_slack_ns

    def decided(self, change: int, now_ns: int) -> None:
        """Take note that a node is added (1) or removed (-1), or that there is no room for another (0)."""
        if change < 0:
            self._removed_ns = now_ns
        elif change > 0:
            self._adds = True
            if now_ns - self._removed_ns < _REGRET_NS:
                self._regrets, self._regret_ns = min(self._regrets + 1, 32), now_ns
                self._removed_ns = _NEVER_NS  # one return counts once, however many nodes it needs
            elif now_ns - self._regret_ns > _REGRET_NS:
                self._regrets = 0

    def may_tell(self, now_ns: int) -> bool:
        """Whether it is time to say that the stage cannot grow."""
        if now_ns < self._tell_ns:
            return False
        self._tell_ns = now_ns + int(_TELL_AGAIN_S * 1e9)
        return True

    def back_off(self, now_ns: int) -> float:
        """A node did not start: add none for some time, which doubles each time."""
        self._adds = False
        wait_s = min(_MOST_RETRY_S, _RETRY_S * 2.0**self._failures)
        self._failures = min(self._failures + 1, 10)
        self._retry_ns = now_ns + int(wait_s * 1e9)
        return wait_s

    @property
    def why_more(self) -> str:
        """Why another node would help."""
        wait = f"{self.waiting:.0f} request{'s wait' if round(self.waiting) != 1 else ' waits'}"
        return f"{wait}, its nodes were busy {_percent(self.busy)} of {self._up_ns / 1e9:g} s"

    @property
    def why_fewer(self) -> str:
        """Why one node fewer is enough."""
        fewer = self._fewer
        now = f"{_percent(self.busy * self.ready / fewer)} now"
        return (
            f"for {self._needed_slack_ns / 1e9:g} s, {fewer} would have been busy less than {_percent(_FITS)} ({now})"
        )


def _replicas(count: int) -> str:
    return f"{count} replica{'s' * (count != 1)}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
