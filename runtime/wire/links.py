"""The ends of links. :class:`~runtime.wire.sockets.Sockets` makes them and draws how they are connected."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

import zmq
import zmq.auth.thread
import zmq.utils.monitor

from runtime.wire.codec import MAX_HEADER_BYTES, Buffer

_ZERO_COPY_FROM = 64 * 1024
"""Bytes from which sending a frame from its own memory is faster than copying it."""

_PATIENCE = 5  # handshakes that may fail without a reason, for example because the other side is shutting down
REFUSALS = {
    int(zmq.Event.HANDSHAKE_FAILED_AUTH): "it does not allow this process's key",
    int(zmq.Event.HANDSHAKE_FAILED_PROTOCOL): "it has no keys, but this process has",
    int(zmq.Event.HANDSHAKE_FAILED_NO_DETAIL): "it has no keys, or other keys than allowed/coordinator.key says",
}
_KEYLESS = "it requires keys, but this process has none; pass them with --keys DIR"

_BELL = b""  # an empty datagram says no more than that entries of a lane wait; no message is empty

# As integers: combining zmq's enums costs more than sending.
_NOBLOCK, _MORE, _RCVMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE), int(zmq.RCVMORE)


class LinkState:
    """Whether a link is connected, according to ZeroMQ's socket monitor. Thread-safe.

    Args:
        raw: the link's socket.
        context: the socket's context.
    """

    def __init__(self, raw: zmq.Socket[bytes], context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._raw = raw
        self._connected = False
        self._lock = threading.Lock()
        address = f"inproc://state-{raw.fileno()}"
        raw.monitor(address, int(zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED))
        self._events = context.socket(zmq.PAIR)
        self._events.setsockopt(zmq.RCVHWM, 0)  # with a limit, ZeroMQ's I/O thread would block when it is reached
        self._events.connect(address)

    @property
    def connected(self) -> bool:
        """Whether the handshake has succeeded and the connection has not been lost since."""
        with self._lock:
            while not self._events.closed:
                try:
                    event = self._events.recv_multipart(_NOBLOCK)
                except zmq.Again:
                    break
                parsed = zmq.utils.monitor.parse_monitor_message(event)
                self._connected = parsed["event"] == zmq.Event.HANDSHAKE_SUCCEEDED
            return self._connected

    def close(self) -> None:
        """Stop the monitor. Call it in the thread that uses the socket, before the socket is closed."""
        with self._lock:
            self._raw.disable_monitor()
            self._events.close(linger=0)


class AnsweringInlet:
    """A bound ROUTER socket: receives messages, and answers their senders.

    Attributes:
        raw: the socket.
        address: the address it has bound, with the port that was chosen.
    """

    def __init__(self, raw: zmq.Socket[bytes], address: str, unread: set[object]) -> None:
        self.raw = raw
        self.address = address
        self._unread = unread

    def receive(self) -> tuple[bytes, bytes, str] | None:
        """The next message, or None: the sender's identity, the header, and the sender's public key."""
        message = self.receive_all()
        return None if message is None else (message[0], message[1], message[3])

    def receive_all(self) -> tuple[bytes, bytes, list[Buffer], str] | None:
        """The next message, or None: the identity, the header, the frames after it, and the sender's public key."""
        identity = _take(self.raw, self._unread)
        if identity is None:
            return None
        if not self.raw.getsockopt(_RCVMORE):
            return identity, b"", [], ""
        header = self.raw.recv(copy=False)
        key = header.get("User-Id") if self.raw.curve_server else ""
        return identity, header.bytes, _frames(self.raw), str(key)

    def send(self, identity: bytes, header: bytes, *frames: Buffer) -> bool:
        """Send a message to a peer; returns False, without an error, when the peer is not connected."""
        self._unread.add(self.raw)  # sending may consume the notification of a message that has arrived
        try:
            self.raw.send_multipart([identity, header, *frames], _NOBLOCK, copy=not frames)
        except zmq.ZMQError:
            return False
        return True


class Inlet:
    """A bound DEALER socket, and a Unix datagram socket for senders on this host: receives messages.

    Attributes:
        raw: the DEALER socket.
        address: the address it has bound, with the port that was chosen.
    """

    def __init__(
        self,
        raw: zmq.Socket[bytes],
        address: str,
        datagrams: socket.socket | None,
        unread: set[object],
        revoked: Callable[[], frozenset[str]],
    ) -> None:
        self.raw = raw
        self.address = address
        self._unread = unread
        self._revoked = revoked
        self._datagrams = datagrams
        self._descriptor = -1 if datagrams is None else datagrams.fileno()
        self._room = memoryview(bytearray(MAX_HEADER_BYTES if datagrams is not None else 0))

    def receive(self, ready: set[object]) -> tuple[Buffer, list[Buffer]] | None:
        """The next message, or None: the header, and the frames that follow it.

        The header may lie in a buffer that the next call overwrites.

        Args:
            ready: what :meth:`~runtime.wire.sockets.Sockets.wait` returned.
        """
        if self._descriptor in ready:
            assert self._datagrams is not None
            try:
                size = self._datagrams.recv_into(self._room)
                if size:
                    return self._room[:size], []
            except BlockingIOError:
                pass
        if self.raw in ready:
            return self._from_zmq()
        return None

    def _from_zmq(self) -> tuple[Buffer, list[Buffer]] | None:
        if (revoked := self._revoked()) and self.raw.curve_server:
            return self._from_others(revoked)
        header = _take(self.raw, self._unread)
        return None if header is None else (header, _frames(self.raw))

    def _from_others(self, revoked: frozenset[str]) -> tuple[Buffer, list[Buffer]] | None:
        """The next message of a sender whose key was not revoked. ZeroMQ cannot close the links of one sender."""
        while True:
            try:
                header = self.raw.recv(_NOBLOCK, copy=False)
            except zmq.Again:
                self._unread.discard(self.raw)
                return None
            self._unread.add(self.raw)
            frames = _frames(self.raw)
            if header.get("User-Id") not in revoked:
                return header.buffer, frames


class Outlet:
    """A connected DEALER socket, and a Unix datagram socket to a receiver on this host: sends messages.

    Attributes:
        raw: the DEALER socket.
    """

    def __init__(
        self,
        raw: zmq.Socket[bytes],
        datagrams: socket.socket | None,
        unread: set[object] | None,
        monitor: zmq.Socket[bytes] | None,
        state: LinkState | None,
        close: Callable[[zmq.Socket[bytes], socket.socket | None], None],
    ) -> None:
        self.raw = raw
        self._unread = unread
        self._datagrams = datagrams
        self._monitor = monitor
        self._state = state
        self._failed = 0
        self._close = close

    def refused(self) -> str | None:
        """Why the other side refuses this process's connection; None as long as it may still accept it."""
        assert self._monitor is not None
        while self._monitor.poll(0):
            event = int(zmq.utils.monitor.recv_monitor_message(self._monitor)["event"])
            if event in REFUSALS:
                self._failed += _PATIENCE if event != zmq.Event.HANDSHAKE_FAILED_NO_DETAIL else 1
                if self._failed >= _PATIENCE:
                    return REFUSALS[event] if self.raw.mechanism == zmq.CURVE else _KEYLESS
        return None

    @property
    def connected(self) -> bool:
        """False while a link over tcp that only sends is not connected; else True. Thread-safe."""
        return self._state is None or self._state.connected

    @property
    def bell(self) -> Callable[[], None] | None:
        """Wakes the receiver, which then looks at its lanes; None for a receiver without a datagram socket."""
        return None if self._datagrams is None else self._ring

    def _ring(self) -> None:
        assert self._datagrams is not None
        with suppress(OSError):  # the queue is full, so the receiver does not sleep, or the receiver has ended
            self._datagrams.send(_BELL)

    def close(self) -> None:
        """Close the link, and drop the messages that it has not sent yet."""
        self._close(self.raw, self._datagrams)

    def send(self, header: bytes, frames: Sequence[Buffer] = (), *, track: bool = False) -> list[zmq.MessageTracker]:
        """Queue one message. Never blocks. A message to a process that has refused the connection is dropped.

        Args:
            header: the first frame.
            frames: the frames that follow. A large one is sent from its own memory, which must not change before.
            track: whether to send all frames from their own memory, and to return trackers for them.

        Returns:
            With ``track`` a tracker for each frame, which says when it has been sent; else nothing.
        """
        if self._datagrams is not None and not frames:
            try:
                self._datagrams.send(header)
                return []
            except OSError:  # too large, the queue is full, or the receiver has ended, which the coordinator detects
                pass
        if self._unread is not None:
            self._unread.add(self.raw)  # as in AnsweringInlet.send
        try:
            self.raw.send(header, _MORE | _NOBLOCK if frames else _NOBLOCK)
        except zmq.Again:  # queues have no limit, so there is no connection and there will be none
            return []
        last = len(frames) - 1
        trackers = []
        for position, frame in enumerate(frames):
            flags = _MORE | _NOBLOCK if position < last else _NOBLOCK
            if track:
                trackers.append(self.raw.send(frame, flags, copy=False, track=True))
            else:
                self.raw.send(frame, flags, copy=len(frame) < _ZERO_COPY_FROM)
        return trackers

    def receive(self) -> bytes | None:
        """The header of the next answer, or None; only for links made with ``receive``."""
        assert self._unread is not None
        return _take(self.raw, self._unread)

    def receive_all(self) -> tuple[bytes, list[Buffer]] | None:
        """The next answer, or None: its header, and the frames that follow it."""
        header = self.receive()
        return None if header is None else (header, _frames(self.raw))


def _frames(raw: zmq.Socket[bytes]) -> list[Buffer]:
    """The remaining frames of a message whose header was received."""
    frames: list[Buffer] = []
    while raw.getsockopt(_RCVMORE):
        frames.append(raw.recv(copy=False).buffer)
    return frames


def _take(raw: zmq.Socket[bytes], unread: set[object]) -> bytes | None:
    """The first frame of the next message, or None; notes in ``unread`` whether there may be more messages."""
    try:
        frame = raw.recv(_NOBLOCK)
    except zmq.Again:
        unread.discard(raw)
        return None
    unread.add(raw)
    return frame
