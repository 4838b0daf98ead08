"""When the requests of a load start."""

from __future__ import annotations

import random
from collections.abc import Iterator

from onnxsplit.errors import InputError
from onnxsplit.numbers import real_problem, whole_problem
from onnxsplit.plan_base import PlanStruct

MOST_PER_S = 1e6
"""The highest rate of an open loop, in requests per second."""

MOST_CONCURRENCY = 10_000
"""The most requests that a closed loop has in flight."""


class OpenLoop(PlanStruct, frozen=True, kw_only=True):
    """Requests start at their times, whether or not earlier ones were answered, as those of independent clients do.

    Attributes:
        per_s: the mean rate in requests per second.
        poisson: False: all gaps between requests are equal. True: gaps are exponential, as those of many independent
            clients are, so that requests come in bursts.
        seed: the seed of the gaps; the same seed gives the same times.
    """

    per_s: float
    poisson: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raise InputError for a rate that is out of range."""
        if problem := real_problem("the request rate", self.per_s, MOST_PER_S):
            raise InputError(problem)

    def due_ns(self) -> Iterator[int]:
        """Generate the times at which requests are due, in ns since the beginning, without end."""
        gap_ns = 1e9 / self.per_s
        if not self.poisson:
            number = 0
            while True:
                yield round(number * gap_ns)
                number += 1
        gaps, at_ns = random.Random(self.seed), 0.0  # noqa: S311  arrivals, not secrets
        while True:
            at_ns += gaps.expovariate(1.0) * gap_ns
            yield round(at_ns)


class ClosedLoop(PlanStruct, frozen=True, kw_only=True):
    """As many requests as asked are in flight all the time: each answer starts the next request.

    Attributes:
        concurrency: the number of requests in flight.
    """

    concurrency: int

    def check(self) -> None:
        """Raise InputError for a concurrency that is out of range."""
        if problem := whole_problem("the concurrency", self.concurrency, 1, MOST_CONCURRENCY):
            raise InputError(problem)


Pattern = OpenLoop | ClosedLoop
