"""How fast are streams of OpenAI's endpoint beside clients that stall, leave and come again, and what is left of those?

Half of the streams read steadily. The others read steadily too, or are odd: one half of them never read, and the other
half leave STAY seconds after the first token and come again at once. Both take turns, and the figure is the rate of the
first half. In the end the server must have no sequence and no bytes of caches that belong to one, and as many sockets
as before.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import psutil
from served import Served
from waiting import wait_until

from benchmarks import harness
from benchmarks.decoding.setting import median
from benchmarks.serving.openai_endpoint import MESSAGES, stream

TAKES = "3 min"


async def ask(host: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask for a long text, and read nothing of it."""
    reader, writer = await asyncio.open_connection(*host.split(":"))
    body = json.dumps({"messages": MESSAGES, "stream": True, "max_tokens": 4000, "ignore_eos": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    return reader, writer


async def stall(host: str) -> None:
    """A client that never reads."""
    _, writer = await ask(host)
    try:
        await asyncio.sleep(3600)
    finally:
        writer.transport.abort()


async def leave(host: str, stay_s: float, left: list[int]) -> None:
    """A client that leaves some time after the first token, and comes again."""
    while True:
        reader, writer = await ask(host)
        try:
            await reader.read(1 << 12)
            await asyncio.sleep(stay_s)
        finally:
            writer.transport.abort()
        left[0] += 1


async def beside(host: str, count: int, steady: int, others: Callable[[], list[Coroutine[Any, Any, Any]]]) -> float:
    """Tokens per second of steady streams, beside others."""
    tasks = [asyncio.create_task(other) for other in others()]
    begun = time.perf_counter()
    ends = await asyncio.gather(*(stream(host, count) for _ in range(steady)))
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await task
    return sum(tokens for _, _, tokens in ends) / (max(ended for _, ended, _ in ends) - begun)


def main() -> None:
    """Measure, and report the rates and what is left."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--plan", type=Path, required=True, help="a plan with a tokenizer and a chat template")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument(
        "--stay", type=float, default=0.0, metavar="SECONDS", help="how long a client stays that leaves"
    )
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    report, half, left = harness.Report(given), given.streams // 2, [0]
    words = ["--threads", 1, "--max-rows", given.streams, "--cache-bytes", "8G"]
    with Served(given.plan, *words, environment={**os.environ}) as server:
        host, stalling = server.host, half // 2

        def steady() -> list[Coroutine[Any, Any, Any]]:
            return [stream(host, 4000) for _ in range(half)]

        def odd() -> list[Coroutine[Any, Any, Any]]:
            leaving = [leave(host, given.stay, left) for _ in range(half - stalling)]
            return leaving + [stall(host) for _ in range(stalling)]

        def rate(others: Callable[[], list[Coroutine[Any, Any, Any]]]) -> float:
            found = asyncio.run(beside(host, given.tokens, half, others))
            wait_until(idle, "the end of all sequences")
            return found

        def idle() -> bool:
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            return all(server.metric(f"onnxsplit_{name}") == 0 for name in names)

        process = psutil.Process(server.process.pid)
        rate(odd)
        before = process.num_fds()
        rates = harness.in_turns({"steady": lambda: rate(steady), "odd": lambda: rate(odd)}, given.rounds)
        report.figures(
            {
                "tokens/s of the steady half beside others like it": median(rates["steady"]),
                "tokens/s beside clients that stall and leave": median(rates["odd"]),
                "of the rate": str(harness.ratio(rates["odd"], rates["steady"])),
                "clients that left": left[0],
                "file descriptors more than before": process.num_fds() - before,
            }
        )


if __name__ == "__main__":
    main()
