"""The same stage files behind a network front: ours, mosec, Ray Serve and a Triton ensemble, in turns.

    python benchmarks/peers/gateways.py [NAME|MODEL.onnx ...] [--slices 10] [--python triton=PYTHON] [--json]

Each peer takes turns with our gateway over the same protocol (A B A B), alone on the machine with it, so that no
third one's background processes slow either. Each has four callers, or requests in flight, in a process of its own
with it; a process and a thread a stage. Needs the extras ``serve`` and ``peers``; Triton the extra ``triton``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from environment import benchmark, environment_line

from onnxsplit.planning.planner import partition

PAIRS = [("mosec", "gateway_http"), ("ray_serve_http", "gateway_http"), ("triton", "gateway_grpc")]
SLICE_S = 2.0


def main() -> None:
    """Print a table a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["resnet50", "ocr-recognizer", "chain-1ms"])
    parser.add_argument("--slices", type=int, default=10)
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    pythons = dict(text.split("=", 1) for text in given.python)
    throughput = benchmark("data_path/throughput")
    if not given.json:
        print(environment_line())
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.names:
            model, dims = throughput.model_of(name, Path(scratch))
            plan = Path(scratch) / "model.plan"
            partition(model, stages=2, out=plan, dims=dims)
            if not given.json:
                print(
                    f"\n{name}\n{'':16} {'per second':>10} {'p50 ms':>8} {'p99 ms':>8}   ours over it, slice by slice"
                )
            for peer, ours in PAIRS:
                try:
                    with (
                        throughput.started(peer, pythons.get(peer, sys.executable), plan) as theirs,
                        throughput.started(ours, sys.executable, plan) as own,
                    ):
                        rows = [(theirs.slice(SLICE_S), own.slice(SLICE_S)) for _ in range(given.slices + 1)][1:]
                except (throughput.Unavailable, OSError) as error:
                    print(f"{peer}: skipped: {error}", flush=True)
                    continue
                ratios = sorted(rate(b) / rate(a) for a, b in rows)
                if given.json:
                    print(json.dumps({"model": name, "peer": peer, "ours": ours, "slices": rows}), flush=True)
                    continue
                for label, side in ((peer, 0), (ours, 1)):
                    found = [row[side] for row in rows]
                    tail = f"   {median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})" if side else ""
                    print(
                        f"{label:16} {median(map(rate, found)):10.1f} {median(f['p50_ms'] for f in found):8.2f} "
                        f"{median(f['p99_ms'] for f in found):8.2f}{tail}",
                        flush=True,
                    )


def rate(found: dict[str, float]) -> float:
    """Answers a second."""
    return found["requests"] / found["seconds"]


if __name__ == "__main__":
    main()
