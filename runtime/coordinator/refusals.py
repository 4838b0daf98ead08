"""The processes that asked for a place in a pipeline and got none. Pure."""

from __future__ import annotations

from msgspec import Struct

from runtime.wire.messages.control import Fate, Hello

_ASKED_AGAIN_NS = 60 * 10**9  # a process that was refused a place and asks within this time has kept asking


class Refusal(Struct, frozen=True):
    """Why a node gets no place, what it is told to do, and whether it was refused before and keeps asking."""

    reason: str
    fate: Fate
    again: bool = False


class Refusals:
    """Remembers which processes were refused a place, so that one that keeps asking is logged once."""

    def __init__(self) -> None:
        self._refused_ns: dict[tuple[str, int], int] = {}  # time of the last refusal, by host and process ID

    def note(self, hello: Hello, now_ns: int) -> bool:
        """A process is refused a place; True when it was refused one a short while ago."""
        process = hello.host, hello.pid
        self._refused_ns = {other: at for other, at in self._refused_ns.items() if now_ns - at < _ASKED_AGAIN_NS}
        again = process in self._refused_ns
        self._refused_ns[process] = now_ns
        return again

    def forget(self, hello: Hello) -> None:
        """A process gets a place."""
        self._refused_ns.pop((hello.host, hello.pid), None)
