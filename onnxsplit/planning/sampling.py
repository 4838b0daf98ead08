"""Times of models that are taken in turns, with how sure they are.

Models of one group run at once, as they will in a pipeline; groups take turns, so that a machine that becomes slower or
faster does so for all of them. Each turn gives one sample of each model: the lower quartile of what its runs cost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from onnxsplit.effort import SLOW_S, TimeBudget
from onnxsplit.machine_load import cpu_times
from onnxsplit.timed import Runs, TimedModel, low_quartile, run_together

LEAST_INTERVAL = 0.01
"""The least half-width of an interval, as a share: what processes on one host do to each other's caches."""

BETWEEN_PROCESSES = 0.03
"""How far the time of a file in one process is from that in another, as a share: its memory lies elsewhere there."""

BESIDE_OTHERS = 0.08
"""How much more processor time runs take beside others that use all cores, as a share: these use the caches, too.

Beside two busy loops on two cores, bottlenecks of 18 networks were 3 % above those of the idle machine in the median,
and 4.9 % in the upper quartile (``benchmarks/cutting/busy_machine.py``).
"""

_WIDE = 0.05  # samples that are further apart are taken again once
_ONE_SIDED = 1.645  # standard deviations of a normal distribution that leave 5 % on one side
_FEW = 2.0  # the interval of two samples is this much wider than their distance


@dataclass(frozen=True)
class Samples:
    """Samples of groups of models.

    Attributes:
        costs_ns: for each group, for each of its models, the samples in nanoseconds.
        disturbed: the share of the host's cores that other processes used meanwhile.
    """

    costs_ns: tuple[tuple[tuple[int, ...], ...], ...]
    disturbed: float

    def typical_ns(self, group: int) -> tuple[int, ...]:
        """The time of each model of a group, in nanoseconds."""
        return tuple(map(low_quartile, self.costs_ns[group]))

    @property
    def spread(self) -> float:
        """How far the samples of a model are apart, for the model for which this is most, as :func:`spread`."""
        return max((spread(samples) for group in self.costs_ns for samples in group), default=0.0)

    @property
    def interval(self) -> float:
        """The half-width of the interval of all times, as a share of each: for these processes, and for others."""
        return math.hypot(self.spread, BETWEEN_PROCESSES, BESIDE_OTHERS * self.disturbed)


def spread(samples: Sequence[int]) -> float:
    """The half-width of the 95 % interval of a time that is known from a few samples, as a share of the time.

    The time is the lower quartile. The number of samples below it is binomial, whatever their distribution, so two of
    the sorted samples are the ends of its interval. Single samples that were disturbed do not widen it.
    """
    ordered, count = sorted(samples), len(samples)
    above = math.ceil(count / 4 + _ONE_SIDED * math.sqrt(count * 3 / 16))
    low, typical, high = ordered[0], max(1, low_quartile(ordered)), ordered[min(count - 1, above)]
    far = max(high - typical, typical - low) / typical
    return max(LEAST_INTERVAL, far * (_FEW if count < 3 else 1.0))


def take_samples(groups: Sequence[Sequence[TimedModel]], budget: TimeBudget, *, again: bool = True) -> Samples:
    """Run groups of models in turns.

    A slow model is run once for each sample; the first run of the slowest models counts, too. Where the samples are far
    apart, as on a busy machine, as many are taken again.

    Args:
        groups: the groups.
        budget: how long to measure.
        again: False takes fewer samples of a slow model, and takes none again.
    """
    before, own_ns = cpu_times(), -time.process_time_ns()
    first = [run_together(group, 0.0, least=1) for group in groups]
    own_ns += _used_ns(first)
    longest_s = max((runs.wall_ns[0] for group in first for runs in group), default=0) / 1e9
    slow = longest_s > SLOW_S
    wanted = budget.samples_of(longest_s) if slow else budget.samples
    first_counts = slow and wanted == budget.least_samples
    costs = [[[runs.cost_ns] if first_counts else [] for runs in group] for group in first]
    turns = wanted - (budget.least_samples if slow and not again else int(first_counts))
    samples = Samples((), 0.0)
    for attempt in range(2):
        for _ in range(turns):
            for group, so_far in zip(groups, costs, strict=True):
                taken = run_together(group, 0.0 if slow else budget.sample_s, least=1)
                own_ns += _used_ns([taken])
                for runs, values in zip(taken, so_far, strict=True):
                    values.append(runs.cost_ns)
        own_s = (own_ns + time.process_time_ns()) / 1e9
        disturbed = cpu_times().busy_share_since(before, own_s)
        samples = Samples(tuple(tuple(map(tuple, group)) for group in costs), disturbed)
        if attempt or slow or not again or samples.spread <= _WIDE:
            break
    return samples


def _used_ns(groups: Sequence[Sequence[Runs]]) -> int:
    return sum(runs.used_ns for group in groups for runs in group)
