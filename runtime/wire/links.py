"""Links: the ends of a connection, each a ROUTER or DEALER socket, and a Unix datagram socket beside it on one host."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence

import zmq
import zmq.auth.thread
import zmq.utils.monitor

from runtime.wire.codec import MAX_HEADER_BYTES, Buffer

_ZERO_COPY_FROM = 64 * 1024
"""Bytes below which copying a frame is quicker than keeping track of it."""
_PATIENCE = 5  # handshakes that may fail without a reason, as when the other side is just ending
REFUSALS = {
    int(zmq.Event.HANDSHAKE_FAILED_AUTH): "it does not allow this process's key",
    int(zmq.Event.HANDSHAKE_FAILED_PROTOCOL): "it has no keys, and this process has",
    int(zmq.Event.HANDSHAKE_FAILED_NO_DETAIL): "it has no keys, or other keys than allowed/coordinator.key says",
}
_KEYLESS = "it speaks with those who have keys, and this process has none; give it some with --keys DIR"

# As integers: combining zmq's enums costs more than sending.
_NOBLOCK, _MORE, _RCVMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE), int(zmq.RCVMORE)


class LinkState:
    """Whether a link is connected, as ZeroMQ tells; may be asked from any thread.

    Args:
        raw: the link's socket.
        context: of the socket.
    """

    def __init__(self, raw: zmq.Socket[bytes], context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._raw = raw
        self._connected = False
        self._lock = threading.Lock()
        address = f"inproc://state-{raw.fileno()}"
        raw.monitor(address, int(zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED))
        self._events = context.socket(zmq.PAIR)
        self._events.setsockopt(zmq.RCVHWM, 0)  # ZeroMQ's own thread would wait for room
        self._events.connect(address)

    @property
    def connected(self) -> bool:
        """True when the other side has shaken hands, and the connection was not lost since."""
        with self._lock:
            while not self._events.closed:
                try:
                    event = self._events.recv_multipart(_NOBLOCK)
                except zmq.Again:
                    break
                found = zmq.utils.monitor.parse_monitor_message(event)
                self._connected = found["event"] == zmq.Event.HANDSHAKE_SUCCEEDED
            return self._connected

    def close(self) -> None:
        """Listen to ZeroMQ no more; before the link's socket is closed, in the thread that uses it."""
        with self._lock:
            self._raw.disable_monitor()
            self._events.close(linger=0)


class AnsweringInlet:
    """A bound ROUTER. ``address`` is where it really is."""

    def __init__(self, raw: zmq.Socket[bytes], address: str, unread: set[object]) -> None:
        self.raw = raw
        self.address = address
        self._unread = unread

    def receive(self) -> tuple[bytes, bytes, str] | None:
        """One message if there is one: the sender's identity, the header, and the key the sender has shown to have."""
        message = self.receive_all()
        return None if message is None else (message[0], message[1], message[3])

    def receive_all(self) -> tuple[bytes, bytes, list[Buffer], str] | None:
        """The same, with the frames that follow the header before the key."""
        identity = _take(self.raw, self._unread)
        if identity is None:
            return None
        if not self.raw.getsockopt(_RCVMORE):
            return identity, b"", [], ""
        header = self.raw.recv(copy=False)
        key = header.get("User-Id") if self.raw.curve_server else ""
        return identity, header.bytes, _frames(self.raw), str(key)

    def send(self, identity: bytes, header: bytes, *frames: Buffer) -> bool:
        """Answer a peer; False when there is no link to it now, which is not an error here."""
        self._unread.add(self.raw)  # sending may take note of what came in meanwhile, and nobody else then would
        try:
            self.raw.send_multipart([identity, header, *frames], _NOBLOCK, copy=not frames)
        except zmq.ZMQError:
            return False
        return True


class Inlet:
    """A bound DEALER, and a shortcut for senders on this host. ``address`` is where it really is."""

    def __init__(
        self, raw: zmq.Socket[bytes], address: str, datagrams: socket.socket | None, unread: set[object]
    ) -> None:
        self.raw = raw
        self.address = address
        self._unread = unread
        self._datagrams = datagrams
        self._descriptor = -1 if datagrams is None else datagrams.fileno()
        self._room = memoryview(bytearray(MAX_HEADER_BYTES if datagrams is not None else 0))

    def receive(self, ready: set[object]) -> tuple[Buffer, list[Buffer]] | None:
        """One message, if what is ``ready`` holds one: the header and the frames of tensors.

        A header lies in memory that the next message overwrites.
        """
        if self._descriptor in ready:
            assert self._datagrams is not None
            try:
                return self._room[: self._datagrams.recv_into(self._room)], []
            except BlockingIOError:
                pass
        if self.raw in ready:
            return self._from_zmq()
        return None

    def _from_zmq(self) -> tuple[Buffer, list[Buffer]] | None:
        header = _take(self.raw, self._unread)
        return None if header is None else (header, _frames(self.raw))


class Outlet:
    """A connected DEALER, and the shortcut to the same reader when it is on this host."""

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
        """Why whoever has bound the address does not speak with this process, if it became clear that it never will."""
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
        """False while a link by tcp that only sends is not connected; may be asked from any thread."""
        return self._state is None or self._state.connected

    def close(self) -> None:
        """Speak to this reader no more."""
        self._close(self.raw, self._datagrams)

    def send(self, header: bytes, frames: Sequence[Buffer] = (), *, track: bool = False) -> list[zmq.MessageTracker]:
        """Queue one message; large frames go out from their own memory, which must not change until then.

        With ``track`` all frames do, and the trackers returned say when they are out.
        """
        if self._datagrams is not None and not frames:
            try:
                self._datagrams.send(header)
                return []
            except OSError:  # too large, the queue is full, or the reader is gone, which is noticed elsewhere
                pass
        if self._unread is not None:
            self._unread.add(self.raw)  # as for an answer
        self.raw.send(header, _MORE | _NOBLOCK if frames else _NOBLOCK)
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
        """One header if there is one, where the outlet also receives."""
        assert self._unread is not None
        return _take(self.raw, self._unread)

    def receive_all(self) -> tuple[bytes, list[Buffer]] | None:
        """One header if there is one, with the frames that follow it."""
        header = self.receive()
        return None if header is None else (header, _frames(self.raw))


def _frames(raw: zmq.Socket[bytes]) -> list[Buffer]:
    """The frames that follow a header that was taken."""
    frames: list[Buffer] = []
    while raw.getsockopt(_RCVMORE):
        frames.append(raw.recv(copy=False).buffer)
    return frames


def _take(raw: zmq.Socket[bytes], unread: set[object]) -> bytes | None:
    """The first frame of the next message, if there is one; keeps track of whether there may be more."""
    try:
        frame = raw.recv(_NOBLOCK)
    except zmq.Again:
        unread.discard(raw)
        return None
    unread.add(raw)
    return frame
