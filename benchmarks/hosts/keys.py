"""What encryption costs: a cut run by nodes on a tcp link with keys, beside the same without.

    python benchmarks/hosts/keys.py [--slices 12] [--seconds 1] [--json]

Two stages of next to nothing with tensors of 64 KiB and of 4 MiB between them, over loopback and without shared memory,
so that all of it goes through the link; both pipelines run at once and take turns.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

import numpy as np
from environment import benchmark, environment, environment_line

from onnxsplit.session import quiet_environment
from runtime import Pipeline
from runtime.wire.keys import create_for


def launched(stack: ExitStack, plan: Path, keys: Path | None) -> Pipeline:
    """A pipeline whose nodes are on tcp."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    for name in ("a", "b"):
        command = [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address, "--no-shared-memory"]
        command += ["--threads", "1"] + (["--keys", str(keys / name)] if keys is not None else [])
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=quiet_environment())
        stack.callback(process.wait, 20)
    own = keys / "coordinator" if keys is not None else None
    return stack.enter_context(Pipeline.listen(plan, bind=address, keys=own, shared_memory=False, start_timeout=60))


def rate(pipeline: Pipeline, seconds: float) -> float:
    """Requests a second of a full pipeline."""
    one = {"x": np.ones(1, np.float32)}
    futures, begun = [], time.perf_counter()
    while time.perf_counter() < begun + seconds:
        futures.append(pipeline.submit(one))
    for future in futures:
        future.result()
    return len(futures) / (time.perf_counter() - begun)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for size in (64 << 10, 4 << 20):
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxsplit-")))
            create_for(scratch / "keys", ("a", "b"))
            plan = benchmark("data_path/hop").plan_of(size, scratch)
            both = [launched(stack, plan, keys) for keys in (scratch / "keys", None)]
            found = [[rate(pipeline, given.seconds) for pipeline in both] for _ in range(given.slices + 1)][1:]
            with_keys, plain = (statistics.median(column) for column in zip(*found, strict=True))
            ratios = sorted(a / b for a, b in found)
            rows.append(
                {
                    "bytes": size,
                    "with_keys_per_s": with_keys,
                    "plain_per_s": plain,
                    "ratio": statistics.median(ratios),
                    "ratio_low": ratios[0],
                    "ratio_high": ratios[-1],
                }
            )
    if given.json:
        print(json.dumps({"rows": rows, "environment": environment()}))
        return
    print(environment_line())
    for row in rows:
        print("  ".join(f"{name} {value:,.3f}" for name, value in row.items()))


if __name__ == "__main__":
    main()
