"""Does every sequence get every token once, and the right ones, while nodes are killed?

First, sequences are in flight when a node of each stage gets SIGKILL; the figure is the longest pause. Then many
sequences of random lengths run while a node is killed at regular intervals. Every text is compared with the one that
the same prompt gives in a pipeline where nothing fails. At the end, no node may hold a state of a sequence, and the
nodes' memory is compared with their memory before.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import harness
from benchmarks.decoding.setting import add_model, plan_of, prompt
from onnxsplit.plan_files import load_plan
from runtime import Pipeline

TAKES = "30 min"


def pause(
    plan: Path, stage: int, count: int, prompts: Sequence[list[int]], expected: Sequence[list[int]], *, exact: bool
) -> dict[str, object]:
    """Kill the node of a stage while sequences are in flight."""
    sequences = len(prompts)
    with Pipeline.launch(plan, threads=1, max_rows=sequences, exact_replay=exact) as pipeline:
        times: list[list[float]] = [[] for _ in range(sequences)]
        texts: list[list[int]] = [[] for _ in range(sequences)]

        def follow(number: int) -> None:
            for token in pipeline.generate(prompts[number], max_tokens=count, stop_tokens=()):
                texts[number].append(token)
                times[number].append(time.monotonic())

        threads = [threading.Thread(target=follow, args=(number,)) for number in range(sequences)]
        for thread in threads:
            thread.start()
        while min(map(len, times)) < count // 4:
            time.sleep(0.01)
        old = next(node for node in pipeline.nodes if node.stage == stage)
        os.kill(old.pid, signal.SIGKILL)
        killed = time.monotonic()
        restarted_s = None
        while restarted_s is None and any(thread.is_alive() for thread in threads):
            new = [node for node in pipeline.nodes if node.stage == stage and node.state == "ready"]
            if new and new[0].pid != old.pid:
                restarted_s = time.monotonic() - killed
            time.sleep(0.005)
        for thread in threads:
            thread.join()
        right = sum(text == expected[number] for number, text in enumerate(texts))
        longest = max(max(b - a for a, b in pairwise(one)) for one in times)
        return {"stage": stage, "right": f"{right} of {sequences}", "pause_s": longest, "restart_s": restarted_s}


def resident_bytes(pids: list[int]) -> int:
    """Memory of processes that is in use, in bytes."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Print the figures."""
    parser = harness.parser(__doc__, TAKES)
    add_model(parser)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--many", type=int, default=1000)
    parser.add_argument("--most-tokens", type=int, default=24)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two kills")
    parser.add_argument("--fast-replay", action="store_true", help="read lost texts in parts, which may change them")
    given = parser.parse_args()
    report = harness.Report(given)
    with plan_of(given) as plan:
        decoder = load_plan(plan).decoder
        assert decoder is not None
        bound = min(40_000, decoder.tokens_below or decoder.vocabulary)
        source = random.Random(1)
        few = [prompt(16, number, below=bound) for number in range(given.sequences)]
        many = [
            (prompt(source.randint(1, 40), number, below=bound), source.randint(1, given.most_tokens))
            for number in range(given.many)
        ]
        with Pipeline.launch(plan, threads=1, max_rows=16) as calm:
            expected = _texts(calm, [(text, given.tokens) for text in few])
            expected_many = _texts(calm, many)
        for stage in range(given.stages if few else 0):
            report.figures(pause(plan, stage, given.tokens, few, expected, exact=not given.fast_replay))
        if many:
            report.figures(_many(plan, given.every, many, expected_many))


def _texts(pipeline: Pipeline, jobs: Sequence[tuple[list[int], int]]) -> list[list[int]]:
    """Continue each text by a number of tokens."""
    generations = [pipeline.generate(text, max_tokens=count, stop_tokens=()) for text, count in jobs]
    return [list(one.result().tokens) for one in generations]


def _many(
    plan: Path, every_s: float, jobs: Sequence[tuple[list[int], int]], expected: Sequence[list[int]]
) -> dict[str, object]:
    """Run many sequences while nodes are killed."""
    with Pipeline.launch(plan, threads=1, max_rows=16, attempts=100) as pipeline:
        ended = threading.Event()
        kills = 0

        def kill() -> None:
            nonlocal kills
            source = random.Random(1)
            while not ended.wait(every_s):
                ready = [node for node in pipeline.nodes if node.state == "ready"]
                if ready:
                    os.kill(source.choice(ready).pid, signal.SIGKILL)
                    kills += 1

        def one(number: int) -> bool:
            text, count = jobs[number]
            return list(pipeline.generate(text, max_tokens=count, stop_tokens=())) == expected[number]

        thread = threading.Thread(target=kill)
        thread.start()
        begun = time.monotonic()
        with ThreadPoolExecutor(32) as pool:
            right = sum(pool.map(one, range(len(jobs))))
        spent_s = time.monotonic() - begun
        ended.set()
        thread.join()
        while sum(node.state == "ready" for node in pipeline.nodes) < len(pipeline.plan.stages):
            time.sleep(0.1)
        memory = []
        for _ in range(3):
            with ThreadPoolExecutor(32) as pool:
                again = sum(pool.map(one, range(len(jobs))))
            time.sleep(2)
            memory.append(resident_bytes([node.pid for node in pipeline.nodes]) >> 20)
        stats = pipeline.stats()
        return {
            "right": f"{right} of {len(jobs)}",
            "s": spent_s,
            "kills": kills,
            "replays": pipeline.sequences.replays,
            "right again, without kills": f"{again} of {len(jobs)}",
            "sequences that nodes still hold": sum(node.sequences for node in stats),
            "bytes of states that nodes still hold": sum(node.state_bytes for node in stats),
            "MiB of both nodes after 1, 2 and 3 rounds": str(memory),
        }


if __name__ == "__main__":
    main()
