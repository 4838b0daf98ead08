"""Requests at a fixed rate, whether or not they are answered: HOST:PORT MODEL PLAN RATE SECONDS DEADLINE_MS."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import re
import resource

import uvloop
from callers import http_body

from onnxsplit.npz import load_npz
from onnxsplit.plan_files import example_file, load_plan


class Connections:
    """Connections that are kept, as many as it takes."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.partition(":")
        self._port = int(port)
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def call(self, message: bytes) -> tuple[int, bytes]:
        """A request on a connection that nobody uses."""
        pair = self._free.pop() if self._free else await asyncio.open_connection(self._host, self._port)
        reader, writer = pair
        writer.write(message)
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(re.search(rb"\ncontent-length: (\d+)", head)[1])
        body = await reader.readexactly(size)
        self._free.append(pair)
        return int(head.split(b" ", 2)[1]), body


async def flood(address: str, model: str, plan: Path, rate: float, seconds: float, deadline_ms: float) -> None:
    """Send, and count."""
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
    print(f"sent       {sent} in {took:.1f} s ({sent / took:.1f} /s), {len(times)} answered, {len(refusals)} refused, "
          f"{len(tasks)} without an answer, {unexplained} refused without a reason")  # fmt: skip
    print(f"answered in time {in_time / took:.1f} /s, p50 {1e3 * times[len(times) // 2]:.0f} ms, "
          f"p99 {1e3 * times[len(times) * 99 // 100]:.0f} ms")  # fmt: skip
    if refusals:
        middle, most = 1e3 * refusals[len(refusals) // 2], 1e3 * refusals[len(refusals) * 99 // 100]
        print(f"refused    p50 {middle:.1f} ms, p99 {most:.1f} ms")
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"the flood itself used {(used.ru_utime + used.ru_stime) / took:.2f} of a core")
    for words, count in said.most_common():
        print(f"           {count} x {words}")


if __name__ == "__main__":
    address, model, plan, rate, seconds, deadline_ms = sys.argv[1:]
    uvloop.run(flood(address, model, Path(plan), float(rate), float(seconds), float(deadline_ms)))
