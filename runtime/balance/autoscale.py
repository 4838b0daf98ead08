"""Decides by load how many nodes a stage has, within its range. Pure: the caller gives figures and times.

    load      busy time of a stage's nodes over elapsed time, in nodes: 1.6 nodes were busy on average
    pressed   over the last ``up_after_s``, the nodes were busy for more than 80 % of the time; or for more than 60 %,
              and a request waited at every look. Nodes that catch up, because fewer requests wait now than did in
              that time, need no help
    slack     for ``down_after_s`` without a break, the load of the last ``up_after_s`` would have kept one node fewer
              busy for less than 50 %, and no request waited

    nodes --- pressed, and the host has room ---> nodes + 1        the most pressed stage, one at a time
    nodes --- slack ----------------------------> nodes - 1        one for each ``down_after_s``

Why this does not flap. A node is added only when n nodes have a load above 0.6 n, and removed from n + 1 only when the
load is below 0.5 n: under a steady load, no node that was added is removed again. Figures count from the last change of
the stage's nodes, so no decision rests on figures of another number of nodes, and two additions are at least
``up_after_s`` apart. A load that returns more often than every ``down_after_s`` breaks the slack each time, so the
nodes for its peaks stay.

The host has room when the new node has memory, and processors. A node takes as many processors as its process was seen
to use while it ran, at most its threads; until that was seen, its threads. The nodes of all stages together must not
take more processors than there are, and half of what the new node takes must be idle, because a replica that only
shares busy processors does not help. A stage that hardly uses processors, because it waits for something else, needs
no idle one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.balance.replicas import ReplicaRange

_BUSY = 0.8  # share of the time above which a stage is pressed
_BUSY_WITH_QUEUE = 0.6  # the same while requests wait; above _FITS, so that the new node is not removed at once
_FITS = 0.5  # share of the time below which one node fewer would be busy
_FALLS = 0.9  # nodes catch up when fewer requests wait than this share of the most that did
_NOTICEABLE = 0.25  # a node that uses less than this part of a processor does not depend on idle ones
_SEEN_SHARE = 0.1  # nodes must have been busy for this share of the time for their use of processors to be known
_RETRY_S, _MOST_RETRY_S = 30.0, 600.0  # time without further tries after a node did not start, doubled each time
_LONGEST_BREAK_NS = 30 * 10**9  # between two looks; after a longer one, what was seen before does not count
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
        busy_s: time in which the sessions of the ready nodes ran, all together.
        cpu_s: processor time that their processes used.
        waiting: requests before the nodes now, without those that run.
    """

    ready: int
    pending: int
    busy_s: float
    cpu_s: float
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
        self._span_ns = int(up_after_s * 1e9)
        self._idle: deque[tuple[int, float]] = deque()  # idle processors, with the times of the looks

    def look(self, now_ns: int, loads: Sequence[StageLoad], host: HostLoad) -> list[Decision]:
        """Take note of what happened since the last look; returns what to change.

        The caller carries out every decision whose numbers differ, and tells the outcome by the next loads: a node that
        is added is pending until it is ready, and :meth:`failed` says that it never will be.
        """
        for stage, load in zip(self._stages, loads, strict=True):
            stage.note(now_ns, load)
        self._idle.append((now_ns, host.idle_processors))
        while self._idle[0][0] < now_ns - self._span_ns:
            self._idle.popleft()
        decisions = [
            Decision(stage=index, before=stage.count, after=stage.count - 1, reason=stage.why_fewer)
            for index, stage in enumerate(self._stages)
            if stage.has_slack(now_ns)
        ]
        return decisions or self._grow(now_ns, host)

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
        starting = sum(each.pending * each.terms.replica_bytes for each in self._stages)  # they may not use it yet
        free_bytes = max(0, host.free_bytes - starting)
        if free_bytes < stage.terms.replica_bytes:
            return f"another node takes {_mib(stage.terms.replica_bytes)}, and {_mib(free_bytes)} are free"
        needed = stage.processors
        if needed < _NOTICEABLE:
            return None
        taken = sum(each.count * each.processors for each in self._stages)
        if taken + needed > host.processors + 0.01:  # sums of measured values may be off in the last digits
            return f"the nodes take {taken:.3g} of {host.processors} processors, and another one takes {needed:.2g}"
        idle = sum(each for _, each in self._idle) / len(self._idle)
        if idle < needed / 2:
            return f"{idle:.2g} of {host.processors} processors are idle, and another node takes {needed:.2g}"
        return None


@dataclass(frozen=True)
class _Sample:
    from_ns: int
    to_ns: int
    load: StageLoad

    @property
    def seconds(self) -> float:
        return (self.to_ns - self.from_ns) / 1e9


class _Stage:
    """The load of one stage over the last seconds, since its nodes changed.

    Attributes:
        terms: what does not change.
        busy: share of the time in which its nodes were busy, 0 to 1.
        waiting: the mean number of requests that waited.
        processors: processors that one of its nodes takes while it is busy.
        count: its nodes, with those that are not ready.
    """

    def __init__(self, terms: StageTerms, up_after_s: float, down_after_s: float) -> None:
        self.terms = terms
        self.busy = self.waiting = 0.0
        self._queues = self._catches_up = False
        self.processors = float(terms.threads)
        self.count = 0
        self._up_ns, self._down_ns = int(up_after_s * 1e9), int(down_after_s * 1e9)
        self._samples: deque[_Sample] = deque()
        self._nodes = (0, 0)  # the ready and the pending nodes at the last look
        self._looked_ns: int | None = None
        self._since_ns = 0  # when the nodes changed last
        self._slack_ns: int | None = None  # since when there is slack
        self._failures = 0
        self._retry_ns = self._tell_ns = -(1 << 62)

    def note(self, now_ns: int, load: StageLoad) -> None:
        """Take note of the load since the last look."""
        nodes, before_ns = (load.ready, load.pending), self._looked_ns
        if load.ready > self._nodes[0]:
            self._failures = 0
        gap = before_ns is None or now_ns - before_ns > max(self._up_ns, _LONGEST_BREAK_NS)
        self._looked_ns, self.count = now_ns, load.ready + load.pending
        if gap or nodes != self._nodes:  # the nodes have changed, or this process was stopped for a while
            self._nodes, self._since_ns, self._slack_ns = nodes, now_ns, None
            self._samples.clear()
            self.busy = self.waiting = 0.0
            self._queues = self._catches_up = False
            return
        assert before_ns is not None
        self._samples.append(_Sample(before_ns, now_ns, load))
        while len(self._samples) > 1 and self._samples[1].from_ns <= now_ns - self._up_ns:
            self._samples.popleft()
        self._measure()
        if not self._fits_in_fewer:
            self._slack_ns = None
        elif self._slack_ns is None:
            self._slack_ns = self._samples[0].from_ns

    def _measure(self) -> None:
        seconds = sum(sample.seconds for sample in self._samples)
        if seconds <= 0.0:
            return
        busy_s = sum(sample.load.busy_s for sample in self._samples)
        node_s = seconds * max(1, self._nodes[0])
        self.busy = min(1.0, busy_s / node_s)
        waiting = [sample.load.waiting for sample in self._samples]
        self.waiting = sum(waiting) / len(waiting)
        self._queues = min(waiting) >= 1
        self._catches_up = waiting[-1] < _FALLS * max(waiting)
        if busy_s >= _SEEN_SHARE * node_s:
            cpu_s = sum(sample.load.cpu_s for sample in self._samples)
            self.processors = min(float(self.terms.threads), cpu_s / busy_s)

    @property
    def pending(self) -> int:
        """Its nodes that are not ready."""
        return self._nodes[1]

    @property
    def _is_known(self) -> bool:
        """Whether the figures cover the whole time before a decision, and all nodes are ready."""
        covered = self._looked_ns is not None and self._looked_ns - self._since_ns >= self._up_ns
        return covered and bool(self._samples) and not self._nodes[1]

    @property
    def _fits_in_fewer(self) -> bool:
        fewer = self._nodes[0] - 1
        return self._is_known and self.waiting < 1 and fewer > 0 and self.busy * self._nodes[0] < _FITS * fewer

    def is_pressed(self, now_ns: int) -> bool:
        """Whether another node would help, and is allowed."""
        allowed = self.count < self.terms.replicas.most and now_ns >= self._retry_ns
        is_busy = self.busy > (_BUSY_WITH_QUEUE if self._queues else _BUSY)
        return self._is_known and allowed and is_busy and not self._catches_up

    def has_slack(self, now_ns: int) -> bool:
        """Whether one node fewer is enough, and allowed. Slack counts once: each node needs its own time."""
        allowed = self.count > self.terms.replicas.least
        return allowed and self._slack_ns is not None and now_ns - self._slack_ns >= self._down_ns

    def may_tell(self, now_ns: int) -> bool:
        """Whether it is time to say that the stage cannot grow."""
        if now_ns < self._tell_ns:
            return False
        self._tell_ns = now_ns + int(_TELL_AGAIN_S * 1e9)
        return True

    def back_off(self, now_ns: int) -> float:
        """A node did not start: add none for some time, which doubles each time."""
        wait_s = min(_MOST_RETRY_S, _RETRY_S * 2.0**self._failures)
        self._failures = min(self._failures + 1, 10)
        self._retry_ns = now_ns + int(wait_s * 1e9)
        return wait_s

    @property
    def why_more(self) -> str:
        """Why another node would help."""
        wait = f"{self.waiting:.0f} request{'s wait' if round(self.waiting) != 1 else ' waits'}"
        busy = f"its nodes were busy {_percent(self.busy)} of {self._up_ns / 1e9:g} s"
        return f"{wait}, {busy}" if self.waiting >= 1 else busy

    @property
    def why_fewer(self) -> str:
        """Why one node fewer is enough."""
        fewer = self.count - 1
        now = f"{_percent(self.busy * self.count / fewer)} now"
        return f"for {self._down_ns / 1e9:g} s, {fewer} would have been busy less than {_percent(_FITS)} ({now})"


def _replicas(count: int) -> str:
    return f"{count} replica{'s' * (count != 1)}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
