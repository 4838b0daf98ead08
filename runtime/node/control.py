"""A node's link to its coordinator, in a thread of its own, so that it works while the session runs."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from runtime.errors import ProtocolError
from runtime.logs import DropLog
from runtime.node.events import Assigned, AttemptCancelled, NodeEvent, Passed, Shared, Wired
from runtime.timings import Timings
from runtime.wire import codec
from runtime.wire.messages.control import (
    Assign,
    Beat,
    Cancel,
    Hello,
    NodeBeat,
    NodeControl,
    Share,
    Stop,
    Succeed,
    Trust,
    Wire,
)
from runtime.wire.security import Security
from runtime.wire.sockets import Sockets
from runtime.wire.wakeup import Wakeup

_JOIN_S = 2.0
_log = logging.getLogger("runtime.node")
_drops = DropLog(_log)


class ControlledNode(Protocol):
    """The methods of a node that its control link calls. All are thread-safe."""

    @property
    def beat(self) -> NodeBeat:
        """A heartbeat, as of now."""
        ...

    def post(self, event: NodeEvent) -> None:
        """Pass an event to the main thread."""
        ...

    def trust(self, keys: frozenset[str]) -> None:
        """Accept connections from the owners of these public keys."""
        ...

    def succeed(self, wish: Succeed, say: Callable[[NodeControl], None]) -> None:
        """Start a successor; ``say`` gets the answer."""
        ...

    def end_soon(self, reason: str) -> None:
        """End soon, even if the session is still running."""
        ...

    def coordinator_silent(self, reason: str) -> None:
        """The coordinator has fallen silent: drop the work and ask for a place again."""
        ...

    def rejoin(self, reason: str) -> None:
        """The coordinator has replaced this node or has no place for it: drop the work and ask for a place again."""
        ...

    def be_refused(self, reason: str) -> None:
        """The coordinator will never accept this node: end soon."""
        ...


class ControlLink(threading.Thread):
    """Passes messages between the coordinator and the node, and sends heartbeats.

    Args:
        node: the node.
        address: the coordinator's control address.
        hello: the first message to send.
        security: how the link is protected.
        key: the coordinator's public key, where links are encrypted.
        patience_s: seconds to wait for the coordinator's first message; None waits without limit.
    """

    def __init__(
        self,
        node: ControlledNode,
        address: str,
        hello: Hello,
        *,
        security: Security,
        key: str,
        patience_s: float | None,
    ) -> None:
        super().__init__(name="control", daemon=True)
        self._node = node
        self._address = address
        self._security = security
        self._key = key
        self._patience_s = patience_s
        self._outbox: deque[NodeControl] = deque([hello])
        self._wakeup = Wakeup()
        self._wakeup_lock = threading.Lock()  # held to ring and to close it
        self._ending = False
        self._assigned = False
        self._beat_s, self._silence_s = Timings().beat_s, Timings().silence_s

    def say(self, message: NodeControl) -> None:
        """Queue a message. Thread-safe."""
        self._outbox.append(message)
        self._ring()

    def end(self) -> None:
        """Send the queued messages, and end the thread."""
        self._ending = True
        self._ring()
        self.join(_JOIN_S)

    def _ring(self) -> None:
        with self._wakeup_lock:
            self._wakeup.ring()

    def run(self) -> None:
        """Run until the node ends. Any failure here ends the node, which must not run without this thread."""
        try:
            self._speak()
        except Exception as error:
            _log.exception("the link to the coordinator failed")
            self._node.be_refused(f"the link to the coordinator at {self._address} failed: {error}")
        finally:
            with self._wakeup_lock:
                self._wakeup.close()

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
                if heard is not None:  # do not count time in which this process was suspended
                    heard += max(0.0, now - turned - 2 * self._beat_s)
                turned = now
                if now >= next_beat:
                    beat, next_beat = self._node.beat, now + self._beat_s
                    if heard is not None and not deserted:
                        link.send(codec.encode(beat))
                if heard is not None and not deserted and now - heard > self._silence_s:
                    deserted = True
                    self._node.coordinator_silent(f"the coordinator has been silent for {self._silence_s:.0f} s")
                if heard is None and (reason := link.refused()) is not None:
                    self._node.be_refused(f"the coordinator at {self._address} refuses this node: {reason}")
                    return
                if heard is None and self._patience_s is not None and now - begun > self._patience_s:
                    self._node.be_refused(f"no coordinator answered at {self._address} for {self._patience_s:.0f} s")
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
                self._node.be_refused(
                    f"the coordinator at {self._address} sent a message that this node does not understand; "
                    f"install the same version of onnxsplit on both hosts ({error})"
                )
            return
        match message:
            case Assign():
                self._beat_s, self._silence_s = message.beat_ns / 1e9, message.silence_ns / 1e9
                self._assigned = True
                self._node.post(Assigned(message))
            case Trust(keys):
                self._node.trust(frozenset(keys))
            case Wire():
                self._node.post(Wired(message))
            case Share(readers):
                self._node.post(Shared(readers))
            case Cancel(request, attempt):
                self._node.post(AttemptCancelled(request, attempt))
            case Succeed():
                self._node.succeed(message, self.say)
            case Stop(reason, "end"):
                self._node.end_soon(reason)
            case Stop(reason, "rejoin"):
                self._node.rejoin(reason)
            case Stop(reason):
                self._node.be_refused(f"the coordinator at {self._address} has no place for this node: {reason}")
            case Beat(oldest, kept):
                self._node.post(Passed(oldest, frozenset(kept)))
