"""Bodies that arrive in pieces, too many, too slowly, or not at all."""

from __future__ import annotations

import asyncio
import gzip
import random

import pytest

from onnxsplit.errors import InputError
from runtime.errors import Busy, Cancelled
from runtime.gateway.budget import Budget
from runtime.gateway.errors import TooLarge, TooSlow
from runtime.gateway.http import bodies
from runtime.gateway.http.bodies import Bodies
from runtime.gateway.threads import Workers


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(bodies, "_DISCARD_S", 0.05)


def read(*pieces, headers=(), most=100, together=1000, end=True, between=lambda: None):
    """Let a server read a body piece by piece; None stands for a client that disconnects."""
    budget = Budget(together, most)
    workers = Workers(1)
    taken = Bodies(most, budget, workers)
    scope = {"pieces": []}
    coming = list(pieces)

    async def receive():
        await asyncio.sleep(0)
        between()
        if not coming:
            scope["silent"] = True
            return {"type": "http.request", "body": b"", "more_body": True}
        piece = coming.pop(0)
        if piece is None:
            return {"type": "http.disconnect"}
        scope["pieces"].append(piece)
        return {"type": "http.request", "body": b"", "more_body": bool(coming) or not end}

    try:
        found = asyncio.run(taken.read(dict(headers), scope, receive))
        assert budget.held_bytes == (len(found) if len(pieces) > 1 or dict(headers).get("content-encoding") else 0)
        return found
    finally:
        taken.release(scope)
        assert budget.held_bytes == 0
        workers.close()


def test_pieces_are_put_together():
    assert read(b"abc") == b"abc"
    assert read(b"ab", b"", b"cd", b"e") == b"abcde"
    assert read(b"") == b""


def test_too_many_bytes_are_refused_claimed_or_not():
    with pytest.raises(TooLarge, match="101 bytes; at most 100"):
        read(b"x" * 101, headers={"content-length": "101"})
    with pytest.raises(TooLarge, match="more than the 100"):
        read(b"x" * 60, b"x" * 60)
    with pytest.raises(TooLarge, match="more than the 100"):
        read(b"x" * 101)


def test_a_body_that_arrived_whole_is_bounded_too():
    budget = Budget(100, 60)
    bodies = Bodies(60, budget, Workers(1))

    async def read_at_once(*pieces):
        scope = {"pieces": list(pieces), "whole": True}

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        try:
            return await bodies.read({}, scope, receive), budget.held_bytes
        finally:
            bodies.release(scope)

    assert asyncio.run(read_at_once(b"ab", b"cd")) == (b"abcd", 4)
    assert asyncio.run(read_at_once()) == (b"", 0)
    for pieces in ([b"x" * 61], [b"x" * 30, b"x" * 31]):
        with pytest.raises(TooLarge, match="more than the 60"):
            asyncio.run(read_at_once(*pieces))
    budget.take(50)
    with pytest.raises(Busy):
        asyncio.run(read_at_once(b"x" * 30, b"x" * 30))
    assert budget.held_bytes == 50


def test_the_bytes_of_all_requests_together_are_bounded():
    budget = Budget(100, 60)
    with budget.holding(60):
        with pytest.raises(Busy, match=r"holds 60 bytes .* more than the 100"):
            budget.take(41)
        with budget.holding(40):
            assert budget.held_bytes == 100
    assert budget.held_bytes == 0
    budget.take(100)


def test_messages_of_unknown_size_wait_for_each_other_and_the_slow_make_room(monkeypatch):
    monkeypatch.setattr("runtime.gateway.receive_limit.PATIENCE_S", 0.05)
    order = []

    async def never():
        order.append("slow")
        await asyncio.Event().wait()

    async def at_once():
        order.append("quick")

    async def slow(limit):
        await limit.receive(never)

    async def quick(limit):
        await asyncio.sleep(0)
        await limit.receive(at_once)

    async def both():
        limit = Budget(100, 100).receive_limit
        return await asyncio.gather(slow(limit), slow(limit), quick(limit), return_exceptions=True)

    assert [type(found) for found in asyncio.run(both())] == [TooSlow, TooSlow, type(None)]
    assert order == ["slow", "slow", "quick"]


@pytest.mark.parametrize("size", [100, 50_000_000])
def test_what_is_compressed_counts_as_what_it_becomes(size):
    packed = gzip.compress(bytes(size))
    coding = {"content-encoding": "gzip"}
    assert len(read(packed, headers=coding, most=size, together=2 * size)) == size
    with pytest.raises(TooLarge, match="decompressed"):
        read(packed, headers=coding, most=size - 1, together=2 * size)
    with pytest.raises(InputError, match="ends within its gzip"):
        read(packed[:-8], headers=coding, most=size, together=2 * size)


def test_silence_is_refused():
    with pytest.raises(TooSlow, match="too slow"):
        read(b"x", end=False)


def test_a_drip_is_refused_though_it_never_falls_silent(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bodies.time, "monotonic", lambda: now[0])

    def pass_time():
        now[0] += 9.0

    with pytest.raises(TooSlow):
        read(*[b"x"] * 6, between=pass_time)
    assert len(read(*[b"x" * 600_000] * 6, most=1 << 22, together=1 << 23, between=pass_time)) == 3_600_000
    with pytest.raises(TooSlow):  # regardless of earlier pieces
        read(b"x" * (1 << 24), *[b"x"] * 12, most=1 << 25, together=1 << 25, between=pass_time)


def test_a_client_that_goes_away_is_no_error_of_the_server():
    with pytest.raises(Cancelled):
        read(b"x", None, end=False)


@pytest.mark.parametrize("more", [b"x", gzip.compress(b"more", mtime=0), bytes(200_000)], ids=["byte", "gzip", "zeros"])
def test_what_follows_a_compressed_stream_is_refused(more):
    packed = gzip.compress(b"body")
    coding = {"content-encoding": "gzip"}
    with pytest.raises(InputError, match=f"{len(more)} bytes after the end"):
        read(packed + more, headers=coding, most=1 << 20, together=1 << 21)


@pytest.mark.parametrize("level", [0, 9])
def test_what_is_compressed_comes_out_the_same_at_any_ratio(level):
    data = random.Random(0).randbytes(300_000) + bytes(3_000_000) + b"end"
    packed = gzip.compress(data, level)
    pieces = [packed[start : start + 100_000] for start in range(0, len(packed), 100_000)]
    assert read(*pieces, headers={"content-encoding": "gzip"}, most=1 << 22, together=1 << 23) == data


def test_memory_goes_back_to_the_system_after_much_was_held(monkeypatch):
    trimmed = []

    class Library:
        @staticmethod
        def malloc_trim(pad):
            trimmed.append(pad)

    monkeypatch.setattr("ctypes.CDLL", lambda _: Library)
    budget = Budget(1 << 30, 1 << 30)
    budget.trim()
    with budget.holding(100 << 20):
        budget.trim()
        assert trimmed == [], "much is still held"
    budget.trim()
    budget.trim()
    assert trimmed == [0], "once for what was held"


def test_parsed_bodies_count_with_what_they_may_take():
    budget = Budget(1000, 100)
    taken = Bodies(100, budget, Workers(1))
    scopes: list[dict[str, int]] = [{}, {}, {"held": 100}]
    taken.hold_parsed(scopes[0], b"a" * 30)
    assert budget.held_bytes == 600
    with pytest.raises(Busy):
        taken.hold_parsed(scopes[1], b"a" * 30)
    taken.release(scopes[0])
    budget.take(100)
    taken.hold_parsed(scopes[2], b"a" * 100)  # one that is alone is always taken
    assert budget.held_bytes == 1000
    taken.release(scopes[2])
    assert budget.held_bytes == 0
