"""The relaxed problem: costs that are never above the true ones and that add up over atoms and tensors.

A tensor that several stages read is sent once, all links are replaced by the best one, work is done at the highest rate
of a kind of devices, and memory counts only constants that a single atom reads. So a lower bound for the relaxed
problem is a lower bound for the problem.
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
"""An array of numbers by atom, by downset, or by position in an order."""

FAR = np.iinfo(np.int64).max // 4
"""A time above every real one; the sum of a few of them does not overflow."""

_HUGE = FAR >> 20  # a time above every real one; sums of very many of them do not overflow


@dataclass(frozen=True)
class Crossing:
    """A tensor between atoms: its writer, its readers, and the least time of one transfer in nanoseconds."""

    writer: int
    readers: tuple[int, ...]
    time_ns: int


class Relaxed:
    """The relaxed problem. Work is measured in nanoseconds on the most frequent kind of device.

    Attributes:
        work: work of each atom.
        crossings: tensors between atoms.
        given: tensors from the caller.
        always: for each atom, time of sending its outputs to the caller, whichever stage it is in.
        rates: for each kind, the most work that it does in a nanosecond.
        share: the least work that a nanosecond of transfers displaces.
        receives: the least time that every stage spends on receiving, in nanoseconds.
        sends: the least time that every stage spends on sending to other stages, except stages that serve the caller
            alone.
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
            Crossing(transfer.writer, transfer.readers, transfer.arrival_ns(link))
            for transfer in problem.transfers
            if transfer.writer != CALLER and transfer.readers
        )
        self.given = tuple(
            Crossing(CALLER, transfer.readers, transfer.arrival_ns(caller_link))
            for transfer in problem.transfers
            if transfer.writer == CALLER
        )
        for_caller = [transfer for transfer in problem.transfers if transfer.to_caller]
        # If a tensor is sent once for all readers, its transfer to the caller may be part of another crossing.
        self.always = np.zeros(problem.atoms, dtype=np.int64)
        for transfer in for_caller:
            if not self.overlapped and not (problem.send_once and transfer.readers):
                self.always[transfer.writer] += transfer.answer_ns(caller_link)
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
    """The most work that devices can do in each state if no stage takes longer than a target.

    Attributes:
        target: the largest time of a stage, in nanoseconds.
        before: for each state, the most work that the devices used so far can do.
        after: for each state, the most work that the remaining devices can do on the way to a final state.
    """

    def __init__(self, relaxed: Relaxed, target: int) -> None:
        self.target, self._relaxed = target, relaxed
        lineup = relaxed.lineup
        before = np.full(lineup.states, -float(FAR))
        after = np.full(lineup.states, -float(FAR))
        first = np.zeros(lineup.states, dtype=np.int64)  # the largest number of stages up to a state
        then = np.zeros(lineup.states, dtype=np.int64)  # the largest number of stages after it
        before[0] = 0.0
        after[list(lineup.final)] = 0.0
        for step in lineup.steps:
            before[step.after] = max(before[step.after], before[step.before] + self.gain(step))
            first[step.after] = max(first[step.after], first[step.before] + 1)
        for step in reversed(lineup.steps):
            after[step.before] = max(after[step.before], after[step.after] + self.gain(step))
            then[step.before] = max(then[step.before], then[step.after] + 1)
        # A stage that serves the caller need not send to another stage; there are at most as many as such atoms.
        self._sending, self._receiving = first, then
        spared = max(relaxed.rates) * relaxed.sends * relaxed.serving
        self.before: Vector = before + spared
        self.after: Vector = after + spared

    def gain(self, step: StageStep) -> float:
        """The most work that the devices of a step can do if they receive one tensor and send one."""
        return self._work(step, self._relaxed.receives + self._relaxed.sends)

    def most(self, step: StageStep) -> float:
        """The most work that the devices of a step can do if they receive one tensor and send none."""
        return self._work(step, self._relaxed.receives)

    def _work(self, step: StageStep, paid_ns: int) -> float:
        free = max(0, self.target * step.replicas - paid_ns)
        return min(float(_HUGE), free * self._relaxed.rates[step.kind])

    def usable(self, state: int, least: Vector, most: Vector, crossing_ns: Vector, crossings: Vector) -> Vector:
        """Which downsets may be the atoms done in a state.

        The capacities already contain one tensor that every stage receives and one that it sends. So a crossing counts
        only with its cost above that, and in full if there are more crossings than stages.

        Args:
            state: the state.
            least: the least work of each downset.
            most: the most work of each downset.
            crossing_ns: time of the tensors that cross the border of each downset.
            crossings: number of these tensors.

        Returns:
            A truth value for each downset.
        """
        relaxed = self._relaxed
        sent = crossing_ns - np.minimum(crossings, self._sending[state]) * relaxed.sends
        arrived = crossing_ns - np.minimum(crossings, self._receiving[state]) * relaxed.receives
        result: Vector = least + relaxed.share * sent <= self.before[state] + 0.5
        result &= relaxed.total - most + relaxed.share * arrived <= self.after[state] + 0.5
        return result
