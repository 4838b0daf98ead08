"""How much time does the gateway add to a pipeline, and how does it behave under overload?

overhead   the same plan through `Pipeline` in its own process, over HTTP with binary tensors and over gRPC:
           ResNet-50 and a net of about 1 ms; p50 and p99 of one caller, throughput of eight, in turns.
identity   a model that only passes its input on, one server process: requests per second, and processor time of a
           request in the server and in the node; with --before CHECKOUT also of that code, in turns.
batching   a small net, 32 callers, with and without joining requests.
overload   three times the capacity for --seconds: answers in time, refusals with reasons, memory.

Callers run in this process, servers in theirs, all on the same cores.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np
import psutil
from onnx import helper
from served import Served

from benchmarks import harness
from benchmarks.data_path.pipeline_slices import processor_ns
from benchmarks.example_models import named_plan, products, saved
from benchmarks.gateway.callers import Call, Load, drive, over_grpc, over_http
from onnxsplit.planning.planner import partition
from runtime import Pipeline

TAKES = "10 min"


SLICE_S = 2.0


def served(plan: Path, *words: object, code: Path | None = None) -> Served:
    """Serve a plan with one thread per stage, with the code of another checkout if one is given."""
    environment = dict(os.environ)
    if code is not None:
        environment["PYTHONPATH"] = str(code)
    return Served(plan, "--threads", "1", *words, environment=environment)


def medians(loads: list[Load]) -> dict[str, float]:
    """Return the medians of slices: requests per second, and percentiles of the times."""
    return {
        "per_s": median(load.per_s for load in loads),
        "p50_ms": median(load.percentile_ms(0.5) for load in loads),
        "p99_ms": median(load.percentile_ms(0.99) for load in loads),
    }


def overhead(report: harness.Report, folder: Path, slices: int) -> None:
    """Compare calls through the pipeline, over HTTP and over gRPC."""
    plans = {"resnet50": named_plan("resnet50", folder), "1 ms net": folder / "net.plan"}
    partition(products(folder / "net.onnx", 512, 14), stages=2, out=plans["1 ms net"])
    report.note("\nOverhead: medians of slices in turns\n")
    report.note(f"{'':10} {'':10} {'p50 ms':>9} {'added':>8} {'p99 ms':>9} {'8 callers /s':>13} {'of direct':>10}")
    for name, plan in plans.items():
        inputs = harness.example(plan)
        with Pipeline.launch(plan, threads=1) as pipeline, served(plan) as server:

            def direct(pipeline: Pipeline = pipeline, inputs: dict[str, np.ndarray] = inputs) -> tuple[int, str]:
                pipeline.run(inputs)
                return 200, ""

            ways: dict[str, list[Call]] = {
                "direct": [direct] * 8,
                "HTTP": [over_http(server.host, plan.stem, inputs) for _ in range(8)],
                "gRPC": [over_grpc(server.grpc, plan.stem, inputs) for _ in range(8)],
            }
            taken = harness.in_turns(
                {way: lambda c=calls: (drive(c[:1], SLICE_S), drive(c, SLICE_S)) for way, calls in ways.items()}, slices
            )
        base = medians([one for one, _ in taken["direct"]])["p50_ms"]
        direct_per_s = [eight.per_s for _, eight in taken["direct"]]
        for way, loads in taken.items():
            alone, per_s = medians([one for one, _ in loads]), [eight.per_s for _, eight in loads]
            row = {"part": "overhead", "model": name, "way": way, "p50_ms": alone["p50_ms"], "p99_ms": alone["p99_ms"]}
            row |= {"added_ms": alone["p50_ms"] - base, "per_s_of_8": median(per_s)}
            row["of_direct"] = harness.ratio(per_s, direct_per_s).median
            report.row(
                row,
                f"{name:10} {way:10} {row['p50_ms']:9.3f} {row['added_ms']:8.3f} {row['p99_ms']:9.3f} "
                f"{row['per_s_of_8']:13.1f} {row['of_direct']:10.3f}",
            )


def with_processor_time(server: Served, calls: list[Call]) -> tuple[Load, float, float]:
    """Drive callers; return also the processor time of a request in the server and in its nodes, in microseconds."""
    processes = [server.process.pid, *(node.pid for node in psutil.Process(server.process.pid).children())]
    before = [processor_ns(pid) for pid in processes]
    load = drive(calls, SLICE_S)
    spent = [(processor_ns(pid) - then) / len(load.times) / 1e3 for pid, then in zip(processes, before, strict=True)]
    return load, spent[0], sum(spent[1:])


def identity(report: harness.Report, folder: Path, slices: int, before: Path | None) -> None:
    """Count requests per second for a model that does nothing."""
    model = saved(folder / "identity.onnx", [helper.make_node("Identity", ["x"], ["y"])], ("x", "y"), [1, 16], [])
    plan = folder / "identity.plan"
    partition(model, stages=1, out=plan)
    inputs = harness.example(plan)
    report.note("\nIdentity, one stage, 64 bytes, one server process\n")
    with ExitStack() as stack:
        servers = {"now": stack.enter_context(served(plan))}
        if before is not None:
            servers["before"] = stack.enter_context(served(plan, code=before))
        for way, callers in itertools.product(("HTTP", "gRPC"), (1, 4, 16)):
            make = over_http if way == "HTTP" else over_grpc
            contenders = {}
            for code, server in servers.items():
                address = server.host if way == "HTTP" else server.grpc
                calls = [make(address, "identity", inputs) for _ in range(callers)]
                contenders[code] = functools.partial(with_processor_time, server, calls)
            for code, taken in harness.in_turns(contenders, slices).items():
                row = medians([load for load, _, _ in taken])
                row |= {"server_us": median(one[1] for one in taken), "node_us": median(one[2] for one in taken)}
                report.row(
                    {"part": "identity", "way": way, "callers": callers, "code": code, **row},
                    f"{way:5} {callers:3} callers {code:7} {row['per_s']:9.0f} /s   p50 {row['p50_ms']:7.3f} ms   "
                    f"p99 {row['p99_ms']:7.3f} ms   {row['server_us']:5.0f} us server   {row['node_us']:5.0f} us node",
                )


def batching(report: harness.Report, folder: Path, slices: int) -> None:
    """Compare servers that join requests with one that does not."""
    plan = folder / "small.plan"
    partition(products(folder / "small.onnx", 1024, 8), stages=2, out=plan)
    inputs = harness.example(plan)
    report.note("\nDynamic batching, 8 products of 1024 x 1024, two stages, 32 callers with one row each\n")
    variants = {"off": [], "up to 8": ["--max-batch", 8], "up to 32, 2 ms": ["--max-batch", 32, "--max-delay", 2]}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(served(plan, *words)) for name, words in variants.items()}
        calls = {name: [over_http(s.host, "small", inputs) for _ in range(32)] for name, s in servers.items()}
        loads = harness.in_turns({name: lambda c=each: drive(c, SLICE_S) for name, each in calls.items()}, slices)
        for name, taken in loads.items():
            said = servers[name].json("/v2/models/small/stats")["model_stats"][0]
            row = {**medians(taken), "rows_an_execution": said["inference_count"] / said["execution_count"]}
            report.row(
                {"part": "batching", "batches": name, **row},
                f"{name:16} {row['per_s']:8.1f} /s   p50 {row['p50_ms']:7.2f} ms   p99 {row['p99_ms']:7.2f} ms   "
                f"{row['rows_an_execution']:.1f} rows an execution",
            )


def overload(report: harness.Report, folder: Path, seconds: float) -> None:
    """Send three times the capacity from a separate process in an open loop."""
    plan = named_plan("resnet50", folder)
    inputs = harness.example(plan)
    report.note(f"\nOverload of ResNet-50: three times the capacity for {seconds:.0f} s, a deadline of 500 ms\n")
    with served(plan) as server:
        process = psutil.Process(server.process.pid)
        calls = [over_http(server.host, plan.stem, inputs) for _ in range(4)]
        drive(calls, 1.0)
        before, rss_before = drive(calls, 5.0), process.memory_info().rss
        words = [server.host, plan.stem, str(plan), str(3 * before.per_s), str(seconds), "500"]
        flood = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("flood.py")), *words], stdout=subprocess.PIPE, text=True
        )
        memory = []
        while flood.poll() is None:
            memory.append(process.memory_info().rss / 2**20)
            time.sleep(seconds / 20)
        assert flood.stdout is not None
        said = json.loads(flood.stdout.read())
        after = drive(calls, 5.0)
    quarters = [round(max(memory[len(memory) * q // 4 : len(memory) * (q + 1) // 4])) for q in range(4)]
    row = {"part": "overload", "capacity_before_per_s": before.per_s, "capacity_p99_ms": before.percentile_ms(0.99)}
    row |= {**said, "capacity_after_per_s": after.per_s}
    row["goodput_of_capacity"] = said["in_time_per_s"] / ((before.per_s + after.per_s) / 2)
    row |= {"memory_before_mib": round(rss_before / 2**20), "memory_most_in_each_quarter_mib": quarters}
    report.figures(row)


def main() -> None:
    """Print the chosen tables."""
    parser = harness.parser(__doc__, TAKES)
    names = ["overhead", "identity", "batching", "overload"]
    parser.add_argument("what", nargs="*", choices=[*names, []], default=[], metavar="PART", help="default: all")
    parser.add_argument("--slices", type=int, default=10, help="slices of 2 s for each way")
    parser.add_argument("--seconds", type=float, default=60, help="seconds of overload")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="other code to compare with")
    given = parser.parse_args()
    report = harness.Report(given)
    parts = {
        "overhead": functools.partial(overhead, slices=given.slices),
        "identity": functools.partial(identity, slices=given.slices, before=given.before),
        "batching": functools.partial(batching, slices=given.slices),
        "overload": functools.partial(overload, seconds=given.seconds),
    }
    for what in given.what or names:
        with tempfile.TemporaryDirectory() as scratch:
            parts[what](report, Path(scratch))


if __name__ == "__main__":
    main()
