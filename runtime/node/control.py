"""A node's link to its coordinator, on a thread of its own, so that it answers while the session runs."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Protocol

from runtime.errors import ProtocolError
from runtime.logs import DropLog
from runtime.node.events import Assigned, AttemptCancelled, NodeEvent, Passed, Shared, Wired
from runtime.timings import Timings
from runtime.wire import codec
from runtime.wire.messages.control import Assign, Beat, Cancel, Hello, NodeBeat, NodeControl, Share, Stop, Trust, Wire
from runtime.wire.security import Security
from runtime.wire.sockets import Sockets
from runtime.wire.wakeup import Wakeup

_JOIN_S = 2.0
_log = logging.getLogger("runtime.node")
_drops = DropLog(_log)


class Body(Protocol):
    """The node as its control link sees it. All of it can be called from any thread."""

    @property
    def beat(self) -> NodeBeat:
        """A sign of life, as of now."""
        ...

    def post(self, event: NodeEvent) -> None:
        """Take an event."""
        ...

    def trust(self, keys: frozenset[str]) -> None:
        """Let the owners of these public keys send."""
        ...

    def lost(self, reason: str) -> None:
        """End soon."""
        ...

    def silent(self, reason: str) -> None:
        """The coordinator is gone: drop the work, and look for it."""
        ...

    def rejoin(self, reason: str) -> None:
        """The coordinator gave this node's place to another, or has none: drop the work, and ask for a place."""
        ...

    def unwelcome(self, reason: str) -> None:
        """The coordinator will never take this node."""
        ...


class ControlLink(threading.Thread):
    """Hands over what the coordinator says, sends what the node has to say, and beats.

    Args:
        body: the node.
        address: of the coordinator.
        hello: said first.
        security: of the link.
        key: the coordinator's public key, where links are encrypted.
        patience_s: for the coordinator's first word; None waits for ever.
    """

    def __init__(
        self, body: Body, address: str, hello: Hello, *, security: Security, key: str, patience_s: float | None
    ) -> None:
        super().__init__(name="control", daemon=True)
        self._body = body
        self._address = address
        self._security = security
        self._key = key
        self._patience_s = patience_s
        self._outbox: deque[NodeControl] = deque([hello])
        self._wakeup = Wakeup()
        self._ending = False
        self._assigned = False
        self._beat_s, self._silence_s = Timings().beat_s, Timings().silence_s

    def say(self, message: NodeControl) -> None:
        """Send a message soon; callable from any thread."""
        self._outbox.append(message)
        self._wakeup.ring()

    def end(self) -> None:
        """Send what is left and end the thread."""
        self._ending = True
        self._wakeup.ring()
        self.join(_JOIN_S)

    def run(self) -> None:
        """Until the node ends. A node must not live on without this thread, so what fails here ends it."""
        try:
            self._speak()
        except Exception as error:
            _log.exception("the link to the coordinator failed")
            self._body.unwelcome(f"the link to the coordinator at {self._address} failed: {error}")

    def _speak(self) -> None:
        with Sockets(linger_s=0.5, security=self._security) as sockets:
            link = sockets.connect(self._address, receive=True, key=self._key)
            begun = time.monotonic()
            sockets.watch(self._wakeup.fileno())
            heard: float | None = None
            next_beat = 0.0
            deserted = False
            turned = begun
            while True:
                ending = self._ending
                while self._outbox:
                    link.send(codec.encode(self._outbox.popleft()))
                if ending:
                    return
                now = time.monotonic()
                if heard is not None:  # while this process was stopped, it could not hear
                    heard += max(0.0, now - turned - 2 * self._beat_s)
                turned = now
                if now >= next_beat:
                    beat, next_beat = self._body.beat, now + self._beat_s
                    if heard is not None and not deserted:
                        link.send(codec.encode(beat))
                if heard is not None and not deserted and now - heard > self._silence_s:
                    deserted = True
                    self._body.silent(f"the coordinator has been silent for {self._silence_s:.0f} s")
                if heard is None and (reason := link.refused()) is not None:
                    self._body.unwelcome(f"the coordinator at {self._address} refuses this node: {reason}")
                    return
                if heard is None and self._patience_s is not None and now - begun > self._patience_s:
                    self._body.unwelcome(f"no coordinator was at {self._address} for {self._patience_s:.0f} s")
                    return
                sockets.wait(self._beat_s / 2)
                self._wakeup.clear()
                while (header := link.receive()) is not None:
                    heard = time.monotonic()
                    if not deserted:
                        self._take(header)

    def _take(self, header: bytes) -> None:
        try:
            message = codec.decode_coordinator_control(header)
        except ProtocolError as error:
            if self._assigned:
                _drops.note(error)
            else:
                self._body.unwelcome(
                    f"the coordinator at {self._address} says what this node does not understand; "
                    f"install the same version of onnxsplit on both hosts ({error})"
                )
            return
        match message:
            case Assign():
                self._beat_s, self._silence_s = message.beat_ns / 1e9, message.silence_ns / 1e9
                self._assigned = True
                self._body.post(Assigned(message))
            case Trust(keys):
                self._body.trust(frozenset(keys))
            case Wire():
                self._body.post(Wired(message))
            case Share(readers):
                self._body.post(Shared(readers))
            case Cancel(request, attempt):
                self._body.post(AttemptCancelled(request, attempt))
            case Stop(reason, "end"):
                self._body.lost(reason)
            case Stop(reason, "rejoin"):
                self._body.rejoin(reason)
            case Stop(reason):
                self._body.unwelcome(f"the coordinator at {self._address} has no place for this node: {reason}")
            case Beat(oldest):
                self._body.post(Passed(oldest))
