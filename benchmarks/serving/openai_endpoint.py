"""What does the endpoint for OpenAI's clients cost, compared with ``Pipeline.generate``?

Both sides answer the same conversation with the same plan, and take turns: eight streams over HTTP against eight
generations in this process, and one of each for the time to the first token. The endpoint also renders the chat
template and encodes its text; ``generate`` gets the tokens. The server and its clients are processes of their own.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from served import Served

from benchmarks import harness
from benchmarks.decoding.setting import median
from runtime import Pipeline

TAKES = "5 min"

MESSAGES = [{"role": "user", "content": "Tell me about the sea, the ships on it and the people who sail them."}]


async def stream(host: str, count: int) -> tuple[float, float, int]:
    """Read one stream; returns when its first token and its end came, and its number of tokens."""
    wanted = {"messages": MESSAGES, "max_tokens": count, "temperature": 0, "ignore_eos": True}
    body = json.dumps({**wanted, "stream": True, "stream_options": {"include_usage": True}}).encode()
    name, port = host.split(":")
    reader, writer = await asyncio.open_connection(name, int(port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    raw = await reader.read(1 << 16)
    first = time.perf_counter()
    if not raw.startswith(b"HTTP/1.1 200"):
        raise SystemExit(raw.decode())
    while not raw.endswith(b"0\r\n\r\n"):
        raw += await reader.read(1 << 16)
    ended = time.perf_counter()
    writer.close()
    lines = [line for line in raw.split(b"\n") if line.startswith(b"data: {")]
    return first, ended, json.loads(lines[-1][6:])["usage"]["completion_tokens"]


def over_http(host: str, streams: int, count: int) -> tuple[float, float]:
    """Seconds until the first token, in the mean of all streams, and tokens per second of all together."""

    async def all_streams() -> list[tuple[float, float, int]]:
        return await asyncio.gather(*(stream(host, count) for _ in range(streams)))

    begun = time.perf_counter()
    ends = asyncio.run(all_streams())
    first = sum(first - begun for first, _, _ in ends) / streams
    return first, sum(tokens for _, _, tokens in ends) / (max(ended for _, ended, _ in ends) - begun)


def direct(pipeline: Pipeline, prompt: tuple[int, ...], streams: int, count: int) -> tuple[float, float]:
    """The same for generations."""
    begun = time.monotonic_ns()
    generations = [pipeline.generate(prompt, max_tokens=count, stop_tokens=()) for _ in range(streams)]
    times = [generation.result().times_ns for generation in generations]
    first = sum(each[0] - begun for each in times) / streams / 1e9
    return first, sum(map(len, times)) / (max(each[-1] for each in times) - begun) * 1e9


def main() -> None:
    """Measure, and report medians and ratios."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--plan", type=Path, required=True, help="a plan with a tokenizer and a chat template")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    report = harness.Report(given, way="10s", first_token_ms="14.2f", tokens_per_s="12.1f")
    options = {"threads": 1, "max_rows": given.streams, "cache_bytes": "512M"}
    words = ["--threads", 1, "--max-rows", given.streams, "--cache-bytes", "512M"]
    with (
        Pipeline.launch(given.plan, **options) as pipeline,
        Served(given.plan, *words, environment={**os.environ}) as s,
    ):
        assert pipeline.text is not None
        prompt = pipeline.text.chat_tokens(MESSAGES)
        ways = {
            "generate": lambda: (direct(pipeline, prompt, 1, 8), direct(pipeline, prompt, given.streams, given.tokens)),
            "endpoint": lambda: (over_http(s.host, 1, 8), over_http(s.host, given.streams, given.tokens)),
        }
        taken = harness.in_turns(ways, given.rounds)
    first_ms = {way: [1e3 * one[0] for one, _ in taken[way]] for way in taken}
    per_s = {way: [many[1] for _, many in taken[way]] for way in taken}
    for way in taken:
        report.row({"way": way, "first_token_ms": median(first_ms[way]), "tokens_per_s": median(per_s[way])})
    added = [over - own for over, own in zip(first_ms["endpoint"], first_ms["generate"], strict=True)]
    report.note(f"\nendpoint over generate: {harness.ratio(per_s['endpoint'], per_s['generate'])} of the tokens/s")
    report.note(f"time to first token: {median(added):+.2f} ms")


if __name__ == "__main__":
    main()
