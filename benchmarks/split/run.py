"""Cut models at several K and hold each against the whole: what `verify` prints, and predicted against measured time.

    python benchmarks/split/run.py MODEL.onnx ... [--stages 2 3 4] [--dim NAME=N ...] [--json]

Each model goes through `onnxsplit partition`, `onnxsplit run` and `onnxsplit verify`, as a user would call them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from environment import environment, environment_line


def call(*arguments: object) -> tuple[dict[str, Any], float]:
    """One command with --json: its object, and its seconds."""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "onnxsplit", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - begun
    try:
        return json.loads(done.stdout), seconds
    except json.JSONDecodeError:
        return {"error": {"message": done.stderr[-500:] or f"exit code {done.returncode}"}}, seconds


def measure(model: Path, stages: int, dims: list[str], folder: Path) -> dict[str, Any]:
    """One row of the table."""
    plan = folder / f"{model.stem}-{stages}.plan"
    sizes = [part for dim in dims for part in ("--dim", dim)]
    row: dict[str, Any] = {"model": model.stem, "stages": stages}
    made, row["partition_s"] = call("partition", model, "--stages", stages, "-o", plan, *sizes)
    if "error" in made:
        return {**row, "verdict": made["error"]["message"]}
    summary = made["summary"]
    ran, _ = call("run", plan, "--outputs", folder / "out.npz")
    if "error" in ran:
        return {**row, "verdict": ran["error"]["message"]}
    verified, _ = call("verify", plan, model)
    if "error" in verified:
        return {**row, "verdict": verified["error"]["message"]}
    rounds = summary["costs"]["rounds"]
    outputs = verified["outputs"]
    return {
        **row,
        "verdict": "good" if verified["good"] else "WRONG",
        "exact": all(output["exact"] for output in outputs),
        "difference": max(output["difference"] for output in outputs),
        "optimized": max(output["optimized"] for output in outputs),
        "moved": max(output["moved"] for output in outputs),
        "source": summary["costs"]["source"],
        "whole_ms": summary["costs"]["whole_time_ns"] / 1e6,
        "rounds": [[[t / 1e6 for t in r["predicted_ns"]], [t / 1e6 for t in r["measured_ns"]]] for r in rounds],
        "gap": summary["prediction"]["gap"],
    }


def text(row: dict[str, Any]) -> str:
    """A row for people."""
    head = f"{row['model'][:28]:28} K={row['stages']} {row['partition_s']:6.1f} s  "
    if "exact" not in row:
        return head + row["verdict"][:300]
    off = "bit-equal" if row["exact"] else f"{row['difference']:.1e}"
    rounds = "; ".join(
        f"{'/'.join(f'{t:.1f}' for t in predicted)} -> {'/'.join(f'{t:.1f}' for t in measured)}"
        for predicted, measured in row["rounds"]
    )
    return (
        f"{head}{row['verdict']:5} off {off:9} on {row['optimized']:.1e} alone {row['moved']:.1e}  "
        f"gap {row['gap']:.1%}  whole {row['whole_ms']:.1f} ms, "
        f"predicted -> measured, a round each: {rounds or 'none: ' + row['source']}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--dim", action="append", default=[], metavar="NAME=N")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not given.json:
        print(environment_line())
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        for model in given.models:
            for stages in given.stages:
                row = measure(model, stages, given.dim, Path(folder))
                print(json.dumps({**row, "environment": environment()}) if given.json else text(row), flush=True)


if __name__ == "__main__":
    main()
