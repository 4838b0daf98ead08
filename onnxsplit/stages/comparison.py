"""The comparison of an output of the whole model with that of its stages (:mod:`onnxsplit.stages.verify`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxsplit.distance import LEAST_TOLERANCE, distance, is_discrete, narrowest, tolerance
from onnxsplit.tensors import Array

_SLACK = 2.0  # how many times the distance of optimisation alone is allowed
_MOST_ALLOWED = 0.5  # no distance above this is allowed, even if optimisation moves the model further


@dataclass(frozen=True)
class Comparison:
    """The comparison of one output.

    Attributes:
        output: the name of the output.
        exact: True when stages and model agree bit for bit with optimisation off.
        difference: the largest difference with optimisation off, relative to the scale; for discrete types, the share
            of elements that differ.
        optimized: the same for the stages at the plan's levels, compared with the unoptimised model.
        moved: the distance by which optimisation alone moves the whole model. Initializers that the model lists as
            inputs are constants there, as in the stages.
        provider_moved: the largest distance by which one of the plan's other providers moves the whole model; 0 if the
            stages ran on the CPU, or if no provider runs the whole model.
        repeatable: False when the whole model differs from itself on the same inputs, so that nothing can be compared.
        tolerance: the largest allowed ``difference``, and the largest allowed ``optimized`` if optimisation alone
            moves the model less. For discrete types, it is that of float32.
        narrowest: the float type that the tolerance follows; None if there is none narrower than float32.
        budget: the budget of error of narrow borders, which is allowed with and without optimisation; 0 without them.
    """

    output: str
    exact: bool
    difference: float
    optimized: float
    moved: float
    provider_moved: float = 0.0
    repeatable: bool = True
    tolerance: float = LEAST_TOLERANCE
    narrowest: str | None = None
    budget: float = 0.0

    @property
    def good(self) -> bool:
        """Whether both comparisons hold. An output that is not repeatable counts as good."""
        if not self.repeatable:
            return True
        least = max(self.tolerance, self.budget)
        moved = max(self.moved, self.provider_moved)
        allowed = max(min(_SLACK * moved, _MOST_ALLOWED), least)
        off = least if self.narrowest is None else allowed
        return self.difference <= off and self.optimized <= allowed


def compared(
    output: str,
    *,
    plain: Sequence[Array],
    optimized: Sequence[Array],
    on_providers: Sequence[Array],
    stages: Array,
    optimized_stages: Array,
    types: frozenset[str],
    budget: float,
) -> Comparison:
    """Compare one output: unoptimised runs, optimised ones and those on other providers, and both of the stages."""
    first, second = plain
    return Comparison(
        output=output,
        exact=_bits_equal(first, stages),
        difference=distance(stages, first),
        optimized=distance(optimized_stages, first),
        moved=max(distance(one, first) for one in optimized),
        provider_moved=max((distance(one, first) for one in on_providers), default=0.0),
        repeatable=_bits_equal(first, second),
        tolerance=tolerance(types if not is_discrete(first) else ()),
        narrowest=narrowest(types),
        budget=budget,
    )


def _bits_equal(left: Array, right: Array) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return bool(np.array_equal(left, right)) if left.dtype == object else left.tobytes() == right.tobytes()
