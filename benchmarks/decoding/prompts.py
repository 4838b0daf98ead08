"""How long does a long prompt take in overlapping chunks, and how long do other sequences wait meanwhile?

The same prompt as one chunk and in chunks that follow each other through the stages, in turns; the figure is the time
to the first token. Then other sequences generate while the prompt comes in; the figure is their longest gap between two
tokens, in times of one chunk of the slower stage.
"""

from __future__ import annotations

import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np

from benchmarks import harness
from benchmarks.decoding.setting import add_model, first_token_s, plan_of, prompt
from runtime import Pipeline

TAKES = "5 min"


def main() -> None:
    """Print the figures."""
    parser = harness.parser(__doc__, TAKES)
    add_model(parser)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--others", type=int, default=4)
    parser.add_argument("--slices", type=int, default=9)
    given = parser.parse_args()
    report = harness.Report(given)
    text = prompt(given.length)
    with plan_of(given) as plan:
        with (
            Pipeline.launch(plan, threads=1, prefill_chunk=given.chunk) as chunked,
            Pipeline.launch(plan, threads=1, prefill_chunk=given.length) as unchunked,
        ):
            results = harness.in_turns(
                {"whole": lambda: first_token_s(unchunked, text), "chunks": lambda: first_token_s(chunked, text)},
                given.slices,
            )
            report.figures(
                {
                    "s to the first token, one chunk": float(np.median(results["whole"])),
                    "s to the first token, overlapping chunks": float(np.median(results["chunks"])),
                    "chunks faster by": str(harness.ratio(results["whole"], results["chunks"])),
                }
            )
        with Pipeline.launch(plan, threads=1, prefill_chunk=given.chunk) as pipeline:
            chunk_s = _chunk_s(pipeline, given.chunk)
            gaps = [_longest_gap(pipeline, text, given.others) for _ in range(given.slices)]
        report.figures(
            {
                "s of one chunk through all stages": chunk_s,
                "longest gap of others, s, median": float(np.median(gaps)),
                "longest gap of others, s, worst": max(gaps),
                "in chunk times, median": float(np.median(gaps)) / chunk_s,
            }
        )


def _chunk_s(pipeline: Pipeline, chunk: int) -> float:
    """Seconds that one chunk takes through all stages, at half of the context."""
    return float(np.median([first_token_s(pipeline, prompt(chunk, seed)) for seed in range(5)]))


def _longest_gap(pipeline: Pipeline, text: list[int], others: int) -> float:
    """The longest time between two tokens of other sequences while a long prompt comes in."""
    stop = threading.Event()
    times: list[list[float]] = [[] for _ in range(others)]

    def follow(number: int) -> None:
        generation = pipeline.generate(prompt(16, number), max_tokens=600, stop_tokens=())
        for _ in generation:
            times[number].append(time.perf_counter())
            if stop.is_set():
                generation.cancel()
                return

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(others)]
    for thread in threads:
        thread.start()
    while any(len(one) < 8 for one in times):
        time.sleep(0.01)
    begun = time.perf_counter()
    first_token_s(pipeline, text)
    ended = time.perf_counter()
    stop.set()
    for thread in threads:
        thread.join()
    return max(
        later - earlier for one in times for earlier, later in pairwise(one) if later > begun and earlier < ended
    )


if __name__ == "__main__":
    main()
