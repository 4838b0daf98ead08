"""How much memory do the nodes of a plan take, compared with sessions and replicas of the whole model?

Anonymous memory belongs to one process. Mapped files and shared memory count once for all processes, by their
proportional share (``smaps_rollup``). Memory is read after a dozen requests, in MiB.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import psutil

from benchmarks import example_models, harness
from onnxsplit.planning.planner import partition
from onnxsplit.timed import TimedModel
from runtime import Pipeline

TAKES = "4 min"

KINDS = {"Anonymous": "anonymous", "Pss_File": "files", "Pss_Shmem": "shared"}
"""The kinds of memory, as the kernel names them and as they are printed."""
DEFAULT = ["resnet50", "bert", "ocr-recognizer"]


def memory(pids: list[int]) -> dict[str, float]:
    """Return the memory of these processes together, in MiB."""
    total = dict.fromkeys(KINDS, 0)
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            key, _, rest = line.partition(":")
            if key in total:
                total[key] += int(rest.split()[0])
    return {KINDS[key]: kib / 1024 for key, kib in total.items()}


def of_sessions(model: Path, example: Path, level: str, count: int) -> dict[str, float]:
    """Measure the memory of whole-model sessions, each in its own process."""
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(TimedModel(model, example, threads=1, level=level)).run(0.0, least=12)  # type: ignore[arg-type]
        return memory([child.pid for child in psutil.Process().children()])


def of_nodes(plan: Path, **options) -> dict[str, float]:
    """Measure the memory of the nodes of a pipeline."""
    inputs = harness.example(plan)
    with Pipeline.launch(plan, threads=1, **options) as pipeline:
        for future in [pipeline.submit(inputs) for _ in range(12)]:
            future.result()
        return memory([node.pid for node in pipeline.nodes if node.pid is not None])


def rows(model: Path, dims: dict[str, int], folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the name and the memory of each way to run a model."""
    plan, single = folder / "model.plan", folder / "single.plan"
    level = partition(model, stages=2, out=plan, dims=dims).costs.whole_optimization_level
    partition(model, stages=1, out=single, dims=dims, rounds=0)
    example = harness.example_path(plan)
    yield "one whole session", of_sessions(model, example, level, 1)
    yield "two whole sessions", of_sessions(model, example, level, 2)
    yield "nodes of two stages", of_nodes(plan)
    yield "nodes of two stages, packed weights mapped", of_nodes(plan, share_weights=True)
    yield "one node with the whole model", of_nodes(single)
    yield "two replicas of the whole", of_nodes(single, replicas=2)
    yield "two replicas, weights packed by each", of_nodes(single, replicas=2, share_weights=False)


def main() -> None:
    """Print the table."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*", default=DEFAULT, metavar="NAME|MODEL.onnx")
    parser.add_argument("--models", type=Path, help="folder that keeps exported models")
    given = parser.parse_args()
    report = harness.Report(given, model="14", what="43", anonymous="9.0f", files="6.0f", shared="6.0f", all="6.0f")
    with tempfile.TemporaryDirectory(prefix="onnxsplit-benchmark-") as scratch:
        for name in given.names:
            model, dims = example_models.named(name, given.models or Path(scratch))
            for what, sizes in rows(model, dims, Path(scratch)):
                report.row({"model": name, "what": what, **sizes, "all": sum(sizes.values())})


if __name__ == "__main__":
    main()
