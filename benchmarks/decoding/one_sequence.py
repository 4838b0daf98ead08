"""What does one sequence cost in a cut decoder, compared with one session that has its states in place?

Scores are compared token by token. The bytes between two stages are those that TCP has sent, by the kernel's own count,
with nodes that share no memory. Both sides use one thread for each session, and take turns.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np

from benchmarks import harness
from benchmarks.decoding.setting import add_model, plan_of, processor_s, prompt
from benchmarks.decoding.whole import WholeDecoder
from runtime import Pipeline

TAKES = "5 min"


def sent_bytes(sender: int, receiver: int) -> int:
    """Bytes that one process has sent to another over TCP so far."""
    lines = subprocess.run(["ss", "-tinpH"], capture_output=True, text=True, check=True).stdout
    entries = re.split(r"\n(?=\S)", lines)
    ports = {port for entry in entries if f"pid={receiver}," in entry for port in re.findall(r":(\d+)\s", entry)[:1]}
    total = 0
    for entry in entries:
        ends = re.findall(r":(\d+)\s", entry)
        if f"pid={sender}," in entry and len(ends) > 1 and ends[1] in ports:
            total += int((re.search(r"bytes_sent:(\d+)", entry) or [0, 0])[1])
    return total


def bytes_a_token(plan: Path, context: int, count: int) -> float:
    """Bytes that the first stage sends the second for each token, at a context of so many positions."""
    with nodes_over_tcp(plan) as (pipeline, pids):
        sent = []
        for added in (1, 1, count + 1):
            pipeline.generate(prompt(context), max_tokens=added, stop_tokens=()).result()
            time.sleep(0.2)
            sent.append(sent_bytes(pids[0], pids[1]))
        for_prompt, for_all = sent[1] - sent[0], sent[2] - sent[1]
        return (for_all - for_prompt) / count


class nodes_over_tcp:  # noqa: N801
    """A pipeline whose nodes are separate commands that share no memory."""

    def __init__(self, plan: Path) -> None:
        self._plan = plan

    def __enter__(self) -> tuple[Pipeline, list[int]]:
        from tests.support.ports import free_port  # type: ignore[import-not-found]

        address = f"tcp://127.0.0.1:{free_port()}"
        words = [sys.executable, "-m", "onnxsplit", "node", "--connect", address, "--threads", "1"]
        self._nodes = [
            subprocess.Popen([*words, "--stage", str(stage), "--no-shared-memory"], env={**os.environ})
            for stage in range(2)
        ]
        self._pipeline = Pipeline.listen(self._plan, bind=address, shared_memory=False)
        return self._pipeline, [node.pid for node in self._nodes]

    def __exit__(self, *_: object) -> None:
        self._pipeline.close()
        for node in self._nodes:
            node.wait(10)


def main() -> None:
    """Print the figures."""
    parser = harness.parser(__doc__, TAKES)
    add_model(parser)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--past", type=int, default=128)
    parser.add_argument("--slices", type=int, default=15)
    given = parser.parse_args()
    report = harness.Report(given)
    with plan_of(given) as plan:
        whole = WholeDecoder(given.model, length=given.past + given.tokens + 8)
        text = prompt(given.past)
        with Pipeline.launch(plan, threads=1) as pipeline:
            ours = pipeline.generate(text, max_tokens=given.tokens, stop_tokens=(), scores=True).result()
            tokens, scores = whole.greedy(text, given.tokens)
            apart = float(np.abs(ours.scores - scores).max() / np.abs(scores).max())
            report.figures({"same tokens": list(ours.tokens) == tokens, "scores apart, share of scale": apart})

            def pipelined() -> tuple[float, float]:
                pids = [node.pid for node in pipeline.nodes] + [os.getpid()]
                generation = pipeline.generate(text, max_tokens=given.tokens, stop_tokens=())
                next(generation)
                spent, begun = processor_s(pids), time.perf_counter()
                for _ in generation:
                    pass
                return (given.tokens - 1) / (time.perf_counter() - begun), processor_s(pids) - spent

            def alone() -> tuple[float, float]:
                whole.restart(0)
                token = int(whole.step(0, np.array([text], np.int64))[0].argmax())
                spent, begun = time.process_time(), time.perf_counter()
                for _ in range(given.tokens - 1):
                    token = int(whole.step(0, np.array([[token]], np.int64))[0].argmax())
                return (given.tokens - 1) / (time.perf_counter() - begun), time.process_time() - spent

            results = harness.in_turns({"pipeline": pipelined, "session": alone}, given.slices)
        rates = {name: [one[0] for one in values] for name, values in results.items()}
        spent = {name: [one[1] for one in values] for name, values in results.items()}
        report.figures(
            {
                "tokens/s, pipeline": float(np.median(rates["pipeline"])),
                "tokens/s, one session": float(np.median(rates["session"])),
                "pipeline over session": str(harness.ratio(rates["pipeline"], rates["session"])),
                "the same by processor time": str(harness.ratio(spent["session"], spent["pipeline"])),
            }
        )
        for context in (64, 2000):
            report.figures({f"bytes a token from stage 0 to 1 at {context}": bytes_a_token(plan, context, 32)})


if __name__ == "__main__":
    main()
