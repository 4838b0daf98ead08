"""Rates of contenders that took turns, compared with one of them slice by slice."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence

from onnxsplit.plan_base import PlanStruct

_RESAMPLES = 2000  # samples of the bootstrap


class Row(PlanStruct, frozen=True, kw_only=True):
    """One contender.

    Attributes:
        name: its name.
        per_s: its rate in requests per second, the median of all slices.
        low: lower end of the rate's 95 % interval.
        high: upper end of it.
        ratio: its rate divided by that of the contender that is the basis, the median of all slices.
        ratio_low: lower end of the ratio's 95 % interval.
        ratio_high: upper end of it.
        rates_per_s: its rates in the slices.
    """

    name: str
    per_s: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rates_per_s: tuple[float, ...]


def compare(rates: Mapping[str, Sequence[float]], basis: str) -> tuple[Row, ...]:
    """A row for each contender, from its rates in all slices.

    Args:
        rates: the rates of each contender, by name.
        basis: the contender that ratios are relative to.
    """
    return tuple(_row(name, rates[name], rates[basis]) for name in rates)


def _row(name: str, rates: Sequence[float], basis: Sequence[float]) -> Row:
    ratios = [mine / other for mine, other in zip(rates, basis, strict=True)]
    low, high = _interval(rates)
    ratio_low, ratio_high = _interval(ratios)
    return Row(
        name=name,
        per_s=statistics.median(rates),
        low=low,
        high=high,
        ratio=statistics.median(ratios),
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        rates_per_s=tuple(rates),
    )


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median, by bootstrap with a fixed seed."""
    source = random.Random(0)  # noqa: S311  statistics, not secrets
    medians = sorted(statistics.median(source.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return medians[int(_RESAMPLES * 0.025)], medians[int(_RESAMPLES * 0.975)]
