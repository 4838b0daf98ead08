"""How much sooner does the first token come where another sequence had the same beginning?

Pairs of prompts begin alike and end differently. The second of each pair is read with prefix reuse and without, in
turns. A part of a prompt is what one run computes (``--prefill-chunk``), and whole parts only are taken over.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import harness
from benchmarks.decoding.setting import add_model, first_token_s, median, plan_of, prompt
from runtime import Pipeline

TAKES = "2 min"

CHUNKS = (128, 32)


def main() -> None:
    """Print the figures."""
    parser = harness.parser(__doc__, TAKES)
    add_model(parser)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--alike", type=int, default=496, help="tokens that two prompts begin with")
    parser.add_argument("--slices", type=int, default=5)
    given = parser.parse_args()
    report, numbers = harness.Report(given), count()

    def second_s(pipeline: Pipeline) -> float:
        number = next(numbers)
        begin = prompt(given.alike, number)
        ends = [prompt(given.length - given.alike, seed) for seed in (number + 10_000, number + 20_000)]
        first_token_s(pipeline, begin + ends[0])
        return first_token_s(pipeline, begin + ends[1])

    with plan_of(given) as plan:
        for chunk in CHUNKS:
            options = {"threads": 1, "max_rows": 4, "prefill_chunk": chunk}
            with (
                Pipeline.launch(plan, prefix_reuse=True, **options) as reusing,
                Pipeline.launch(plan, prefix_reuse=False, **options) as plain,
            ):
                ways = {"reuse": lambda one=reusing: second_s(one), "no reuse": lambda one=plain: second_s(one)}
                times = harness.in_turns(ways, given.slices)
                report.figures(
                    {
                        f"parts of {chunk}: s to the first token, no reuse": median(times["no reuse"]),
                        f"parts of {chunk}: s to the first token, reuse": median(times["reuse"]),
                        f"parts of {chunk}: sooner by": str(harness.ratio(times["no reuse"], times["reuse"])),
                        f"parts of {chunk}: tokens taken over": reusing.sequences.reused_tokens,
                    }
                )


if __name__ == "__main__":
    main()
