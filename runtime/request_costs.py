"""Measures what requests cost on this host beside the runs of their stages.

Small pipelines run under load. The processor time of their nodes, less that of the runs, and of this process is what a
request costs there. Processor time does not grow with what other processes do meanwhile. Stages with weights count for
the request itself, because their runs drop everything else from the caches. The costs of tensors are differences
between pipelines whose stages compute next to nothing.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from onnxsplit.machine_load import cpu_times
from onnxsplit.plan import HostCosts
from onnxsplit.tensors import Array
from onnxsplit.timed import low_quartile
from runtime.pipeline import Pipeline

_UNDER_WAY = 8  # requests under way in a pipeline under load
_TURNS = 5  # turns of load
_TURN_S = 0.3
_ALONE = 50  # requests of a turn of which each follows the answer to the last
_LEAST_BUSY = 0.5  # processes that hand requests to each other do not use less of the cores than this


@dataclass(frozen=True)
class Probe:
    """A plan whose stages are alike.

    Attributes:
        folder: the plan.
        inputs: its inputs.
        run_ns: time of the run of one of its stages, in nanoseconds.
    """

    folder: Path
    inputs: Mapping[str, Array]
    run_ns: int = 0


@dataclass(frozen=True)
class _Load:
    """What a pipeline did.

    Attributes:
        caller_ns: processor time of a request at the caller, in nanoseconds.
        node_ns: processor time of a request at a node, in nanoseconds.
        busy: the share of the cores that the pipeline used, of what other processes left.
    """

    caller_ns: float
    node_ns: float
    busy: float


def request_costs(
    say: Callable[[str], None], one_stage: Probe, two_stages: Probe, working: Probe, many_tensors: Probe, large: Probe
) -> HostCosts:
    """Measure the costs of requests with five plans.

    Args:
        say: called with each step.
        one_stage: a plan of one stage, with one small tensor.
        two_stages: the same with two stages.
        working: two stages with weights, and one small tensor.
        many_tensors: two stages with many small tensors.
        large: two stages with one large tensor.

    Raises:
        PipelineError: a plan does not run.
    """
    say("requests alone")
    further_ns = _further_stage_ns(one_stage, two_stages)
    say("requests under load")
    double, work = _load(two_stages), _load(working)
    say("many tensors")
    many = _load(many_tensors)
    say("a large tensor")
    heavy = _load(large)
    busy = max(_LEAST_BUSY, work.busy)
    ends = 2 * (len(many_tensors.inputs) - 1)
    size_bytes = 2 * sum(array.nbytes for array in large.inputs.values())
    byte_ns = max(0.01, (heavy.node_ns - double.node_ns - large.run_ns) / size_bytes)
    return HostCosts(
        source="measured",
        node_ns=max(0, round((work.node_ns - working.run_ns) / busy)),
        caller_ns=round(work.caller_ns / busy),
        hop_ns=max(0, round(further_ns - double.node_ns)),
        tensor_ns=max(0, round((many.node_ns - double.node_ns) / ends)),
        bytes_per_s=round(1e9 / byte_ns),
    )


def _load(probe: Probe) -> _Load:
    with Pipeline.launch(probe.folder, threads=1) as pipeline:
        pids = [node.pid for node in pipeline.nodes if node.pid is not None]
        _closed_loop(pipeline, probe.inputs)
        turns = []
        for _ in range(_TURNS):
            nodes_ns, own_ns, before = _used_ns(pids), time.process_time_ns(), cpu_times()
            count = _closed_loop(pipeline, probe.inputs)
            own_ns, nodes_ns = time.process_time_ns() - own_ns, _used_ns(pids) - nodes_ns
            idle_ns = cpu_times().idle_s_since(before) * 1e9
            turns.append((own_ns / count, nodes_ns / count / len(pids), 1 / (1 + idle_ns / (own_ns + nodes_ns))))
    caller, node, busy_shares = zip(*turns, strict=True)
    return _Load(statistics.median(caller), statistics.median(node), max(busy_shares))


def _further_stage_ns(one_stage: Probe, two_stages: Probe) -> int:
    """How much later the answer to a request alone comes for a second stage, in nanoseconds; both take turns."""
    with (
        Pipeline.launch(one_stage.folder, threads=1) as single,
        Pipeline.launch(two_stages.folder, threads=1) as double,
    ):
        times: dict[Pipeline, list[int]] = {single: [], double: []}
        for _ in range(_TURNS):
            for pipeline, taken in times.items():
                pipeline.run(dict(one_stage.inputs))
                for _ in range(_ALONE):
                    began = time.perf_counter_ns()
                    pipeline.run(dict(one_stage.inputs))
                    taken.append(time.perf_counter_ns() - began)
        return low_quartile(times[double]) - low_quartile(times[single])


def _closed_loop(pipeline: Pipeline, inputs: Mapping[str, Array]) -> int:
    """Keep the same number of requests under way for one turn; returns how many ended."""
    under_way: deque[Future[dict[str, Array]]] = deque()
    count = 0
    end = time.monotonic() + _TURN_S
    while time.monotonic() < end or under_way:
        while len(under_way) < _UNDER_WAY and time.monotonic() < end:
            under_way.append(pipeline.submit(dict(inputs)))
        under_way.popleft().result()
        count += 1
    return count


def _used_ns(pids: list[int]) -> int:
    """Processor time that processes have used over all their threads, in nanoseconds."""
    return sum(
        int((task / "schedstat").read_text().split()[0]) for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()
    )
