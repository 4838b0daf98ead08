"""What the runtime itself costs, as stages are added: equal stages that sleep, so that no processor is short.

    python benchmarks/data_path/scaling.py [--seconds 4] [--json]

K stages in a row, each of 1, 5 or 20 ms, with 4 KiB between them. Throughput against that of one stage (1 / its time),
and the latency of one request against the sum of the stages; a stage's time is what it really slept, on average.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

import numpy as np
from environment import environment, environment_line
from onnx import TensorProto, helper, save_model

from onnxsplit.planning.planner import partition
from onnxsplit.session import quiet_environment
from runtime import Pipeline

GIVEN = {"t0": np.ones((1, 1024), np.float32)}


def plan_of(stages: int, folder: Path) -> Path:
    """A row of trivial ops, one a stage."""
    nodes = [helper.make_node("Neg", [f"t{n}"], [f"t{n + 1}"]) for n in range(stages)]
    ends = [helper.make_tensor_value_info(f"t{n}", TensorProto.FLOAT, [1, 1024]) for n in (0, stages)]
    graph = helper.make_graph(nodes, "row", ends[:1], ends[1:])
    save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), str(folder / "m.onnx")
    )
    cuts = [f"t{n}" for n in range(1, stages)]
    partition(folder / "m.onnx", out=folder / "plan", costs="analytic", **({"cut_at": cuts} if cuts else {"stages": 1}))
    return folder / "plan"


@contextmanager
def running(plan: Path, stages: int, seconds: float, folder: Path):
    """A pipeline of sleeping nodes."""
    address = f"ipc://{folder / 'control'}"
    script = str(Path(__file__).with_name("sleeping_node.py"))
    with ExitStack() as stack:
        nodes = [
            subprocess.Popen(
                [sys.executable, script, address, str(stage), str(seconds)],
                env={**quiet_environment(), "PYTHONPATH": str(ROOT)},
            )
            for stage in range(stages)
        ]
        for node in nodes:
            stack.callback(node.wait)
        yield stack.enter_context(Pipeline.listen(plan, bind=address, start_timeout=60))


def measure(stages: int, seconds: float, span: float) -> dict[str, float]:
    """One row."""
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        folder = Path(scratch)
        with running(plan_of(stages, folder), stages, seconds, folder) as pipeline:
            for _ in range(5):
                pipeline.run(GIVEN)
            latencies = []
            for _ in range(max(10, int(span / 2 / seconds / stages))):
                begun = time.perf_counter()
                pipeline.run(GIVEN)
                latencies.append(time.perf_counter() - begun)
            alone = sum(node.run_ns for node in pipeline.stats()) / 1e9
            done: list[float] = []
            end = time.monotonic() + span
            futures = []
            while time.monotonic() < end:
                futures.append(pipeline.submit(GIVEN))
                futures[-1].add_done_callback(lambda _: done.append(time.monotonic()))
            for future in futures:
                future.result()
            steady = done[pipeline.inflight : -pipeline.inflight]
            rate = (len(steady) - 1) / (steady[-1] - steady[0])
            slowest = max(node.run_ns for node in pipeline.stats()) / 1e9
    latency = statistics.median(latencies)
    return {
        "stages": stages,
        "stage_ms": seconds * 1e3,
        "slept_ms": slowest * 1e3,
        "per_s": rate,
        "of_one_stage": rate * slowest,
        "latency_ms": latency * 1e3,
        "sum_of_stages_ms": alone * 1e3,
        "added_a_hop_us": (latency - alone) / (stages + 1) * 1e6,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not given.json:
        print(environment_line())
        print("stage ms   K   slept ms   per s   of 1/stage   latency ms   sum ms   added us a hop (K + 1 hops)")
    for milliseconds in (1, 5, 20):
        for stages in range(1, 9):
            row = measure(stages, milliseconds / 1e3, given.seconds)
            if given.json:
                print(json.dumps({**row, "environment": environment()}), flush=True)
            else:
                print(
                    f"{row['stage_ms']:8.0f}{row['stages']:4}{row['slept_ms']:11.3f}{row['per_s']:8.1f}"
                    f"{row['of_one_stage']:13.3f}{row['latency_ms']:13.2f}{row['sum_of_stages_ms']:9.2f}"
                    f"{row['added_a_hop_us']:12.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
