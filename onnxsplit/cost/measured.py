"""Costs of ops, measured by profiling the model on this host.

The model is profiled in a process of its own, at the optimisation level that runs it fastest and with the number of
threads that its stages will have. Every op gets a unique name there, by which the events of ONNX Runtime's profile are
attributed to ops. A kernel that the optimiser renamed is found by the tensor that it writes. The time of an op that the
optimiser inserted is charged to the next known kernel. The time of a fused kernel goes to the op in it that has the
most work.

One run without optimisation shows the shape of every tensor. It does not show types: where an op lacks a half-precision
kernel, ONNX Runtime runs the float32 kernel between casts, and the profile shows float32. Types that shape inference
does not find come from a session that has these tensors as outputs, which reports their true types.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from onnxsplit.cost import OpCosts
from onnxsplit.cost.analytic import analytic_costs
from onnxsplit.cost.levels import best_level
from onnxsplit.cost.profile import Profile, run_profile
from onnxsplit.custom_ops import Library
from onnxsplit.effort import TimeBudget
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.in_memory import runnable
from onnxsplit.model.shapes import Shapes, infer_shapes
from onnxsplit.npz import save_npz
from onnxsplit.plan import TensorSpec
from onnxsplit.tensors import TRAVELLING_TYPES, Array
from onnxsplit.timed_worker import InPlace

_ANY_RANK = frozenset(["If", "Loop", "Reshape", "Scan", "SequenceAt", "OptionalGetElement", "Squeeze"])
"""Ops whose outputs may have another rank in the next run."""


def measured_costs(
    graph: OpGraph,
    shapes: Shapes,
    inputs: Mapping[str, Array],
    *,
    threads: int,
    provider: str,
    budget: TimeBudget,
    say: Callable[[str], None],
    custom_ops: Sequence[Library] = (),
    in_place: InPlace = (),
) -> OpCosts:
    """Profile a model on example inputs.

    Args:
        graph: the model.
        shapes: types and shapes of its tensors, as far as shape inference found them.
        inputs: the example inputs.
        threads: threads of the session.
        provider: execution provider.
        budget: how long to measure.
        say: called with each step.
        custom_ops: libraries of custom ops that the session loads.
        in_place: pairs of an output and the input in whose memory it is written.

    Raises:
        ModelError: the model does not run on the inputs.
    """
    with (
        runnable(graph.source, as_in_stages=True) as source,
        tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder,
    ):
        file = Path(folder) / "inputs.npz"
        save_npz(file, inputs)
        say("observing shapes")
        untyped = tuple(name for name in graph.producer if name not in shapes.specs)
        how: dict[str, Any] = {"threads": threads, "provider": provider, "custom_ops": custom_ops, "in_place": in_place}
        profiled = partial(run_profile, source, file, **how)
        seen = profiled(level="disabled", seconds=0.0, untyped=untyped)
        if seen.opaque:  # the shares of the ops, and their shapes, are then those on the CPU
            profiled = partial(profiled, provider="cpu")
            seen = profiled(level="disabled", seconds=0.0, untyped=untyped)
        say("timing optimisation levels")
        chosen = best_level(source.path, file, budget=budget, data_folder=source.data_folder, **how)
        level, whole_ns = chosen.level, chosen.time_ns
        say(f"profiling ops at level {level}")
        profile = profiled(level=level, seconds=4 * budget.sample_s)
    known = _ranks(graph, shapes, seen)
    if known:
        shapes = infer_shapes(graph, {name: array.shape for name, array in inputs.items()}, known)
    shapes = shapes.observed(seen.sizes, seen.types)
    times = _scaled(_charged_to_most_work(graph, shapes, profile.op_ns), whole_ns)
    return OpCosts(time_ns=times, whole_ns=whole_ns, level=level, source="measured", shapes=shapes, moved=chosen.moved)


def _scaled(times_ns: Sequence[int], total_ns: int) -> tuple[int, ...]:
    """Times scaled to another sum: profiling slows every event down alike, and a run without the profiler is known."""
    measured_ns = sum(times_ns) or 1
    return tuple(time_ns * total_ns // measured_ns for time_ns in times_ns)


def _ranks(graph: OpGraph, shapes: Shapes, seen: Profile) -> dict[str, TensorSpec]:
    """Types and ranks that a run showed for outputs of ops without an inference rule, such as trees and custom ops.

    Outputs of the ops in :data:`_ANY_RANK` are left out.
    """
    specs = {}
    for name, size in seen.sizes.items():
        spec, op = shapes.specs.get(name), graph.ops[graph.producer[name]]
        dtype = spec.dtype if spec is not None else seen.types.get(name)
        if dtype in TRAVELLING_TYPES and (spec is None or spec.shape is None) and op.op_type not in _ANY_RANK:
            specs[name] = TensorSpec(dtype=dtype, shape=("?",) * len(size))
    return specs


def _charged_to_most_work(graph: OpGraph, shapes: Shapes, op_ns: Sequence[int]) -> list[int]:
    """Move the time of every fused kernel to the op in it that has the most work.

    A kernel is identified by the tensor that it writes, so its time belongs to its last op at first, such as the
    activation after a convolution. An op without a kernel of its own is taken to be fused into a kernel if all its
    readers belong to that kernel.
    """
    work = analytic_costs(graph, shapes).time_ns
    kernel: list[int | None] = [None] * len(graph.ops)
    heaviest = list(range(len(graph.ops)))
    for op in reversed(graph.ops):
        if op_ns[op.index]:
            kernel[op.index] = op.index
            continue
        kernels = {kernel[reader] for name in op.outputs for reader in graph.readers.get(name, ())}
        if len(kernels) == 1 and op.index not in graph.constant_ops and (one := kernels.pop()) is not None:
            kernel[op.index] = one
            if work[op.index] > work[heaviest[one]]:
                heaviest[one] = op.index
    times = [0] * len(graph.ops)
    for op_index, time_ns in enumerate(op_ns):
        times[heaviest[op_index]] += time_ns
    return times
