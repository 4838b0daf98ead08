"""Throughput of a cut beside its ceiling and what a user could pick instead.

    python benchmarks/data_path/throughput.py [NAME|MODEL.onnx ...] [--peers all|NAME,...] [--json]

Without names: ResNet-50, BERT-base and a GPT-2 (exported here, which needs the extra torch), the OCR recogniser and
smart-turn (fetched), and two chains of products whose halves take about 1 ms and 0.3 ms. The ceiling is the stage
files running at once in separate processes with no communication; "whole-model processes" is what a user with memory
to spare would run. Contenders take turns in slices; ratios are taken slice by slice; intervals are 95 %, by bootstrap.

Peers run the same stage files, a process and a thread a stage, at the same optimisation levels, with as many requests
in flight. They need the extra ``peers``, and Triton the extra ``triton`` in an environment of its own, whose
interpreter ``--python triton=PYTHON`` names. Each takes turns with the pipeline and the ceiling alone, so that no
peer's background processes slow another. One that is not installed is skipped with a message.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "models")]

import msgspec
import numpy as np
import zoo
from environment import ended, environment, environment_line
from onnx import TensorProto, helper, numpy_helper, save_model

from onnxsplit.errors import OnnxsplitError
from onnxsplit.export import export
from onnxsplit.plan_files import example_file, load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.session import quiet_environment
from runtime.bench import BenchReport, bench

CHAINS = {"chain-1ms": (512, 28), "chain-0.3ms": (256, 24)}  # width, products
DEFAULT = ["resnet50", "bert", "gpt2", "ocr-recognizer", "smart-turn", *CHAINS]
PEERS = ["bare_zeromq", "mosec", "ray_serve", "ray_graph", "triton", "torch_pipeline"]
INFLIGHT = 4  # two a stage, as the pipeline's own


def model_of(name: str, folder: Path) -> tuple[Path, dict[str, int]]:
    """The file of a recipe, of a model of the zoo, or the file named; and sizes for its free dimensions."""
    if Path(name).is_file():
        return Path(name), {}
    if name in zoo.entries():
        return zoo.fetch(name), zoo.entries()[name].get("dims", {})
    out = folder / f"{name}.onnx"
    if name in CHAINS:
        chain(out, *CHAINS[name])
    elif not out.exists():
        export(str(ROOT / "models" / f"{name}.py"), out)
    return out, {}


def chain(out: Path, width: int, length: int) -> None:
    """Products of 16 rows with square weights, each followed by a tanh."""
    source = np.random.default_rng(0)
    nodes, weights, last = [], [], "input"
    for step in range(length):
        weight = source.standard_normal((width, width)).astype(np.float32) / np.float32(width**0.5)
        weights.append(numpy_helper.from_array(weight, f"w{step}"))
        result = "output" if step == length - 1 else f"h{step}"
        nodes.append(helper.make_node("MatMul", [last, f"w{step}"], [f"m{step}"]))
        nodes.append(helper.make_node("Tanh", [f"m{step}"], [result]))
        last = result
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [16, width]) for name in ("input", "output")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), str(out))


class Unavailable(Exception):
    """A peer cannot run here."""


class Peer:
    """A peer's process: started, then asked for spans of time. ``rate`` is answers a second."""

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self._process = process
        self._errors = errors
        self.line()

    def line(self) -> bytes:
        """The next thing it says."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            words = self._errors.read().decode(errors="replace").strip().splitlines()
            raise Unavailable(words[-1] if words else "it ended without a word")
        return line

    def rate(self, seconds: float) -> float:
        """Answers a second over a span."""
        answer = self.slice(seconds)
        return answer["requests"] / answer["seconds"]

    def slice(self, seconds: float) -> dict[str, float]:
        """What a span gave: requests, seconds, and the 50th and 99th percentile of their times."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"%f\n" % seconds)
        self._process.stdin.flush()
        answer: dict[str, float] = json.loads(self.line())
        return answer


@contextmanager
def started(name: str, python: str, plan: Path) -> Iterator[Peer]:
    """A peer that runs the plan's stages, in an interpreter that has what it needs."""
    script = ROOT / "benchmarks" / "peers" / f"{name}_peer.py"
    example = example_file(plan, load_plan(plan))
    command = [python, str(script), str(plan), str(example), "--inflight", str(INFLIGHT)]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=quiet_environment()
        )
        try:
            yield Peer(process, errors)
        finally:
            ended(process, 60)


def main() -> None:
    """Print a table a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=DEFAULT)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--slices", type=int, default=20)
    parser.add_argument("--peers", default="", help="all, or names with commas between: " + ", ".join(PEERS))
    parser.add_argument("--peer-slices", type=int, default=10)
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--models", type=Path, help="a folder to keep exported models in")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    peers = PEERS if given.peers == "all" else [name for name in given.peers.split(",") if name]
    pythons = dict(text.split("=", 1) for text in given.python)
    if not given.json:
        print(environment_line())
    with tempfile.TemporaryDirectory(prefix="onnxsplit-benchmark-") as scratch:
        for name in given.names:
            try:
                model, dims = model_of(name, given.models or Path(scratch))
                plan = Path(scratch) / "model.plan"
                partition(model, stages=given.stages, out=plan, dims=dims)
                report = bench(plan, model=model, slices=given.slices)
            except (OnnxsplitError, zoo.FetchError) as error:
                say(given.json, name, skipped=str(error))
                continue
            say(given.json, name, report=report)
            for peer in peers:
                try:
                    with started(peer, pythons.get(peer, sys.executable), plan) as running:
                        beside = bench(plan, slices=given.peer_slices, peers={peer: running.rate}, inflight=INFLIGHT)
                    say(given.json, name, peer=peer, report=beside)
                except (Unavailable, OSError) as error:
                    say(given.json, name, peer=peer, skipped=str(error))


def say(as_json: bool, name: str, *, peer: str = "", report: BenchReport | None = None, skipped: str = "") -> None:
    """One result, for people or as a line of JSON."""
    if as_json:
        found = {"model": name, "peer": peer, "environment": environment()}
        found |= {"report": msgspec.to_builtins(report)} if report is not None else {"skipped": skipped}
        print(json.dumps(found), flush=True)
    elif report is None:
        print(f"  {peer}: skipped: {skipped}" if peer else f"\n{name}: skipped: {skipped}", flush=True)
    elif peer:
        print(line(report.rows[-1]), flush=True)
    else:
        print(f"\n{name}\n  {'':45} {'per second':>22}   pipeline over it")
        for row in report.rows:
            print(line(row))
        whole = f"; the whole model: {report.whole_ns / 1e6:.2f} ms" if report.whole_ns else ""
        print(
            f"  one request: {report.latency_p50_ns / 1e6:.2f} ms median; "
            f"its stages in turn in one process: {report.stages_ns / 1e6:.2f} ms{whole}",
            flush=True,
        )


def line(row) -> str:
    """A contender's line."""
    return (
        f"  {row.name:45} {row.per_s:8.2f} ({row.low:.2f}-{row.high:.2f})   "
        f"{row.ratio:.3f} ({row.ratio_low:.3f}-{row.ratio_high:.3f})"
    )


if __name__ == "__main__":
    main()
