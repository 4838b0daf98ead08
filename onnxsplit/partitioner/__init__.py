"""Cutting: numbers in, a partition out.

Everything here is deterministic and knows nothing of ONNX: a :class:`Problem` holds integer times and tensors, an
algorithm returns a :class:`Partition`, and :mod:`~onnxsplit.partitioner.objective` scores it, whoever found it.
"""

from __future__ import annotations

from onnxsplit.partitioner.bound import lower_bound
from onnxsplit.partitioner.lineup import Lineup, Parallel, line_up
from onnxsplit.partitioner.objective import (
    CALLER,
    NEVER,
    Infeasible,
    Kind,
    Partition,
    Problem,
    Score,
    Transfer,
    Weight,
    score,
    stage_memory,
)
from onnxsplit.partitioner.search import Effort, Found, Progress, search
from onnxsplit.partitioner.slices import fewest_stages, slice_order

__all__ = [
    "CALLER",
    "NEVER",
    "Effort",
    "Found",
    "Infeasible",
    "Kind",
    "Lineup",
    "Parallel",
    "Partition",
    "Problem",
    "Progress",
    "Score",
    "Transfer",
    "Weight",
    "lower_bound",
    "fewest_stages",
    "line_up",
    "score",
    "search",
    "slice_order",
    "stage_memory",
]
