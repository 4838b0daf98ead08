"""How many tokens per second do several sequences get, in groups that fill the stages?

Two comparisons, in turns: with two whole-model processes, which together step as many rows; and with the same sequences
ungrouped, each in a step of its own. Every session has one thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import harness
from benchmarks.decoding.setting import add_model, decode_rate, median, plan_of, prompt
from benchmarks.decoding.whole import whole_processes
from runtime import Pipeline

TAKES = "10 min"


def main() -> None:
    """Print a row for each number of sequences."""
    parser = harness.parser(__doc__, TAKES)
    add_model(parser)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--past", type=int, default=64)
    parser.add_argument("--slices", type=int, default=10)
    given = parser.parse_args()
    report = harness.Report(
        given, sequences="9d", groups="6d", per_s="8.1f", other="<24", other_per_s="11.1f", ratio="<22"
    )
    with plan_of(given) as plan:
        for sequences, groups in ((4, 4), (8, 4), (16, 4)):
            _beside_whole_models(report, plan, given, sequences, groups)
        _beside_ungrouped(report, plan, given, 16, 4)


def _beside_whole_models(
    report: harness.Report, plan: Path, given: argparse.Namespace, sequences: int, groups: int
) -> None:
    """Compare with two processes that have the whole model, and half of the groups each."""
    prompts = [prompt(given.past, seed) for seed in range(sequences)]
    rows = sequences // groups
    steps, length = given.tokens, given.past + given.tokens + 8
    with (
        Pipeline.launch(plan, threads=1, max_rows=sequences, decode_groups=groups) as pipeline,
        whole_processes(2, given.model, rows=rows, groups=groups // 2, length=length, past=given.past) as processes,
    ):

        def whole() -> float:
            for process in processes:
                process.begin(steps)
            return sequences * steps / max(process.seconds() for process in processes)

        results = harness.in_turns(
            {"ours": lambda: decode_rate(pipeline, prompts, given.tokens), "other": whole}, given.slices
        )
    _print(report, sequences, groups, "two whole processes", results)


def _beside_ungrouped(
    report: harness.Report, plan: Path, given: argparse.Namespace, sequences: int, groups: int
) -> None:
    """Compare with the same sequences, each in a step of its own."""
    prompts = [prompt(given.past, seed) for seed in range(sequences)]
    with (
        Pipeline.launch(plan, threads=1, max_rows=sequences, decode_groups=groups) as grouped,
        Pipeline.launch(plan, threads=1, max_rows=sequences, decode_groups=sequences) as single,
    ):
        results = harness.in_turns(
            {
                "ours": lambda: decode_rate(grouped, prompts, given.tokens),
                "other": lambda: decode_rate(single, prompts, given.tokens),
            },
            given.slices,
        )
    _print(report, sequences, groups, "the same ungrouped", results)


def _print(
    report: harness.Report, sequences: int, groups: int, other: str, results: Mapping[str, Sequence[float]]
) -> None:
    report.row(
        {
            "sequences": sequences,
            "groups": groups,
            "per_s": median(results["ours"]),
            "other": other,
            "other_per_s": median(results["other"]),
            "ratio": str(harness.ratio(results["ours"], results["other"])),
        }
    )


if __name__ == "__main__":
    main()
