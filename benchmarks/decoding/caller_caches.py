"""How much processor time does a token take when the caches stay on the nodes, and when the caller carries them?

The same plan in two pipelines, in turns: one generates, in the other the caller passes the caches in and out as inputs
and outputs of ordinary requests. Processor time is that of the nodes and of this process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np

from benchmarks import harness
from benchmarks.decoding.setting import add_model, plan_of, processor_s, prompt
from onnxsplit.plan_files import load_plan
from runtime import Pipeline

TAKES = "5 min"


def main() -> None:
    """Print the figures."""
    parser = harness.parser(__doc__, TAKES)
    add_model(parser)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--slices", type=int, default=7)
    given = parser.parse_args()
    report = harness.Report(given)
    text = prompt(given.context)
    with plan_of(given) as folder, Pipeline.launch(folder, threads=1) as pipeline:
        states = load_plan(folder).decoder.states  # type: ignore[union-attr]
        pids = [node.pid for node in pipeline.nodes] + [os.getpid()]
        caches: dict[str, np.ndarray] = {}
        for state in states:
            caches[state.past] = np.zeros(state.shape, np.float32)
        prepared = _step(pipeline, states, caches, text, 0)
        moved = [0]

        def resident() -> float:
            generation = pipeline.generate(text, max_tokens=given.tokens + 1, stop_tokens=())
            next(generation)
            before = processor_s(pids)
            for _ in generation:
                pass
            return (processor_s(pids) - before) / given.tokens * 1e3

        def carried() -> float:
            scores, held = prepared
            before = processor_s(pids)
            for number in range(given.tokens):
                token = int(scores.argmax())
                moved[0] = sum(array.nbytes for array in held.values())
                scores, held = _step(pipeline, states, held, [token], given.context + number)
            return (processor_s(pids) - before) / given.tokens * 1e3

        results = harness.in_turns({"resident": resident, "carried": carried}, given.slices)
        report.figures(
            {
                "ms of processor time a token, caches on the nodes": float(np.median(results["resident"])),
                "ms of processor time a token, caches through the caller": float(np.median(results["carried"])),
                "ratio": str(harness.ratio(results["carried"], results["resident"])),
                "MB of caches each way through the caller": moved[0] / 1e6,
            }
        )


def _step(pipeline, states, caches, tokens, past):  # type: ignore[no-untyped-def]
    """Run tokens as an ordinary request; returns the last scores and the caches."""
    mask = np.ones((1, past + len(tokens)), np.int64)
    outputs = pipeline.run({"input_ids": np.array([tokens]), "attention_mask": mask, **caches})
    return outputs["logits"][0, -1], {state.past: outputs[state.present] for state in states}


if __name__ == "__main__":
    main()
