"""Find the best partition and prove how good it is, with all algorithms, the cheapest first.

    slices of a few orders -> downsets below the best value -> more orders, moves -> downsets at smaller targets

Each step finds a better partition or raises the lower bound. The search ends when the two are close enough, when
nothing is left to try, or when the time limit is reached. Without a time limit, the result is the same every time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

from onnxsplit.partitioner.bound import lower_bound, surroundings_bound, throughput_bound, with_overhead
from onnxsplit.partitioner.branch import branch
from onnxsplit.partitioner.contract import Contracted, contract
from onnxsplit.partitioner.downsets import TooMany
from onnxsplit.partitioner.exchange import improve, rearranged
from onnxsplit.partitioner.lineup import Lineup, fixed_lineup, sequences
from onnxsplit.partitioner.objective import NEVER, Infeasible, Partition, Problem, Score, score
from onnxsplit.partitioner.orders import linear_orders, refined
from onnxsplit.partitioner.paths import PathResult, PathSearch
from onnxsplit.partitioner.relaxed import Relaxed
from onnxsplit.partitioner.slices import slice_order

_FIRST_ORDERS = 5  # linear orders that are sliced first
_MORE_ORDERS = 40  # linear orders that are sliced at most
_DOWNSETS = (20_000, 500_000)  # the most downsets to hold at once, in a quick search and in a thorough one
_ATOMS = 40_000  # the most atoms for which downsets are listed, because every pair of atoms takes one bit of memory
_MIXED_INTEGER = 240  # the largest product of atoms and stages that the solver is used for
_SHARES = (0.1, 0.3, 0.6, 1.0)  # targets to try, as shares of the distance between the bound and the best value
_TRIES = 2_000  # the most single moves to judge
_DEARER = (4, 16)  # how many times as much transfers cost in searches for cuts with small ones
_LEAN_GAP, _LEAN_SECONDS = 0.02, 1.0  # when these searches end
_UNBALANCED = 1.3  # how much longer the slowest stage of such a cut may run; plans move to hosts with more cores
_EXCHANGE = 400  # the most atoms for which single moves are tried

Progress = Callable[[int, int], None]
"""Called with the best value and the lower bound whenever one of them changes."""


@dataclass(frozen=True)
class Effort:
    """When a search ends.

    Attributes:
        gap: the search stops when the best value is within this share of the bound.
        seconds: the search stops after this time; None for no limit.
    """

    gap: float = 0.0
    seconds: float | None = 10.0


@dataclass(frozen=True)
class SearchResult:
    """The best partition that was found.

    Attributes:
        partition: the partition.
        score: its figures.
        bound: a lower bound on the objective of every partition.
    """

    partition: Partition
    score: Score
    bound: int

    @property
    def gap(self) -> float:
        """How far the value is above the lower bound, as a share of the bound."""
        return self.score.value / max(1, self.bound) - 1


def search(
    problem: Problem, lineup: Lineup, effort: Effort = Effort(), progress: Progress = lambda _best, _bound: None
) -> SearchResult:
    """Search for the partition with the smallest value of the objective.

    Args:
        problem: atoms, devices and objective.
        lineup: the orders in which devices may be used.
        effort: when the search ends.
        progress: called whenever the best value or the bound changes.

    Raises:
        Infeasible: no partition was found that keeps every limit.
    """
    bare = replace(problem.without_idle_caps(), overhead=None)
    if not problem.atoms:
        empty = Partition((), ())
        return SearchResult(empty, score(problem, empty), 0)
    if any(min(times) >= NEVER for times in zip(*(kind.time_ns for kind in problem.kinds), strict=True)):
        raise Infeasible
    found = _searched(bare, lineup, effort, progress)
    bound = with_overhead(found.bound, problem, lineup) if problem.objective == "throughput" else found.bound
    best, figures = found.partition, score(problem, found.partition)
    most_ns = _UNBALANCED * max(figures.compute_ns)
    for factor in _DEARER:  # where the cores of the host are the limit, transfers count more than the balance
        if figures.value <= bound * (1 + effort.gap) or figures.value > figures.host_ns:
            break
        seconds = _LEAN_SECONDS if effort.seconds is None else min(_LEAN_SECONDS, effort.seconds)
        leaner = _searched(_dearer(bare, factor), lineup, Effort(_LEAN_GAP, seconds), lambda _best, _bound: None)
        again = score(problem, leaner.partition)
        if again.rank < figures.rank and max(again.compute_ns) <= most_ns:
            best, figures = leaner.partition, again
    return SearchResult(best, figures, min(bound, figures.value))


def _dearer(problem: Problem, factor: int) -> Problem:
    """The same problem, in which transfers cost so many times as much."""
    return replace(
        problem,
        link=problem.link.slower(factor),
        links={pair: link.slower(factor) for pair, link in problem.links.items()},
        caller_links={device: link.slower(factor) for device, link in problem.caller_links.items()},
    )


def _searched(problem: Problem, lineup: Lineup, effort: Effort, progress: Progress) -> SearchResult:
    """Search without the overhead of requests.

    Raises:
        Infeasible: no partition was found that keeps every limit.
    """
    run = _Search(problem, lineup, effort, progress)
    run.first_slices()
    run.raise_bound(lower_bound(problem, lineup))
    if problem.objective == "throughput":
        run.surroundings()
        run.downsets()
    run.more_slices(0)
    run.exchange()
    if problem.objective == "throughput":
        run.raise_target()
        run.branches()
    run.mixed_integer()
    run.rearrange()
    return run.result()


class _Search:
    """One search: the best partition and the bound so far, and the steps that improve them."""

    def __init__(self, problem: Problem, lineup: Lineup, effort: Effort, progress: Progress) -> None:
        self._problem, self._effort, self._progress = problem, effort, progress
        self._lineups = [*sequences(problem, lineup.exact_stages), lineup]
        self._lineup = lineup
        self._whole = Contracted(problem, tuple(range(problem.atoms)))
        self._end = None if effort.seconds is None else time.monotonic() + effort.seconds
        self._best: tuple[Partition, Score] | None = None
        self._bound = 0
        self._relaxed_best: PathResult | None = None

    def result(self) -> SearchResult:
        """The result of the search.

        Raises:
            Infeasible: no partition was found that keeps every limit.
        """
        if self._best is None:
            raise Infeasible
        return SearchResult(*self._best, min(self._bound, self._best[1].value))

    @cached_property
    def _contracted(self) -> Contracted:
        return contract(self._problem)

    @cached_property
    def _smaller(self) -> Contracted:
        """The contracted problem if its optimum is that of the whole problem; else the whole problem.

        Contraction may remove a stage that holds only atoms that take no time. The contracted problem is used only if
        no partition into fewer stages can be as good as the best one so far.
        """
        smaller, stages = self._contracted, self._lineup.exact_stages
        if stages is None:
            return smaller
        if smaller.problem.atoms < stages or self._best is None:
            return self._whole
        best = self._best[1].value
        for fewer in range(max(1, stages - (self._problem.atoms - smaller.problem.atoms)), stages):
            lineup = replace(self._lineup, final=self._lineup.after_stages(fewer))
            if lineup.final and throughput_bound(Relaxed(smaller.problem, lineup)) < best:
                return self._whole
        return smaller

    @cached_property
    def _relaxed(self) -> Relaxed:
        return Relaxed(self._smaller.problem, self._lineup)

    def raise_bound(self, proven: int) -> None:
        """Raise the bound to this lower bound on the objective, if it is higher."""
        if proven > self._bound:
            self._bound = proven
            self._report()

    def first_slices(self) -> None:
        """Slice a few linear orders, of the contracted atoms if there are enough of them."""
        stages = self._lineup.exact_stages
        smaller = self._contracted if self._problem.objective == "throughput" else self._whole
        if smaller.problem.atoms < (stages or 1):
            smaller = self._whole
        for number, order in enumerate(islice(linear_orders(smaller.problem), _FIRST_ORDERS)):
            for lineup in self._lineups:
                if number and self._enough():
                    return
                self._slice(smaller, lineup, order)
        if self._best is None:
            self.more_slices(0)

    def more_slices(self, first: int) -> None:
        """Slice more orders, and slice each again after sorting it by the stages of the best partition."""
        for order in islice(linear_orders(self._problem), first, _MORE_ORDERS):
            for lineup in self._lineups:
                if self._enough():
                    return
                self._slice(self._whole, lineup, order)
                if self._best is not None:
                    self._slice(self._whole, lineup, refined(self._best[0].stage_of, order))

    def surroundings(self) -> None:
        """Raise the bound by the cheapest stages around single atoms."""
        if not self._enough():
            self.raise_bound(surroundings_bound(self._relaxed, self._bound))

    def downsets(self) -> None:
        """Search exactly below the best value."""
        if self._best is not None and not self._enough():
            self._below(self._best[1].value - 1, _DOWNSETS[0])

    def raise_target(self) -> None:
        """Search exactly below rising targets; a target without a partition proves a bound."""
        low = self._bound
        for share in _SHARES:
            if self._best is None or self._relaxed_best is not None or self._enough():
                return
            target = low + int((self._best[1].value - 1 - low) * share)
            if target >= self._bound and not self._below(target, _DOWNSETS[1]):
                return

    def branches(self) -> None:
        """Close the gap between the relaxed problem and the true one by branching."""
        if self._relaxed_best is None or self._enough():
            return
        first = self._relaxed_best
        try:
            target = self._value() - 1
            listed = PathSearch(self._relaxed, target, most=_DOWNSETS[1], stop=self._time_is_up)
            for better, proven in branch(self._smaller.problem, self._relaxed, listed, first, target, self._value):
                if better is not None:
                    self._offer(self._smaller.expanded(better))
                self.raise_bound(proven)
                if self._enough():
                    return
        except TooMany:
            return

    def exchange(self) -> None:
        """Improve the best partition by moving atoms."""
        if self._best is None or self._enough() or self._problem.atoms > _EXCHANGE:
            return
        tries = _TRIES if self._problem.objective == "throughput" else 10 * _TRIES
        self._offer(improve(self._problem, self._best[0], tries=tries, stop=self._time_is_up))

    def mixed_integer(self) -> None:
        """Solve the mixed-integer program if it can model the problem and is small enough."""
        problem, stages = self._problem, self._lineup.exact_stages
        one_link = not (problem.links or problem.caller_links or problem.link.overlapped)
        alike = len(problem.kinds) == 1 and one_link
        model = all(step.replicas == 1 for step in self._lineup.steps)
        small = stages is not None and problem.atoms * stages <= _MIXED_INTEGER
        if self._enough() or not (alike and model and small) or stages is None:
            return
        from onnxsplit.partitioner.mixed_integer import solve

        left = 60.0 if self._end is None else max(0.1, self._end - time.monotonic())
        solved = solve(problem, stages, seconds=left)
        if solved.partition is not None:
            self._offer(solved.partition)
        self.raise_bound(solved.bound)

    def rearrange(self) -> None:
        """Exchange devices if links differ, and cut again for the new order of devices."""
        if not (self._problem.links or self._problem.caller_links):
            return
        before = None
        while self._best is not None and self._best[0] != before and not self._enough():
            before = self._best[0]
            self._offer(rearranged(self._problem, before, stop=self._time_is_up))
            homes = self._best[0].devices
            lineup = fixed_lineup(self._problem, homes, len(homes))
            for order in islice(linear_orders(self._problem), _FIRST_ORDERS):
                self._slice(self._whole, lineup, order)

    def _below(self, target: int, most: int) -> bool:
        """Search exactly for a bottleneck of at most the target; False when there are too many downsets."""
        if self._smaller.problem.atoms > _ATOMS:
            return False
        try:
            best = PathSearch(self._relaxed, target, most=most, stop=self._time_is_up).best()
            if best is None:
                self.raise_bound(target + 1)
                return True
            self._relaxed_best = best
            self.raise_bound(best.value)
            self._offer(self._smaller.expanded(best.partition))
        except TooMany:
            return False
        return True

    def _value(self) -> int:
        """The best value of the objective so far."""
        return NEVER if self._best is None else self._best[1].value

    def _slice(self, atoms: Contracted, lineup: Lineup, order: list[int]) -> None:
        limit = None if self._best is None or self._problem.objective != "throughput" else self._best[1].value
        sliced = slice_order(atoms.problem, lineup, order, limit=limit)
        if sliced is not None:
            self._offer(atoms.expanded(sliced))

    def _offer(self, partition: Partition) -> None:
        figures = score(self._problem, partition)
        if figures.feasible and (self._best is None or figures.rank < self._best[1].rank):
            self._best = (partition, figures)
            self._report()

    def _report(self) -> None:
        if self._best is not None:
            self._progress(self._best[1].value, self._bound)

    def _time_is_up(self) -> bool:
        return self._end is not None and time.monotonic() > self._end

    def _enough(self) -> bool:
        if self._best is None:
            return self._time_is_up()
        return self._time_is_up() or self._best[1].value <= self._bound * (1 + self._effort.gap)
