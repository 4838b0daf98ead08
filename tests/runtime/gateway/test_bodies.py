"""Bodies as they arrive: in pieces, too many, too slow, not at all."""

from __future__ import annotations

import asyncio

import pytest

from runtime.errors import Busy, Cancelled
from runtime.gateway import bodies
from runtime.gateway.bodies import Bodies
from runtime.gateway.errors import TooLarge, TooSlow


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(bodies, "_DISCARD_S", 0.05)


def read(*pieces, headers=(), most=100, together=1000, end=True, between=lambda: None):
    """What a server makes of pieces that come one by one; None is a client that goes away."""
    taken = Bodies(most, together)
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
        return asyncio.run(taken.read(dict(headers), scope, receive))
    finally:
        assert taken.held_bytes == 0


def test_pieces_are_put_together():
    assert read(b"abc") == b"abc"
    assert read(b"ab", b"", b"cd", b"e") == b"abcde"
    assert read(b"") == b""


def test_too_many_bytes_are_refused_claimed_or_not():
    with pytest.raises(TooLarge, match="101 bytes; at most 100"):
        read(b"x" * 101, headers={"content-length": "101"})
    with pytest.raises(TooLarge, match="more than the 100"):
        read(b"x" * 60, b"x" * 60)
    with pytest.raises(Busy, match="being received"):
        read(b"x" * 30, b"x" * 30, together=50)


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
    assert len(read(*[b"x" * 300_000] * 6, most=1 << 21, together=1 << 22, between=pass_time)) == 1_800_000


def test_a_client_that_goes_away_is_no_error_of_the_server():
    with pytest.raises(Cancelled):
        read(b"x", None, end=False)
