"""How many requests per second does a cut answer, compared with its ceiling and with other systems?

The models are ResNet-50, BERT-base and a GPT-2 (exported here, which needs the extra torch), the OCR recogniser and
smart-turn (fetched), and two chains of products whose halves take about 1 ms and 0.3 ms, or those named. The ceiling is
the stage files running at once in separate processes with no communication; "whole-model processes" are the alternative
of a user with enough memory. Contenders take turns in slices; ratios are computed slice by slice; intervals are 95 %,
by bootstrap.

Peers (``--peers all``, or names separated by commas) run the same stage files, with one process and one thread per
stage, at the same optimisation levels, with as many requests in flight. They need the extra ``peers``; Triton needs the
extra ``triton`` in a separate environment, whose interpreter is given by ``--python triton=PYTHON``. Each peer takes
turns only with the pipeline and the ceiling, so that no peer's background processes slow another. A peer that is not
installed is skipped with a message.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import msgspec
import zoo

from benchmarks import harness
from benchmarks.example_models import CHAINS, named
from benchmarks.peers.started import INFLIGHT, Unavailable, running
from onnxsplit.errors import OnnxsplitError
from onnxsplit.planning.planner import partition
from runtime.bench import BenchReport, bench
from runtime.bench_rates import Row

TAKES = "15 min"

DEFAULT = ["resnet50", "bert", "gpt2", "ocr-recognizer", "smart-turn", *CHAINS]
PEERS = ["bare_zeromq", "mosec", "ray_serve", "ray_graph", "triton", "torch_pipeline"]


def main() -> None:
    """Print a table for each model."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*", default=DEFAULT, metavar="NAME|MODEL.onnx")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--slices", type=int, default=20)
    parser.add_argument("--peers", default="", help="all, or names separated by commas: " + ", ".join(PEERS))
    parser.add_argument("--peer-slices", type=int, default=10)
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--models", type=Path, help="folder that keeps exported models")
    given = parser.parse_args()
    peers = PEERS if given.peers == "all" else [name for name in given.peers.split(",") if name]
    pythons = dict(text.split("=", 1) for text in given.python)
    report = harness.Report(given)
    with tempfile.TemporaryDirectory(prefix="onnxsplit-benchmark-") as scratch:
        for name in given.names:
            try:
                model, dims = named(name, given.models or Path(scratch))
                plan = Path(scratch) / "model.plan"
                partition(model, stages=given.stages, out=plan, dims=dims)
                measured = bench(plan, model=model, slices=given.slices)
            except (OnnxsplitError, zoo.FetchError) as error:
                say(report, name, skipped=str(error))
                continue
            say(report, name, measured=measured)
            for peer in peers:
                try:
                    with running(peer, pythons.get(peer, sys.executable), plan) as process:
                        beside = bench(plan, slices=given.peer_slices, peers={peer: process.rate}, inflight=INFLIGHT)
                    say(report, name, peer=peer, measured=beside)
                except (Unavailable, OSError) as error:
                    say(report, name, peer=peer, skipped=str(error))


def say(
    report: harness.Report, name: str, *, peer: str = "", measured: BenchReport | None = None, skipped: str = ""
) -> None:
    """Print the figures of a model, alone or with a peer."""
    row: dict[str, Any] = {"model": name, "peer": peer}
    if measured is None:
        report.row(
            row | {"skipped": skipped}, f"  {peer}: skipped: {skipped}" if peer else f"\n{name}: skipped: {skipped}"
        )
        return
    row["report"] = msgspec.to_builtins(measured)
    if peer:
        report.row(row, line(measured.rows[-1], measured.rows[0]))
        return
    whole = f"; the whole model: {measured.whole_ns / 1e6:.2f} ms" if measured.whole_ns else ""
    latency = (
        f"  one request: {measured.latency_p50_ns / 1e6:.2f} ms median; "
        f"its stages in turn in one process: {measured.stages_ns / 1e6:.2f} ms{whole}"
    )
    head = f"\n{name}\n  {'':45} {'per second':>22}   pipeline over it"
    report.row(row, "\n".join([head, *(line(one, measured.rows[0]) for one in measured.rows), latency]))


def line(row: Row, pipeline: Row) -> str:
    """Format the line of one contender."""
    over = harness.ratio(pipeline.rates_per_s, row.rates_per_s)
    return f"  {row.name:45} {row.per_s:8.2f} ({row.low:.2f}-{row.high:.2f})   {over}"


if __name__ == "__main__":
    main()
