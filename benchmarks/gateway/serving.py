"""What the gateway adds to a pipeline, and what it does when there is too much.

    python benchmarks/gateway/serving.py [overhead] [identity] [batching] [overload] [--slices 10] [--seconds 60]

overhead   the same plan through `Pipeline` in its own process, over HTTP with binary tensors and over gRPC:
           ResNet-50 and a net of about 1 ms; p50 and p99 of one caller, throughput of eight, in turns.
identity   requests a second of a model that only passes its input on, one server process.
batching   a small net, 32 callers, requests joined or not.
overload   three times the capacity for --seconds: what is answered in time, what is refused and why; memory.

Callers run in this process, servers in theirs, all on the same cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests/support"), str(Path(__file__).parent)]

import numpy as np
import psutil
from callers import Call, Load, drive, over_grpc, over_http
from environment import benchmark, environment_line
from onnx import TensorProto, helper, numpy_helper, save_model
from served import Served

from onnxsplit.npz import load_npz
from onnxsplit.plan_files import example_file, load_plan
from onnxsplit.planning.planner import partition
from runtime import Pipeline

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def net(out: Path, width: int, layers: int, rows: str | int = "batch") -> Path:
    """Products with square weights, each followed by a tanh, with a free batch."""
    source = np.random.default_rng(0)
    ops, weights, last = [], [], "x"
    for step in range(layers):
        weight = source.standard_normal((width, width)).astype(np.float32) / np.float32(width**0.5)
        weights.append(numpy_helper.from_array(weight, f"w{step}"))
        result = "y" if step == layers - 1 else f"h{step}"
        ops.append(helper.make_node("MatMul", [last, f"w{step}"], [f"m{step}"]))
        ops.append(helper.make_node("Tanh", [f"m{step}"], [result]))
        last = result
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, width]) for name in ("x", "y")]
    graph = helper.make_graph(ops, "net", ends[:1], ends[1:], weights)
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), str(out))
    return out


def example(plan: Path) -> dict[str, np.ndarray]:
    """The plan's own inputs."""
    return load_npz(example_file(plan, load_plan(plan)))


def overhead(folder: Path, slices: int) -> None:
    """Through the pipeline, over HTTP, over gRPC."""
    throughput = benchmark("data_path/throughput")
    resnet, _ = throughput.model_of("resnet50", folder)
    plans = {"resnet50": folder / "resnet50.plan", "1 ms net": folder / "net.plan"}
    partition(resnet, stages=2, out=plans["resnet50"])
    partition(net(folder / "net.onnx", 512, 14), stages=2, out=plans["1 ms net"])
    print("\nOverhead: medians of slices in turns\n")
    print(f"{'':10} {'':10} {'p50 ms':>9} {'added':>8} {'p99 ms':>9} {'8 callers /s':>13} {'of direct':>10}")
    for name, plan in plans.items():
        inputs = example(plan)
        model = plan.name.removesuffix(".plan")
        with ExitStack() as stack:
            pipeline = stack.enter_context(Pipeline.launch(plan, threads=1))
            server = stack.enter_context(Served(plan, "--threads", "1", environment=ENVIRONMENT))

            def direct(pipeline: Pipeline = pipeline, inputs: dict[str, np.ndarray] = inputs) -> tuple[int, str]:
                pipeline.run(inputs)
                return 200, ""

            ways: dict[str, list[Call]] = {
                "direct": [direct] * 8,
                "HTTP": [over_http(server.host, model, inputs) for _ in range(8)],
                "gRPC": [over_grpc(server.grpc, model, inputs) for _ in range(8)],
            }
            alone: dict[str, list[Load]] = {way: [] for way in ways}
            full: dict[str, list[Load]] = {way: [] for way in ways}
            for number in range(slices + 1):
                for way, calls in ways.items():
                    one, eight = drive(calls[:1], 2.0), drive(calls, 2.0)
                    if number:  # the first warms up
                        alone[way].append(one)
                        full[way].append(eight)
            base = median(load.percentile_ms(0.5) for load in alone["direct"])
            for way in ways:
                p50 = median(load.percentile_ms(0.5) for load in alone[way])
                p99 = median(load.percentile_ms(0.99) for load in alone[way])
                rate = median(load.per_s for load in full[way])
                ratio = median(load.per_s / d.per_s for load, d in zip(full[way], full["direct"], strict=True))
                print(
                    f"{name:10} {way:10} {p50:9.3f} {p50 - base:8.3f} {p99:9.3f} {rate:13.1f} {ratio:10.3f}", flush=True
                )


def identity(folder: Path, slices: int) -> None:
    """Requests a second where the model does nothing."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", ends[:1], ends[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    save_model(proto, str(folder / "identity.onnx"))
    plan = folder / "identity.plan"
    partition(folder / "identity.onnx", stages=1, out=plan)
    inputs = example(plan)
    print("\nIdentity, one stage, 64 bytes, one server process\n")
    with Served(plan, "--threads", "1", environment=ENVIRONMENT) as server:
        for way, make, address in (("HTTP", over_http, server.host), ("gRPC", over_grpc, server.grpc)):
            for callers in (1, 4, 16):
                calls = [make(address, "identity", inputs) for _ in range(callers)]
                drive(calls, 1.0)
                loads = [drive(calls, 2.0) for _ in range(slices)]
                print(
                    f"{way:5} {callers:3} callers {median(load.per_s for load in loads):9.0f} /s   "
                    f"p50 {median(load.percentile_ms(0.5) for load in loads):7.3f} ms   "
                    f"p99 {median(load.percentile_ms(0.99) for load in loads):7.3f} ms",
                    flush=True,
                )


def batching(folder: Path, slices: int) -> None:
    """Joined or not."""
    plan = folder / "small.plan"
    partition(net(folder / "small.onnx", 1024, 8), stages=2, out=plan)
    inputs = example(plan)
    print("\nDynamic batching, 8 products of 1024 x 1024, two stages, 32 callers with one row each\n")
    variants = {"off": [], "up to 8": ["--max-batch", 8], "up to 32, 2 ms": ["--max-batch", 32, "--max-delay", 2]}
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(Served(plan, "--threads", "1", *words, environment=ENVIRONMENT))
            for name, words in variants.items()
        }
        calls = {name: [over_http(s.host, "small", inputs) for _ in range(32)] for name, s in servers.items()}
        loads: dict[str, list[Load]] = {name: [] for name in variants}
        for number in range(slices + 1):
            for name in variants:
                load = drive(calls[name], 2.0)
                if number:
                    loads[name].append(load)
        for name, found in loads.items():
            said = servers[name].json("/v2/models/small/stats")["model_stats"][0]
            rows = said["inference_count"] / said["execution_count"]
            print(
                f"{name:16} {median(load.per_s for load in found):8.1f} /s   p50 "
                f"{median(load.percentile_ms(0.5) for load in found):7.2f} ms   p99 "
                f"{median(load.percentile_ms(0.99) for load in found):7.2f} ms   {rows:.1f} rows an execution",
                flush=True,
            )


def overload(folder: Path, seconds: float) -> None:
    """Three times the capacity, from a process of its own with an open loop."""
    plan = folder / "over.plan"
    resnet, _ = benchmark("data_path/throughput").model_of("resnet50", folder)
    partition(resnet, stages=2, out=plan)
    inputs = example(plan)
    print(f"\nOverload of ResNet-50: three times the capacity for {seconds:.0f} s, a deadline of 500 ms\n")
    with Served(plan, "--threads", "1", environment=ENVIRONMENT) as server:
        process = psutil.Process(server.process.pid)
        calls = [over_http(server.host, "over", inputs) for _ in range(4)]
        drive(calls, 1.0)
        capacity = drive(calls, 5.0)
        print(f"capacity   {capacity.per_s:.1f} /s with four callers, p99 {capacity.percentile_ms(0.99):.0f} ms")
        before = process.memory_info().rss
        command = [sys.executable, str(Path(__file__).parent / "flood.py"), server.host, "over", str(plan)]
        flood = subprocess.Popen(
            [*command, str(3 * capacity.per_s), str(seconds), "500"], stdout=subprocess.PIPE, text=True
        )
        memory = []
        while flood.poll() is None:
            memory.append(process.memory_info().rss / 2**20)
            time.sleep(seconds / 20)
        assert flood.stdout is not None
        said = flood.stdout.read()
        print(said, end="")
        answered = float(said.split("answered in time")[1].split("/s")[0])
        after = drive(calls, 5.0)
        both = (capacity.per_s + after.per_s) / 2
        print(f"capacity   {after.per_s:.1f} /s afterwards")
        print(f"goodput    {answered / both:.3f} of the capacity before and after")
        quarters = [max(memory[len(memory) * q // 4 : len(memory) * (q + 1) // 4]) for q in range(4)]
        print(f"memory     {before / 2**20:.0f} MiB before; most in each quarter: "
              + ", ".join(f"{found:.0f}" for found in quarters))  # fmt: skip


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["overhead", "identity", "batching", "overload"])
    parser.add_argument("--slices", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    print(environment_line())
    for what in given.what:
        with tempfile.TemporaryDirectory() as scratch:
            begun = time.monotonic()
            if what == "overload":
                overload(Path(scratch), given.seconds)
            else:
                {"overhead": overhead, "identity": identity, "batching": batching}[what](Path(scratch), given.slices)
            print(f"({time.monotonic() - begun:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
