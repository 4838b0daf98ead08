"""How much faster is a step whose states are written in place than one that copies them?

Two plans of the same model, in turns: one as it is cut, and one whose states were declared to be appended. With 8 rows
and a long context, the copies are what a step spends.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np

from benchmarks import harness
from benchmarks.decoding.setting import add_model, decode_rate, plan_of, prompt
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from runtime import Pipeline

TAKES = "1 h"


def override(plan: Path, folder: Path) -> Path:
    """Write a file that declares the states of a plan to be appended."""
    lines = []
    decoder = load_plan(plan).decoder
    assert decoder is not None
    for state in decoder.states:
        lines.append(
            f'[[state]]\npast = "{state.past}"\npresent = "{state.present}"\nkind = "append"\n'
            f"axis = {state.axis}\nbatch_axis = {state.batch_axis}\n"
        )
    file = folder / "decoder.toml"
    file.write_text("\n".join(lines))
    return file


def main() -> None:
    """Print the figures."""
    parser = harness.parser(__doc__, TAKES)
    add_model(parser)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=960)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--slices", type=int, default=7)
    given = parser.parse_args()
    report = harness.Report(given)
    prompts = [prompt(given.context, seed) for seed in range(given.rows)]
    with plan_of(given) as in_place, tempfile.TemporaryDirectory(prefix="onnxsplit-benchmark-") as scratch:
        appended = Path(scratch) / "append.plan"
        cuts = sorted({cut.tensor for cut in load_plan(in_place).cuts})
        partition(given.model, cut_at=cuts, out=appended, decoder=override(in_place, Path(scratch)))
        options = {"threads": 1, "max_rows": given.rows, "decode_groups": 1}
        with Pipeline.launch(in_place, **options) as one, Pipeline.launch(appended, **options) as other:
            results = harness.in_turns(
                {
                    "in place": lambda: decode_rate(one, prompts, given.tokens),
                    "appended": lambda: decode_rate(other, prompts, given.tokens),
                },
                given.slices,
            )
    report.figures(
        {
            "tokens/s, in place": float(np.median(results["in place"])),
            "tokens/s, appended": float(np.median(results["appended"])),
            "ratio": str(harness.ratio(results["in place"], results["appended"])),
        }
    )


if __name__ == "__main__":
    main()
