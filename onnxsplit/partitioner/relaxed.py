"""The problem, relaxed: what a partition costs at least, in numbers that add up.

Everything here makes things look cheaper than they may be: a tensor that several stages read is sent once, all links
are the cheapest, devices of a kind are as fast as they ever are, and of memory only constants that one atom reads are
counted. So whatever is proven about it is proven about the problem.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxsplit.partitioner.lineup import Lineup, StageStep
from onnxsplit.partitioner.objective import NEVER, Problem
from onnxsplit.partitioner.orders import successors
from onnxsplit.plan import CALLER

Vector = np.ndarray[Any, np.dtype[Any]]

FAR = np.iinfo(np.int64).max // 4
"""Above every time; sums of a few do not overflow."""

_HUGE = FAR >> 20  # above every time, and sums of very many do not overflow


@dataclass(frozen=True)
class Crossing:
    """A tensor between atoms: its writer, its readers, and what a crossing costs at least."""

    writer: int
    readers: tuple[int, ...]
    time_ns: int


class Relaxed:
    """The problem as this search sees it: work in nanoseconds of the kind that most devices are of.

    Attributes:
        work: by atom.
        crossings: tensors between atoms.
        given: tensors from the caller.
        always: by atom, what it pays for outputs to the caller, wherever it is.
        rates: by kind, work done in a nanosecond at most.
        share: work that a nanosecond of transfers takes away at least.
        receives: what every stage receives at least, in nanoseconds.
        sends: what every stage sends at least to other stages, but for those that only serve the caller.
    """

    def __init__(self, problem: Problem, lineup: Lineup) -> None:
        self.problem, self.lineup = problem, lineup
        link, caller_link = problem.cheapest_link, problem.cheapest_caller_link
        self.overlapped = link.overlapped or caller_link.overlapped
        following = successors(problem)
        self.edges_from = np.array([a for a, readers in enumerate(following) for _ in readers], dtype=np.int64)
        self.edges_to = np.array([reader for readers in following for reader in readers], dtype=np.int64)
        self.successors = following
        self.predecessors: list[list[int]] = [[] for _ in range(problem.atoms)]
        for atom, readers in enumerate(following):
            for reader in readers:
                self.predecessors[reader].append(atom)
        self.crossings = tuple(
            Crossing(transfer.writer, transfer.readers, link.transfer_ns(transfer.size_bytes))
            for transfer in problem.transfers
            if transfer.writer != CALLER and transfer.readers
        )
        self.given = tuple(
            Crossing(CALLER, transfer.readers, caller_link.transfer_ns(transfer.size_bytes))
            for transfer in problem.transfers
            if transfer.writer == CALLER
        )
        for_caller = [transfer for transfer in problem.transfers if transfer.to_caller]
        # Where a tensor is sent once for all readers, the caller's may be paid with another crossing already.
        self.always = np.zeros(problem.atoms, dtype=np.int64)
        for transfer in for_caller:
            if not self.overlapped and not (problem.send_once and transfer.readers):
                self.always[transfer.writer] += caller_link.transfer_ns(transfer.size_bytes)
        self.times = np.array([kind.time_ns for kind in problem.kinds], dtype=np.int64)
        usual = max(range(len(problem.kinds)), key=problem.devices.count)
        allowed = np.where(self.times >= NEVER, _HUGE, self.times)
        self.work: Vector = np.where(self.times[usual] >= NEVER, allowed.min(axis=0), self.times[usual])
        self.rates = [self._rate(row) for row in self.times]
        self.all_pay = all(kind.pays for kind in problem.kinds) and not self.overlapped
        self.share = min(self.rates) if self.all_pay else 0.0
        self.work = self.work + (self.always * self.share).astype(np.int64)
        self.total = int(self.work.sum())
        self._least({transfer.writer for transfer in for_caller})

    def _rate(self, times: Vector) -> float:
        busy = (times > 0) & (times < NEVER)
        if ((times == 0) & (self.work > 0)).any():
            return float(_HUGE)
        return float((self.work[busy] / times[busy]).max(initial=0.0)) or 1.0

    def _least(self, writers_for_caller: set[int]) -> None:
        self.receives = self.sends = 0
        self.serving = len(writers_for_caller)
        if not self.all_pay:
            return
        fed = {reader for tensor in self.given for reader in tensor.readers}
        if {atom for atom, writers in enumerate(self.predecessors) if not writers} <= fed:
            self.receives = min((t.time_ns for t in (*self.crossings, *self.given)), default=0)
        if {atom for atom, readers in enumerate(self.successors) if not readers} <= writers_for_caller:
            self.sends = min((t.time_ns for t in self.crossings), default=0)


class Capacities:
    """What the devices of each state can do within a target.

    Attributes:
        target: no stage takes longer, in nanoseconds.
        before: by state, the work that its devices can have done at most.
        after: by state, the work that devices not yet used can do at most, on the way to a final state.
    """

    def __init__(self, relaxed: Relaxed, target: int) -> None:
        self.target, self._relaxed = target, relaxed
        lineup = relaxed.lineup
        before = np.full(lineup.states, -float(FAR))
        after = np.full(lineup.states, -float(FAR))
        first = np.zeros(lineup.states, dtype=np.int64)  # the most stages up to a state
        then = np.zeros(lineup.states, dtype=np.int64)  # and from there on
        before[0] = 0.0
        after[list(lineup.final)] = 0.0
        for step in lineup.steps:
            before[step.after] = max(before[step.after], before[step.before] + self.gain(step))
            first[step.after] = max(first[step.after], first[step.before] + 1)
        for step in reversed(lineup.steps):
            after[step.before] = max(after[step.before], after[step.after] + self.gain(step))
            then[step.before] = max(then[step.before], then[step.after] + 1)
        # As many stages as atoms that serve the caller need send nothing to another stage.
        self._sending, self._receiving = first, then
        spared = max(relaxed.rates) * relaxed.sends * relaxed.serving
        self.before: Vector = before + spared
        self.after: Vector = after + spared

    def gain(self, step: StageStep) -> float:
        """Work that the devices of a step can do, when they receive and send a tensor."""
        return self._work(step, self._relaxed.receives + self._relaxed.sends)

    def most(self, step: StageStep) -> float:
        """Work that the devices of a step can do, when they only receive a tensor."""
        return self._work(step, self._relaxed.receives)

    def _work(self, step: StageStep, paid_ns: int) -> float:
        free = max(0, self.target * step.replicas - paid_ns)
        return min(float(_HUGE), free * self._relaxed.rates[step.kind])

    def usable(self, state: int, least: Vector, most: Vector, crossing_ns: Vector, crossings: Vector) -> Vector:
        """Which downsets, of at least and at most so much work, may be what is done in a state.

        Every stage pays for a tensor that it receives and one that it sends: that is in the capacities. A crossing
        pays for what it costs above that, and in full when there are more of them than stages.
        """
        relaxed = self._relaxed
        sent = crossing_ns - np.minimum(crossings, self._sending[state]) * relaxed.sends
        arrived = crossing_ns - np.minimum(crossings, self._receiving[state]) * relaxed.receives
        result: Vector = least + relaxed.share * sent <= self.before[state] + 0.5
        result &= relaxed.total - most + relaxed.share * arrived <= self.after[state] + 0.5
        return result
