"""Memory of the slices of an order, from above: what a stage needs at most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxsplit.partitioner.objective import CALLER, Problem

Table = np.ndarray[Any, np.dtype[np.int64]]


def interval_memory(problem: Problem, group_of: Sequence[int], groups: int) -> Table:
    """``memory[i, j]``: a stage of the groups i to j, its constants and its largest sum of live tensors.

    A tensor is taken to live from its writer to its last reader in the whole order, a tensor for the caller to the
    end; within a stage it lives no longer, so the figure is never too small.

    Args:
        problem: the atoms.
        group_of: the position of every atom's group.
        groups: number of groups.
    """
    held = np.zeros((groups, groups), dtype=np.int64)
    for weight in problem.weights:
        readers = sorted({group_of[reader] for reader in weight.readers})
        for previous, reader in zip([-1, *readers], readers, strict=False):
            held[previous + 1 : reader + 1, reader] += weight.size_bytes
    live = np.zeros(groups, dtype=np.int64)
    for flow in problem.transfers:
        first = 0 if flow.writer == CALLER else group_of[flow.writer]
        last = groups - 1 if flow.to_caller else max((group_of[reader] for reader in flow.readers), default=first)
        live[first : last + 1] += flow.size_bytes
    for atom, size_bytes in enumerate(problem.inner_bytes):
        live[group_of[atom]] += size_bytes
    peak = np.zeros((groups, groups), dtype=np.int64)
    for begin in range(groups):
        peak[begin, begin:] = np.maximum.accumulate(live[begin:])
    return np.cumsum(held, axis=1) + peak
