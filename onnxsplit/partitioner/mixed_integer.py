"""A mixed-integer linear program of the problem, solved by HiGHS (Huangfu and Hall, 2018) through SciPy.

It is exact for small problems and gives a lower bound for every objective. It models what the other algorithms relax:
a tensor that goes to several stages is paid for each of them, and a stage delays every stage that waits for it. All
devices must be alike, with one stage on each. The solver's time is exponential in the worst case, so it is limited.

    x[a, k] = 1   atom a is in stage k              r[t, k] = 1   stage k receives tensor t
    s[t, k]       how often stage k sends tensor t  e[j, k] = 1   a tensor goes from stage j to stage k
    f[k]          the time when stage k is done     h[w, k] = 1   stage k holds constant w
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from onnxsplit.partitioner.objective import Partition, Problem, Transfer
from onnxsplit.plan import CALLER

Term = tuple[int, float]
"""A column of the program and its factor."""


@dataclass(frozen=True)
class Solved:
    """The solver's result.

    Attributes:
        partition: the best partition; None when the solver found none.
        bound: a lower bound on the objective: nanoseconds, or bytes for the objective ``memory``.
    """

    partition: Partition | None
    bound: int


def solve(problem: Problem, stages: int, *, seconds: float) -> Solved:
    """Build and solve the program.

    Args:
        problem: the problem; its devices must be of one kind and joined by one link that does not overlap.
        stages: the exact number of stages.
        seconds: the solver's time limit.
    """
    model = _Model(problem, stages)
    # The solver works with floats, so times are in microseconds and sizes in KiB to be of similar magnitude.
    unit = 1024.0 if problem.objective == "memory" else 1000.0
    solution = milp(
        c=model.objective,
        constraints=model.constraints(),
        integrality=np.array(model.integer),
        bounds=Bounds(0, np.array(model.upper)),
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )
    dual = solution.mip_dual_bound if solution.mip_dual_bound is not None else 0.0
    bound = max(0, int(np.ceil((dual - 1e-6 * max(1.0, abs(dual))) * unit))) if np.isfinite(dual) else 0
    if solution.x is None:
        return Solved(None, bound)
    placed = solution.x[model.x].reshape(problem.atoms, stages).argmax(axis=1)
    devices = tuple((device,) for device in range(stages))
    return Solved(Partition(tuple(int(stage) for stage in placed), devices), bound)


class _Model:
    """The columns of the program, and its rows of the form ``sum(factor * column) <= right``."""

    def __init__(self, problem: Problem, stages: int) -> None:
        self._problem, self._stages = problem, stages
        self.upper: list[float] = []
        self.integer: list[int] = []
        self._rows: list[list[Term]] = []
        self._right: list[float] = []
        atoms = problem.atoms
        self.x = self._columns(atoms * stages, upper=1, integer=True)
        self.value = self._columns(1)[0]
        for atom in range(atoms):
            self._equal([(self._x(atom, k), 1.0) for k in range(stages)], 1.0)
        for stage in range(stages):
            self._at_most([(self._x(atom, stage), -1.0) for atom in range(atoms)], -1.0)
        for transfer in problem.transfers:
            for reader in transfer.readers if transfer.writer != CALLER else ():
                for k in range(stages - 1):  # the writer's stage is not after the reader's
                    self._at_most(
                        [(self._x(reader, j), 1.0) for j in range(k + 1)]
                        + [(self._x(transfer.writer, j), -1.0) for j in range(k + 1)],
                        0.0,
                    )
        for one, other in problem.apart:
            for k in range(stages):
                self._at_most([(self._x(one, k), 1.0), (self._x(other, k), 1.0)], 1.0)
        loads = self._loads()
        if problem.capped or problem.objective == "memory":
            self._memory()
        if problem.objective == "throughput":
            for load in loads:
                self._at_most([*load, (self.value, -1.0)], 0.0)
        elif problem.objective == "latency":
            self._latency(loads)
        self.objective = np.zeros(len(self.upper))
        self.objective[self.value] = 1.0

    def constraints(self) -> LinearConstraint:
        """All rows as a sparse matrix."""
        # In SciPy below 1.15, the solver does not take 64-bit indices.
        rows = np.repeat(np.arange(len(self._rows), dtype=np.int32), [len(row) for row in self._rows])
        columns = np.array([column for row in self._rows for column, _ in row], np.int32)
        factors = np.array([factor for row in self._rows for _, factor in row])
        matrix = csr_array((factors, (rows, columns)), shape=(len(self._rows), len(self.upper)))
        return LinearConstraint(matrix, -np.inf, np.array(self._right))

    def _columns(self, count: int, *, upper: float = np.inf, integer: bool = False) -> range:
        first = len(self.upper)
        self.upper += [upper] * count
        self.integer += [int(integer)] * count
        return range(first, first + count)

    def _x(self, atom: int, stage: int) -> int:
        return self.x[atom * self._stages + stage]

    def _at_most(self, terms: Iterable[Term], right: float) -> None:
        self._rows.append(list(terms))
        self._right.append(right)

    def _equal(self, terms: list[Term], right: float) -> None:
        self._at_most(terms, right)
        self._at_most([(column, -factor) for column, factor in terms], -right)

    def _loads(self) -> list[list[Term]]:
        """For each stage, the terms of its time in microseconds; adds the columns and rows of transfers."""
        problem, stages = self._problem, self._stages
        times = problem.kinds[0].time_ns
        loads: list[list[Term]] = [
            [(self._x(atom, k), time_ns / 1000) for atom, time_ns in enumerate(times)] for k in range(stages)
        ]
        self._received: list[tuple[int, range]] = []  # bytes, and a column for each stage
        for transfer in problem.transfers:
            cost = transfer.arrival_ns(problem.link) / 1000
            if not problem.kinds[0].pays:
                continue
            received = self._columns(stages, upper=1)
            self._received.append((transfer.size_bytes, received))
            for k in range(stages):
                loads[k].append((received[k], cost))
                for reader in transfer.readers:
                    writer_here = [] if transfer.writer == CALLER else [(self._x(transfer.writer, k), -1.0)]
                    self._at_most([(self._x(reader, k), 1.0), *writer_here, (received[k], -1.0)], 0.0)
            if transfer.writer != CALLER:
                self._sent(transfer, received, loads)
        return loads

    def _sent(self, transfer: Transfer, received: range, loads: list[list[Term]]) -> None:
        problem, stages, writer = self._problem, self._stages, transfer.writer
        cost = transfer.arrival_ns(problem.link) / 1000
        if transfer.to_caller:
            answer = transfer.answer_ns(problem.link) / 1000
            for k in range(stages):
                loads[k].append((self._x(writer, k), answer))
            if problem.send_once:  # the dearer way is paid
                cost = max(0.0, cost - answer)
        if not cost:
            return
        for k in range(stages - 1):
            sent = self._columns(1)[0]
            loads[k].append((sent, cost))
            others = [received[j] for j in range(k + 1, stages)]
            groups = [[other] for other in others] if problem.send_once else [others]
            for group in groups:  # binding only if the writer is in stage k
                self._at_most(
                    [*((other, 1.0) for other in group), (self._x(writer, k), float(len(group))), (sent, -1.0)],
                    float(len(group)),
                )

    def _memory(self) -> None:
        """Add the memory of each stage: its constants, and the tensors it receives, which are live at its start."""
        problem, stages = self._problem, self._stages
        needs: list[list[Term]] = [[] for _ in range(stages)]
        for weight in problem.weights:
            held = self._columns(stages, upper=1)
            for k in range(stages):
                needs[k].append((held[k], weight.size_bytes / 1024))
                for reader in weight.readers:
                    self._at_most([(self._x(reader, k), 1.0), (held[k], -1.0)], 0.0)
        for size_bytes, received in self._received:
            for k in range(stages):
                needs[k].append((received[k], size_bytes / 1024))
        limit = problem.kinds[0].max_memory_bytes
        for need in needs:
            if limit is not None:
                self._at_most(need, limit / 1024)
            if problem.objective == "memory":
                self._at_most([*need, (self.value, -1.0)], 0.0)

    def _latency(self, loads: list[list[Term]]) -> None:
        problem, stages = self._problem, self._stages
        most = sum(problem.kinds[0].time_ns) / 1000 + sum(
            2 * stages * max(transfer.arrival_ns(problem.link), transfer.answer_ns(problem.link)) / 1000
            for transfer in problem.transfers
        )
        done = self._columns(stages)
        for k in range(stages):
            self._at_most([*loads[k], (done[k], -1.0)], 0.0)
            self._at_most([(done[k], 1.0), (self.value, -1.0)], 0.0)
            for j in range(k):
                linked = self._columns(1, upper=1)[0]
                self._at_most([*loads[k], (done[j], 1.0), (done[k], -1.0), (linked, most)], most)
                for transfer in problem.transfers:
                    for reader in transfer.readers if transfer.writer != CALLER else ():
                        self._at_most(
                            [(self._x(transfer.writer, j), 1.0), (self._x(reader, k), 1.0), (linked, -1.0)], 1.0
                        )
