"""Memory of the nodes of a plan beside one whole session and whole copies.

    python benchmarks/data_path/memory.py [NAME|MODEL.onnx ...] [--models FOLDER] [--json]

Anonymous memory is what a process has to itself; mapped files and shared memory count once for all processes, by
their proportional share (``smaps_rollup``). Taken after a dozen requests. MiB.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "models")]

import psutil
from environment import benchmark, environment, environment_line

from onnxsplit.npz import load_npz
from onnxsplit.plan_files import example_file, load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.timed import TimedModel
from runtime import Pipeline

DEFAULT = ["resnet50", "bert", "ocr-recognizer"]


def memory(pids: list[int]) -> dict[str, float]:
    """MiB of some processes together."""
    total = dict.fromkeys(("Anonymous", "Pss_File", "Pss_Shmem"), 0)
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            key, _, rest = line.partition(":")
            if key in total:
                total[key] += int(rest.split()[0])
    return {key: kib / 1024 for key, kib in total.items()}


def of_sessions(model: Path, example: Path, level: str, count: int) -> dict[str, float]:
    """Whole-model sessions, a process each."""
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(TimedModel(model, example, threads=1, level=level)).run(0.0, least=12)  # type: ignore[arg-type]
        return memory([child.pid for child in psutil.Process().children()])


def of_nodes(plan: Path, **options) -> dict[str, float]:
    """The nodes of a pipeline."""
    inputs = load_npz(example_file(plan, load_plan(plan)))
    with Pipeline.launch(plan, threads=1, **options) as pipeline:
        for future in [pipeline.submit(inputs) for _ in range(12)]:
            future.result()
        return memory([node.pid for node in pipeline.nodes if node.pid is not None])


def main() -> None:
    """Print a table a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=DEFAULT)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    model_of = benchmark("data_path/throughput").model_of
    if not given.json:
        print(environment_line())
    with tempfile.TemporaryDirectory(prefix="onnxsplit-benchmark-") as scratch:
        for name in given.names:
            model, dims = model_of(name, given.models or Path(scratch))
            plan, single = Path(scratch) / "model.plan", Path(scratch) / "single.plan"
            made = partition(model, stages=2, out=plan, dims=dims)
            partition(model, stages=1, out=single, dims=dims, rounds=0)
            example = example_file(plan, load_plan(plan))
            level = made.costs.whole_optimization_level
            rows = {
                "one whole session": of_sessions(model, example, level, 1),
                "two whole sessions": of_sessions(model, example, level, 2),
                "nodes of two stages": of_nodes(plan),
                "nodes of two stages, packed weights mapped": of_nodes(plan, share_weights=True),
                "one node of the whole": of_nodes(single),
                "two replicas of the whole": of_nodes(single, replicas=2),
                "two replicas, weights packed by each": of_nodes(single, replicas=2, share_weights=False),
            }
            if given.json:
                print(json.dumps({"model": name, "mib": rows, "environment": environment()}), flush=True)
                continue
            print(f"\n{name:45}{'anonymous':>10}{'files':>8}{'shared':>8}{'all':>8}")
            for row, found in rows.items():
                cells = [found["Anonymous"], found["Pss_File"], found["Pss_Shmem"], sum(found.values())]
                print(f"  {row:43}{cells[0]:10.0f}" + "".join(f"{cell:8.0f}" for cell in cells[1:]), flush=True)


if __name__ == "__main__":
    main()
