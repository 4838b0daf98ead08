"""Lets any thread hand the nodes of a coordinator on; see :mod:`runtime.coordinator.succession`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from runtime.coordinator.inbox import Inbox
from runtime.coordinator.succession import Places, Succession, TakeOver
from runtime.errors import PipelineError


class Handover:
    """What callers wait for while one coordinator takes the place of another. Thread-safe.

    Args:
        inbox: passes calls to the coordinator's thread.

    Attributes:
        listening: gives the coordinator's control address as soon as it listens there, before any node is ready.
        role: which plan of the process this coordinator runs, and whether it takes new requests; empty where it is the
            only one. It is told to users.
    """

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._parts: tuple[Succession, TakeOver] | None = None  # None before the thread has opened its sockets
        self._awaited: list[Future[None]] = []
        self._over: PipelineError | None = None
        self.listening: Future[str] = Future()
        self.role = ""

    @property
    def lost_successors(self) -> tuple[str, ...]:
        """The successors that have ended since they were last asked for, while their predecessors serve, in words."""
        return self._parts[0].lost if self._parts is not None else ()

    def open(self, succession: Succession, take_over: TakeOver, address: str) -> None:
        """Begin to make calls, at a coordinator that listens at an address; called in its thread."""
        self._parts = succession, take_over
        self.listening.set_result(address)

    def succeed(self, address: str, places: Places, background_s: float) -> Future[None]:
        """Ask nodes to start their successors."""
        return self._let(lambda succession, _, done: succession.begin(address, places, background_s, done))

    def take_over(self, address: str) -> Future[None]:
        """Listen at an address too."""
        return self._let(lambda _, take_over, done: take_over.begin(address, done))

    def end(self, reason: PipelineError) -> None:
        """Fail everything that is awaited; called in the coordinator's thread."""
        self._over = reason
        for done in self._awaited:
            self._settle(done)
        self._settle(self.listening)

    def _let(self, begin: Callable[[Succession, TakeOver, Future[None]], None]) -> Future[None]:
        done: Future[None] = Future()

        def call() -> None:
            if self._parts is not None and not done.done():
                begin(*self._parts, done)

        self._awaited = [each for each in self._awaited if not each.done()] + [done]
        self._inbox.call(call)
        if self._over is not None:  # the thread ended meanwhile
            self._settle(done)
        return done

    def _settle(self, done: Future[Any]) -> None:
        assert self._over is not None
        if not done.done():
            done.set_exception(self._over)
