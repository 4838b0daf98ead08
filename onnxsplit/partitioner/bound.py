"""Lower bounds: what no partition can beat."""

from __future__ import annotations

from collections.abc import Sequence


def lower_bound(time_ns: Sequence[int], stages: int) -> int:
    """No partition into ``stages`` stages has a smaller bottleneck: the mean, or the largest single piece.

    Transfers are left out, so the bound holds whatever they cost.
    """
    return max(-(-sum(time_ns) // max(1, stages)), max(time_ns, default=0))
