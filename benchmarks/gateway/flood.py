"""Send requests at a fixed rate, whether or not they are answered, and print their outcomes as JSON.

python flood.py HOST:PORT MODEL PLAN RATE SECONDS DEADLINE_MS
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import re
import resource

import uvloop

from benchmarks.gateway.callers import http_body
from onnxsplit.npz import load_npz
from onnxsplit.plan_files import example_file, load_plan


class Connections:
    """A pool of connections that stay open; it grows as needed."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.partition(":")
        self._port = int(port)
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def call(self, message: bytes) -> tuple[int, bytes]:
        """Send a request on a free connection, and wait for the answer."""
        pair = self._free.pop() if self._free else await asyncio.open_connection(self._host, self._port)
        reader, writer = pair
        writer.write(message)
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(re.search(rb"\ncontent-length: (\d+)", head)[1])
        body = await reader.readexactly(size)
        self._free.append(pair)
        return int(head.split(b" ", 2)[1]), body


async def flood(address: str, model: str, plan: Path, rate: float, seconds: float, deadline_ms: float) -> None:
    """Send requests and count the answers."""
    body, length = http_body(load_npz(example_file(plan, load_plan(plan))), timeout=int(1000 * deadline_ms))
    message = (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(body)}\r\n"
        f"Inference-Header-Content-Length: {length}\r\n\r\n"
    ).encode() + body
    connections = Connections(address)
    times: list[float] = []
    refusals: list[float] = []
    said: Counter[str] = Counter()
    unexplained = 0

    async def one() -> None:
        nonlocal unexplained
        at = time.perf_counter()
        status, answer = await connections.call(message)
        took = time.perf_counter() - at
        if status == 200:
            times.append(took)
            return
        refusals.append(took)
        words = json.loads(answer).get("error", "")
        unexplained += not words
        said[f"{status} " + re.sub(r"[\d.]+", "N", words)[:90]] += 1

    tasks = set()
    begun = time.perf_counter()
    sent = 0
    while (now := time.perf_counter() - begun) < seconds:
        for _ in range(int(now * rate) - sent):
            task = asyncio.ensure_future(one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        await asyncio.sleep(0.002)
    if tasks:
        await asyncio.wait(tasks, timeout=30)
    took = time.perf_counter() - begun
    times.sort()
    refusals.sort()
    in_time = sum(t <= deadline_ms / 1e3 for t in times)
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "sent": sent,
        "sent_per_s": sent / took,
        "answered": len(times),
        "in_time_per_s": in_time / took,
        "answered_p50_ms": percentile_ms(times, 50),
        "answered_p99_ms": percentile_ms(times, 99),
        "refused": len(refusals),
        "refused_without_a_reason": unexplained,
        "refused_p50_ms": percentile_ms(refusals, 50),
        "refused_p99_ms": percentile_ms(refusals, 99),
        "without_an_answer": len(tasks),
        "cores_used_by_the_flood": (used.ru_utime + used.ru_stime) / took,
        "refusals": dict(said.most_common()),
    }
    print(json.dumps(figures))


def percentile_ms(times: list[float], percent: int) -> float | None:
    """Return a percentile, in milliseconds, of sorted times in seconds."""
    return 1e3 * times[len(times) * percent // 100] if times else None


if __name__ == "__main__":
    address, model, plan, rate, seconds, deadline_ms = sys.argv[1:]
    uvloop.run(flood(address, model, Path(plan), float(rate), float(seconds), float(deadline_ms)))
