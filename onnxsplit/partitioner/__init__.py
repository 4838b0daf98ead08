"""Partitioning algorithms: they take numbers and return a partition.

Everything here is deterministic and independent of ONNX. A :class:`Problem` holds integer times and tensor sizes, an
algorithm returns a :class:`Partition`, and :mod:`~onnxsplit.partitioner.objective` scores the partitions of all
algorithms alike.
"""

from __future__ import annotations

from onnxsplit.partitioner.bound import lower_bound
from onnxsplit.partitioner.lineup import Lineup, Parallel, fixed_lineup, line_up
from onnxsplit.partitioner.objective import (
    NEVER,
    DeviceKind,
    Infeasible,
    Partition,
    Problem,
    Score,
    Transfer,
    Way,
    Weight,
    score,
    stage_memory,
)
from onnxsplit.partitioner.overhead import Overhead
from onnxsplit.partitioner.search import Effort, Progress, SearchResult, search
from onnxsplit.partitioner.slices import fewest_stages, slice_order
from onnxsplit.plan import CALLER

__all__ = [
    "CALLER",
    "NEVER",
    "Effort",
    "SearchResult",
    "Infeasible",
    "DeviceKind",
    "Lineup",
    "Overhead",
    "Parallel",
    "Partition",
    "Problem",
    "Progress",
    "Score",
    "Transfer",
    "Way",
    "Weight",
    "lower_bound",
    "fewest_stages",
    "fixed_lineup",
    "line_up",
    "score",
    "search",
    "slice_order",
    "stage_memory",
]
