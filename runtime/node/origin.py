"""What has started a node: a launcher, the user, or the process whose successor the node is.

The process that the user has started (``onnxsplit node``) starts all successors: its own, and on request those of its
successors. So there are two processes after any number of changes of the plan: the first one, which waits, and the one
that serves. :mod:`runtime.node.successors` is the side of the first one.

A successor's standard input is one end of a socket pair. Over it the successor reports its phase and asks for a
successor of its own, and the first process tells it to end. When it is closed, the first process has ended, and the
successor ends too. A successor ignores signals: supervisors send them to the first process, and some to both.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec

from runtime.errors import ProtocolError
from runtime.wire import codec
from runtime.wire.messages.base import Message
from runtime.wire.messages.control import NodeControl, Succeed, Succeeded, SucceedRefused, SuccessorEnded

LOST = 75
"""Exit code of a successor that has lost its place or its coordinator. The first process then asks for a place."""

_PACKET_BYTES = 64 << 10

Told = Callable[[str], None]
"""Asks the node to finish its work and to end; told by whom. The second time it ends soon. Thread-safe."""

Say = Callable[[NodeControl], None]
"""Sends a message to the coordinator. Thread-safe."""


class InPhase(Message, tag="phase", frozen=True):
    """A successor is in this phase, in lower case; sent with each heartbeat."""

    name: str


class ToEnd(Message, tag="to-end", frozen=True):
    """The successor is to finish its work and to end; the second time it is to end soon."""


class NodeOrigin(Protocol):
    """What has started a node. The methods are called from any thread."""

    def watch(self, home: Path, told: Told) -> None:
        """Begin to end this process when what has started it ends; ``home`` is removed then. It may also be told."""
        ...

    def succeed(self, wish: Succeed, say: Say) -> None:
        """Let a successor be started; ``say`` gets the answer, perhaps later."""
        ...

    def report(self, phase: str) -> None:
        """The node is in this phase now."""
        ...

    def signalled(self) -> None:
        """A signal has asked the node to end."""
        ...

    def outlive(self) -> bool:
        """Wait as long as others need this process although its node is over; returns whether there were any."""
        ...


class Launched:
    """A node that a launcher has started. Standard input is its lifeline; the launcher starts its successor."""

    def watch(self, home: Path, told: Told) -> None:  # noqa: ARG002  a launcher uses signals
        """Begin to end this process when standard input ends or the parent changes."""
        threading.Thread(target=_watch_lifeline, args=(home,), daemon=True).start()

    def succeed(self, wish: Succeed, say: Say) -> None:  # noqa: ARG002
        """Refuse."""
        say(SucceedRefused("a launcher has started it, and starts the nodes of the next plan too"))

    def report(self, phase: str) -> None:
        """Do nothing: the launcher sees what it needs."""

    def signalled(self) -> None:
        """Do nothing."""

    def outlive(self) -> bool:
        """Nobody needs it."""
        return False


class Predecessor:
    """The first process, as its successor sees it over standard input."""

    def __init__(self) -> None:
        self._socket = socket.socket(fileno=0)
        self._say: Say | None = None

    def watch(self, home: Path, told: Told) -> None:
        """Begin to end this process when the first one has ended, and to pass on what that says."""
        threading.Thread(target=self._listen, args=(home, told), daemon=True).start()

    def succeed(self, wish: Succeed, say: Say) -> None:
        """Ask the first process to start the successor."""
        self._say = say
        if not send(self._socket, wish):
            say(SucceedRefused("the process that starts its successor does not answer"))

    def report(self, phase: str) -> None:
        """Tell the first process, which writes the health file."""
        send(self._socket, InPhase(phase))

    def signalled(self) -> None:
        """Do nothing: the first process has told it."""

    def outlive(self) -> bool:
        """Nobody needs it."""
        return False

    def _listen(self, home: Path, told: Told) -> None:
        while (packet := receive(self._socket)) is not None:
            with suppress(ProtocolError):  # this thread must live as long as the process does
                message = _decode_told(packet)
                if isinstance(message, ToEnd):
                    told("a signal, by its first process")
                elif self._say is not None:
                    self._say(message)
        shutil.rmtree(home, ignore_errors=True)
        os._exit(0)


_decode_told: Callable[[codec.Buffer], ToEnd | Succeeded | SucceedRefused | SuccessorEnded] = codec.header_decoder(
    ToEnd | Succeeded | SucceedRefused | SuccessorEnded
)

decode_request: Callable[[codec.Buffer], Succeed | InPhase] = codec.header_decoder(Succeed | InPhase)
"""Decodes what a successor sends to the first process."""


def send(link: socket.socket, message: Message) -> bool:
    """Send a message over a socket pair, without waiting; False if the other side does not read, or has ended."""
    try:
        link.send(msgspec.msgpack.encode(message), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError:
        return False
    return True


def receive(link: socket.socket) -> bytes | None:
    """Wait for the next message over a socket pair; None when the other side has ended."""
    try:
        return link.recv(_PACKET_BYTES) or None
    except OSError:
        return None


def _watch_lifeline(home: Path) -> None:
    """End the process when standard input ends or the parent changes, because the launching process has ended."""
    parent = os.getppid()
    while os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], 1.0)
        if readable and not os.read(0, 4096):
            break
    shutil.rmtree(home, ignore_errors=True)
    os._exit(0)
