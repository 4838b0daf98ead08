"""Which families of decoders are found, proven and cut, and do they give plain ONNX Runtime's tokens?

One row for each model: how its states behave, how rows share a run, what crosses the cut, and whether the greedy tokens
of a pipeline with two and with three stages are those of one plain session. Models are the random small ones of the
tests, and any files that are named.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np
import onnx
from decoder_runs import FAMILIES, Family, Reference
from decoders import write_genai_config

from benchmarks import harness
from onnxsplit.decoder.reference import ReferenceDecoder
from onnxsplit.errors import OnnxsplitError
from onnxsplit.plan import Plan
from onnxsplit.planning.planner import partition
from runtime import Pipeline

TAKES = "10 min"
_TOKENS = 24

Expected = Callable[[Path, Plan, Sequence[int]], list[int]]
"""The tokens that plain ONNX Runtime gives for a prompt."""


def main() -> None:
    """Print a row for each model."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument(
        "models", nargs="*", type=Path, help="model files; the small ones of the tests when none is named"
    )
    given = parser.parse_args()
    report = harness.Report(
        given, model="<26", states="<18", rows="<5", chunk="<7", apart="8.1e", crosses="<7", tokens="<15", why="<1"
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="onnxsplit-benchmark-") as scratch:
        for name, file, expected in _named(given.models) if given.models else _small(Path(scratch)):
            report.row({"model": name, **_row(file, expected, Path(scratch))})


def _named(files: Sequence[Path]) -> Iterator[tuple[str, Path, Expected]]:
    """Model files; the reference is one session, fed as the plan says."""

    def expected(file: Path, plan: Plan, prompt: Sequence[int]) -> list[int]:
        assert plan.decoder is not None
        return ReferenceDecoder(file, plan.decoder, plan.tensors, threads=1).greedy(prompt, _TOKENS)[0]

    for file in files:
        yield file.parent.name if file.stem == "model" else file.stem, file, expected


def _small(scratch: Path) -> Iterator[tuple[str, Path, Expected]]:
    """A small model of every family; the reference is one session, fed by what the test knows of the family."""
    for name, family in FAMILIES.items():
        model = family.make()
        folder = scratch / name.replace(" ", "-").replace(",", "")
        folder.mkdir()
        onnx.save(model, folder / "model.onnx")
        if name.startswith("gqa"):
            write_genai_config(folder)

        def expected(_: Path, __: Plan, prompt: Sequence[int], family: Family = family) -> list[int]:
            return Reference(family).greedy(prompt, _TOKENS)

        yield name, folder / "model.onnx", expected


def _row(file: Path, expected: Expected, scratch: Path) -> dict[str, object]:
    """Cut a model in two and in three, and compare the texts."""
    row: dict[str, object] = {}
    crosses, same = [], []
    for stages in (2, 3):
        folder = scratch / f"{file.parent.name}-{stages}.plan"
        said: list[str] = []
        try:
            plan = partition(file, stages=stages, out=folder, say=said.append)
        except OnnxsplitError as error:
            return {**row, "why": f"{stages} stages: {error}"[:100]}
        decoder = plan.decoder
        if decoder is None:
            return {**row, "why": next((line for line in said if "decoder" in line), "no decoder")[:160]}
        kinds = Counter(state.kind for state in decoder.states)
        row["states"] = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        row["rows"], row["chunk"] = decoder.rows, decoder.chunk
        row["apart"] = max(decoder.proof.differences.values(), default=0.0) if decoder.proof is not None else None
        crosses.append(len(plan.cuts))
        same.append(_same_texts(file, folder, plan, expected))
    row["crosses"] = " / ".join(map(str, crosses))
    row["tokens"] = " / ".join("equal" if one else "DIFFERENT" for one in same)
    return row


def _same_texts(file: Path, folder: Path, plan: Plan, expected: Expected) -> bool:
    """Whether four sequences at once get the tokens that each gets from one plain session."""
    decoder = plan.decoder
    assert decoder is not None
    source = np.random.default_rng(3)
    bound = decoder.tokens_below or decoder.vocabulary
    prompts = [[int(token) for token in source.integers(0, bound, length)] for length in (9, 3, 14, 9)]
    with Pipeline.launch(folder, threads=1, prefill_chunk=4) as pipeline:
        generations = [pipeline.generate(prompt, max_tokens=_TOKENS, stop_tokens=()) for prompt in prompts]
        texts = [list(one.result().tokens) for one in generations]
    return texts == [expected(file, plan, prompt) for prompt in prompts]


if __name__ == "__main__":
    main()
