"""Is our gateway as fast as the network fronts of other systems, on the same stage files?

The peers are mosec, Ray Serve and a Triton ensemble. Each peer takes turns with our gateway over the same protocol; no
other peer runs meanwhile, because its background processes would slow both. Each has four callers, or requests in
flight, in a separate process, and one process and one thread per stage. The benchmark needs the extras ``serve`` and
``peers``. Triton needs the extra ``triton`` in a separate environment, whose interpreter is given by ``--python
triton=PYTHON``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import example_models, harness
from benchmarks.peers.started import Unavailable, running

TAKES = "10 min"

PAIRS = [("mosec", "gateway_http"), ("ray_serve_http", "gateway_http"), ("triton", "gateway_grpc")]
SLICE_S = 2.0


def measure(plan: Path, peer: str, ours: str, python: str, slices: int) -> dict[str, Any]:
    """Measure a peer and our gateway in turns; return the medians of the slices."""
    with running(peer, python, plan) as theirs, running(ours, sys.executable, plan) as own:
        taken = harness.in_turns({"peer": lambda: theirs.ask(SLICE_S), "ours": lambda: own.ask(SLICE_S)}, slices)
    rates = {side: [one["requests"] / one["seconds"] for one in answers] for side, answers in taken.items()}
    row: dict[str, Any] = {f"{side}_per_s": median(values) for side, values in rates.items()}
    for side, answers in taken.items():
        row |= {f"{side}_{name}": median(one[name] for one in answers) for name in ("p50_ms", "p99_ms")}
    return row | {"ours_over_peer": str(harness.ratio(rates["ours"], rates["peer"]))}


def main() -> None:
    """Print the table."""
    parser = harness.parser(__doc__, TAKES)
    models = ["resnet50", "ocr-recognizer", "chain-1ms"]
    parser.add_argument("names", nargs="*", default=models, metavar="NAME|MODEL.onnx")
    parser.add_argument("--slices", type=int, default=10, help="slices of 2 s for each")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PYTHON")
    given = parser.parse_args()
    pythons = dict(text.split("=", 1) for text in given.python)
    columns = {f"{side}_{what}": "11.2f" for side in ("peer", "ours") for what in ("per_s", "p50_ms", "p99_ms")}
    report = harness.Report(given, model="14", peer="14", **columns, ours_over_peer="19")
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.names:
            plan = example_models.named_plan(name, Path(scratch))
            for peer, ours in PAIRS:
                try:
                    row = measure(plan, peer, ours, pythons.get(peer, sys.executable), given.slices)
                    report.row({"model": name, "peer": peer, **row})
                except (Unavailable, OSError) as error:
                    report.row({"model": name, "peer": peer, "skipped": str(error)}, f"{peer}: skipped: {error}")


if __name__ == "__main__":
    main()
