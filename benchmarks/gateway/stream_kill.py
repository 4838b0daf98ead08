"""What does a client of a text see when a stage is killed in the middle of its stream?

The server runs a decoder in two processes. A client of OpenAI's API streams a text over HTTP. In the middle of it, the
process of one stage is ended by SIGKILL. Each row names the stage, the longest pause between two chunks, the longest
one of an undisturbed stream, and whether the text equals the undisturbed one, so that every token came once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from openai import OpenAI
from served import Served

from benchmarks import harness

TAKES = "2 min"

TOKENS = 120
KILLED_AFTER = 40  # chunks


def node_of(server: Served, stage: int) -> int:
    """The process that executes a stage, as the server's page shows it."""
    with urllib.request.urlopen(f"{server.http}/events", timeout=10) as events:
        for line in events:
            if line.startswith(b"data: {"):  # the lists before it are the plans and the past
                models = json.loads(line[5:])["models"]
                return next(node["pid"] for node in models[0]["nodes"] if node["stage"] == stage)
    raise AssertionError("the server sent no figures")


def stream(client: OpenAI, model: str, victim: int | None) -> tuple[str, float]:
    """Stream a text, and end a process in the middle; returns the text and the longest pause in seconds."""
    text, times = "", []
    chunks = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=TOKENS, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    for chunk in chunks:
        if not chunk.choices:
            continue
        text += chunk.choices[0].text
        times.append(time.monotonic())
        if len(times) == KILLED_AFTER and victim is not None:
            os.kill(victim, signal.SIGKILL)
    return text, max(after - before for before, after in pairwise(times))


def main() -> None:
    """Print the table."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("plan", type=Path, help="plan of a decoder with a tokenizer")
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    report = harness.Report(given, turn="4", stage="5", pause_s="7.2f", undisturbed_s="13.3f", equal="5")
    with Served(given.plan, "--threads", "1", "--max-rows", "4", environment=dict(os.environ)) as server:
        client = OpenAI(base_url=f"http://{server.host}/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        stages = len(harness.load_plan(given.plan).stages)
        for turn in range(given.turns):
            for stage in range(stages):
                expected, usual_s = stream(client, model, None)
                text, pause_s = stream(client, model, node_of(server, stage))
                report.row(
                    {
                        "turn": turn,
                        "stage": stage,
                        "pause_s": pause_s,
                        "undisturbed_s": usual_s,
                        "equal": text == expected,
                    }
                )
                time.sleep(2)


if __name__ == "__main__":
    main()
