"""Whether a cut pays: a plan beside other ways to run the model on the same devices."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxsplit.plan import Plan
from onnxsplit.plan_verdict import Verdict, WayToRun
from onnxsplit.planning.target import Target
from onnxsplit.planning.whole_sessions import SessionTimes
from onnxsplit.tensors import size_bytes

_CLEARLY = 0.1  # another way is named as faster if it is faster than the plan by more than this share
_LEAST_DOUBT, _MOST_DOUBT = 0.05, 0.1  # a difference below the first is not told; one above the second always is


def verdict(plan: Plan, sessions: SessionTimes | None, target: Target) -> Verdict | None:
    """Compare a plan with other ways to run the model; None for a plan without stages.

    Args:
        plan: the plan, with its prediction.
        sessions: measured times of sessions of the whole model; None to take the plan's time of the whole model.
        target: the devices of the plan.
    """
    if not plan.stages:
        return None
    ways = (_stages(plan), *_sessions(plan, sessions, target), *_replicas(plan, sessions, target))
    doubt = min(_MOST_DOUBT, max(_LEAST_DOUBT, plan.costs.interval or 0.0))
    better = _better(plan, ways)
    pays = not better and not _loses(plan, ways, doubt)
    return Verdict(text=_text(plan, ways, doubt), cut_pays=pays, ways=ways)


def _better(plan: Plan, ways: Sequence[WayToRun]) -> list[WayToRun]:
    """The other ways that fit in memory and are clearly better than the plan, the best first."""
    first, *others = ways
    better = [way for way in others if way.fits and _value(plan, way) > (1 + _CLEARLY) * _value(plan, first)]
    return sorted(better, key=lambda way: -_value(plan, way))


def _loses(plan: Plan, ways: Sequence[WayToRun], doubt: float) -> bool:
    """Whether the plan is slower than the whole model in one session with the threads of a stage."""
    first, alone, *_ = ways
    return alone.fits and _value(plan, first) * (1 + doubt) < _value(plan, alone)


def _value(plan: Plan, way: WayToRun) -> float:
    """How good a way is for the plan's objective; larger is better."""
    return 1e9 / max(1, way.latency_ns) if plan.objective == "latency" else way.throughput_per_s


def _stages(plan: Plan) -> WayToRun:
    return WayToRun(
        kind="stages",
        count=len(plan.stages),
        threads=max(stage.threads for stage in plan.stages),
        throughput_per_s=plan.prediction.throughput_per_s,
        latency_ns=plan.prediction.latency_ns,
        source="predicted",
    )


def _sessions(plan: Plan, sessions: SessionTimes | None, target: Target) -> list[WayToRun]:
    """One session on the fastest device, and one with all cores of this host."""
    device = max(target.devices, key=lambda one: one.speed)
    times = [(device.threads, round(_whole_ns(plan, sessions) / device.speed), device.memory_bytes)]
    if sessions is not None and sessions.wide_threads > device.threads and target.cluster is None:
        times.append((sessions.wide_threads, sessions.wide_ns, device.memory_bytes))
    measured = sessions is not None and target.cluster is None
    return [
        WayToRun(
            kind="session",
            count=1,
            threads=threads,
            throughput_per_s=1e9 / max(1, time_ns),
            latency_ns=time_ns,
            source="measured" if measured else "predicted",
            fits=limit is None or plan.costs.whole_peak_memory_bytes <= limit,
        )
        for threads, time_ns, limit in times
    ]


def _replicas(plan: Plan, sessions: SessionTimes | None, target: Target) -> list[WayToRun]:
    """A node with the whole model on each device that the plan was made for."""
    count = len(target.devices)
    if count == 1 or (len(plan.stages) == 1 and plan.stages[0].replicas == count):
        return []
    alone_ns = _whole_ns(plan, sessions)
    if target.cluster is None and sessions is not None and sessions.copies > 1:
        alone_ns = sessions.copies_ns
    overhead = target.overhead
    moved_ns = [_moved_ns(plan, target, number) for number in range(count)]
    node_ns = [
        round(alone_ns / device.speed) + overhead.node_ns + moved
        for device, moved in zip(target.devices, moved_ns, strict=True)
    ]
    per_s = sum(1e9 / time_ns for time_ns in node_ns)
    # Shares of the work on each device, by which the cores of the caller's host are charged.
    shares = [1e9 / time_ns / per_s for time_ns in node_ns]
    stage_ns = sum(
        round(share * time_ns * threads)
        for share, time_ns, threads in zip(shares, node_ns, overhead.threads, strict=True)
    )
    least_ns = max(overhead.caller_ns, math.ceil((stage_ns + overhead.caller_ns) / overhead.cores))
    limits = [device.memory_bytes for device in target.devices if device.memory_bytes is not None]
    return [
        WayToRun(
            kind="replicas",
            count=count,
            threads=max(device.threads for device in target.devices),
            throughput_per_s=min(per_s, 1e9 / least_ns),
            latency_ns=min(node_ns) + 2 * target.link.delay_ns,
            source="predicted",
            fits=plan.costs.whole_peak_memory_bytes <= min(limits, default=math.inf),
        )
    ]


def _moved_ns(plan: Plan, target: Target, number: int) -> int:
    """Time in which a device of a cluster receives a request's inputs from the caller and sends its outputs."""
    link = target.caller_links.get(number)
    return 0 if link is None else sum(link.transfer_ns(tensor_bytes(plan, name)) for name in plan.inputs + plan.outputs)


def _whole_ns(plan: Plan, sessions: SessionTimes | None) -> int:
    """Time of a run of the whole model on a device of speed 1, in nanoseconds."""
    return sessions.one_ns if sessions is not None else plan.costs.whole_time_ns


def tensor_bytes(plan: Plan, name: str) -> int:
    """Bytes of a tensor at the sizes that the plan was made for; an unknown size counts as 1."""
    spec = plan.tensors[name]
    sizes = (
        dim if isinstance(dim, int) else plan.dims.get(f"{name}.{axis}" if dim == "?" else dim, 1)
        for axis, dim in enumerate(spec.shape or ())
    )
    return size_bytes(spec.dtype, tuple(sizes))


def _text(plan: Plan, ways: Sequence[WayToRun], doubt: float) -> str:
    _, *others = ways
    if not others[0].fits:
        fitting = [way for way in others if way.fits]
        needs = "The whole model does not fit on one device, so it must be cut."
        return needs if not fitting else f"{needs} {_ratios(plan, ways)}"
    if _loses(plan, ways, doubt):
        return _slower(plan, ways, doubt)
    text = _ratios(plan, ways)
    if better := _better(plan, ways):
        best = better[0]
        text += (
            " Replicas are faster where memory allows them: --parallel data."
            if best.kind == "replicas"
            else f" One session with {_threads(best)} is faster."
        )
    return text


def _slower(plan: Plan, ways: Sequence[WayToRun], doubt: float) -> str:
    """Text about a plan that is slower than the whole model in one session: the times, and what to use instead."""
    first, alone, *_ = ways
    before, after = (1e3 / max(1e-9, _value(plan, way)) for way in (alone, first))
    times = f"({before:.3f} -> {after:.3f} ms a request)"
    if len(plan.stages) == 1:
        verb = "is" if plan.stages[0].replicas == 1 else "are"
        head = f"{_plan_name(plan)} {verb} slower here than one session that is called directly {times}."
    else:
        head = f"Cutting makes this slower here {times}."
    clearly = [way for way in ways[1:] if way.fits and _value(plan, way) > _value(plan, alone) * (1 + doubt)]
    best = max(clearly, key=lambda way: _value(plan, way), default=alone)
    if best.kind == "replicas":
        return f"{head} Keep it whole, or use --parallel data ({best.count} replicas: {_ratio(plan, best, alone)})."
    return f"{head} Keep it whole, in one session with {_threads(best)}."


def _ratios(plan: Plan, ways: Sequence[WayToRun]) -> str:
    first, *others = ways
    parts = [f"{_ratio(plan, first, way)} one session with {_threads(way)}" for way in others if way.kind == "session"]
    alone = others[0]
    text = f"{_plan_name(plan)}: {', '.join(parts)}"
    replicas = [f"{way.count} replicas: {_ratio(plan, way, alone)}" for way in others if way.kind == "replicas"]
    return "; ".join([text, *replicas]) + "."


def _ratio(plan: Plan, one: WayToRun, other: WayToRun) -> str:
    return f"{_value(plan, one) / max(1e-9, _value(plan, other)):.2f} x"


def _plan_name(plan: Plan) -> str:
    """What a plan consists of: its stages and, if some have replicas, its nodes."""
    stages, nodes = len(plan.stages), sum(stage.replicas for stage in plan.stages)
    if stages == 1:
        return "1 stage" if nodes == 1 else f"{nodes} replicas"
    return f"{stages} stages" + (f" on {nodes} nodes" if nodes > stages else "")


def _threads(way: WayToRun) -> str:
    return "one thread" if way.threads == 1 else f"{way.threads} threads"
