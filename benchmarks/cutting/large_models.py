"""Models of 4 GB and 12 GB with external data: peak memory and time of cutting them, beside `cp` of the same bytes.

    python benchmarks/cutting/large_models.py [--gigabytes 4 12] [--folder DIR] [--json]

The models are made here (layers of 64 MiB) and removed again; the folder needs three times their size free.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import numpy as np
import onnx
from environment import environment_line
from onnx import TensorProto, helper

WIDTH = 4096


def make(folder: Path, gigabytes: int) -> Path:
    """A chain of MatMul and Relu, its weights in one file beside it."""
    layers = gigabytes * (1 << 30) // (4 * WIDTH * WIDTH)
    nodes, weights, last = [], [], "x"
    scale = (2 / WIDTH) ** 0.5  # outputs keep their size from layer to layer
    weight = (np.random.default_rng(0).standard_normal(WIDTH * WIDTH) * scale).astype(np.float32)
    with (folder / "weights.bin").open("wb") as data:
        for layer in range(layers):
            tensor = TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", "weights.bin"),
                ("offset", layer * weight.nbytes),
                ("length", weight.nbytes),
            ):
                tensor.external_data.add(key=key, value=str(value))
            weights.append(tensor)
            data.write(np.roll(weight, 997 * layer).data)  # ONNX Runtime keeps one copy of weights that are equal
            nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [f"m{layer}"]))
            nodes.append(helper.make_node("Relu", [f"m{layer}"], [f"h{layer}"]))
            last = f"h{layer}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x", last)]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "large.onnx"
    )
    return folder / "large.onnx"


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command."""
    os.sync()  # so that neither waits for what the other left to be written
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[0]} failed with {process.returncode}")
    return time.monotonic() - begun, usage.ru_maxrss * 1024


def measure(gigabytes: int, place: Path, runs: int) -> dict[str, Any]:
    """Copy and cut in turn; the medians."""
    with tempfile.TemporaryDirectory(prefix="onnxsplit-large-", dir=place) as scratch:
        folder = Path(scratch)
        model = make(folder, gigabytes)
        copies: list[float] = []
        cuts: list[float] = []
        peaks: list[int] = []
        for _ in range(runs):
            seconds, _ = timed(["cp", str(folder / "weights.bin"), str(folder / "copy.bin")])
            copies.append(seconds)
            (folder / "copy.bin").unlink()
            plan = str(folder / "large.plan")
            command = [sys.executable, "-m", "onnxsplit", "partition", str(model), "-o", plan, "--costs", "analytic"]
            seconds, peak = timed(command)
            cuts.append(seconds)
            peaks.append(peak)
            shutil.rmtree(plan)
    cp_s, cut_s = statistics.median(copies), statistics.median(cuts)
    return {"gigabytes": gigabytes, "cp_s": cp_s, "partition_s": cut_s, "ratio": cut_s / cp_s, "peak_bytes": max(peaks)}


def main() -> None:
    """Print a row a size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", nargs="+", type=int, default=[4, 12])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not given.json:
        print(environment_line())
    for gigabytes in given.gigabytes:
        row = measure(gigabytes, given.folder, given.runs)
        print(
            json.dumps(row)
            if given.json
            else f"{gigabytes} GiB: partition {row['partition_s']:.1f} s, cp {row['cp_s']:.1f} s, "
            f"ratio {row['ratio']:.2f}, peak memory {row['peak_bytes'] / 2**20:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
