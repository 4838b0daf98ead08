"""Cutting: numbers in, an assignment of atoms to stages out.

Everything here is pure and deterministic and knows nothing of ONNX: a :class:`Problem` holds integer times and
transfers, an algorithm returns an assignment, and :mod:`~onnxsplit.partitioner.objective` scores it, whoever found it.
"""

from __future__ import annotations

from onnxsplit.partitioner.bound import lower_bound
from onnxsplit.partitioner.linear import fewest_stages, slice_orders
from onnxsplit.partitioner.objective import (
    CALLER,
    Assignment,
    Infeasible,
    Problem,
    Score,
    Transfer,
    Weight,
    score,
)

__all__ = [
    "CALLER",
    "Assignment",
    "Infeasible",
    "Problem",
    "Score",
    "Transfer",
    "Weight",
    "fewest_stages",
    "lower_bound",
    "score",
    "slice_orders",
]
