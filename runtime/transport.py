"""ZeroMQ sockets: the one module that knows zmq.

Every link is a ROUTER that binds and DEALERs that connect. Sends never block: queues are bounded by what the
coordinator admits, not by a socket's high-water mark, so that nothing is dropped behind anyone's back.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import zmq

from runtime.codec import Buffer
from runtime.errors import PipelineError

_ZERO_COPY_FROM = 64 * 1024
"""Bytes below which copying a frame is quicker than keeping track of it."""

_BACKLOG = 1024


class Sockets:
    """The sockets of one thread, in a context of their own; a context manager that closes all at once.

    Args:
        linger_s: how long closing waits for messages that are still to be sent.
    """

    def __init__(self, *, linger_s: float = 0.0) -> None:
        self._linger_ms = round(linger_s * 1000)
        self._context = zmq.Context(io_threads=1)
        self._open: list[zmq.Socket[bytes]] = []
        self._bound_files: list[Path] = []
        self._poller = zmq.Poller()

    def __enter__(self) -> Sockets:
        return self

    def __exit__(self, *_: object) -> None:
        for socket in self._open:
            socket.close(linger=self._linger_ms)
        self._context.term()
        for file in self._bound_files:
            file.unlink(missing_ok=True)

    def bind(self, address: str) -> Inlet:
        """Take messages at an address, which may end in ``:*`` for any free tcp port.

        Raises:
            PipelineError: the address is malformed, in use, or would be reachable from other hosts.
        """
        check_address(address)
        socket = self._socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise PipelineError(f"cannot listen at {address}: {error.strerror}. Choose another address") from error
        bound = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        if bound.startswith("ipc://"):
            self._bound_files.append(Path(bound.removeprefix("ipc://")))
        self._poller.register(socket, zmq.POLLIN)
        return Inlet(socket, bound)

    def connect(self, address: str, *, receive: bool = False) -> Outlet:
        """Send to whoever has bound an address; ``receive`` also takes what comes back."""
        check_address(address)
        socket = self._socket(zmq.DEALER)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            raise PipelineError(f"cannot connect to {address}: {error.strerror}") from error
        if receive:
            self._poller.register(socket, zmq.POLLIN)
        return Outlet(socket)

    def watch(self, descriptor: int) -> None:
        """Also wake up when a file descriptor becomes readable."""
        self._poller.register(descriptor, zmq.POLLIN)

    def unwatch(self, descriptor: int) -> None:
        """No longer wake up for a file descriptor."""
        self._poller.unregister(descriptor)

    def wait(self, seconds: float) -> set[object]:
        """The sockets (as their raw selves) and descriptors with something to read, after at most ``seconds``."""
        return {ready for ready, _ in self._poller.poll(max(0, round(seconds * 1000)))}

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        for option, value in (
            (zmq.LINGER, self._linger_ms),
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 0),
            (zmq.BACKLOG, _BACKLOG),
            (zmq.HEARTBEAT_IVL, 1000),
            (zmq.HEARTBEAT_TIMEOUT, 10_000),
        ):
            socket.setsockopt(option, value)
        self._open.append(socket)
        return socket


class Inlet:
    """A bound ROUTER. ``address`` is where it really is."""

    def __init__(self, socket: zmq.Socket[bytes], address: str) -> None:
        self.raw = socket
        self.address = address

    def receive(self) -> tuple[bytes, bytes, list[Buffer]] | None:
        """One message if there is one: the sender's identity, the header, and the frames of tensors."""
        raw = self.raw
        try:
            identity = raw.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        header = raw.recv() if raw.getsockopt(zmq.RCVMORE) else b""
        frames: list[Buffer] = []
        while raw.getsockopt(zmq.RCVMORE):
            frames.append(raw.recv(copy=False).buffer)
        return identity, header, frames

    def send(self, identity: bytes, header: bytes) -> None:
        """Answer a peer; a peer that is gone is no error here, its end is noticed elsewhere."""
        with suppress(zmq.ZMQError):
            self.raw.send_multipart([identity, header], zmq.NOBLOCK)


class Outlet:
    """A connected DEALER."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.raw = socket

    def send(self, header: bytes, frames: Sequence[Buffer] = (), *, track: bool = False) -> list[zmq.MessageTracker]:
        """Queue one message; large frames go out from their own memory, which must not change until then.

        With ``track`` all frames do, and the trackers returned say when they are out.
        """
        self.raw.send(header, (zmq.SNDMORE if frames else 0) | zmq.NOBLOCK)
        last = len(frames) - 1
        trackers = []
        for position, frame in enumerate(frames):
            flags = (zmq.SNDMORE if position < last else 0) | zmq.NOBLOCK
            if track:
                trackers.append(self.raw.send(frame, flags, copy=False, track=True))
            else:
                self.raw.send(frame, flags, copy=len(frame) < _ZERO_COPY_FROM)
        return trackers

    def receive(self) -> bytes | None:
        """One header if there is one."""
        try:
            return self.raw.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None


class Wakeup:
    """Wakes a thread that waits in :meth:`Sockets.wait`, from any other thread."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        """The descriptor to watch."""
        return self._read

    def ring(self) -> None:
        """Wake the waiting thread; ringing twice is as good as once."""
        with suppress(BlockingIOError, OSError):
            os.write(self._write, b"!")

    def clear(self) -> None:
        """Take note of all rings so far."""
        with suppress(BlockingIOError):
            os.read(self._read, 4096)

    def close(self) -> None:
        """Close both ends."""
        os.close(self._read)
        os.close(self._write)


def check_address(address: str) -> None:
    """Refuse what is neither ipc nor loopback tcp: links that leave the host need keys, which are not there yet.

    Raises:
        PipelineError: saying what is allowed.
    """
    scheme, _, rest = address.partition("://")
    if scheme == "ipc" and rest:
        return
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not (port == "*" or port.isdecimal()):
        raise PipelineError(f"address {address!r}: expected tcp://HOST:PORT or ipc://PATH")
    name = host.strip("[]")
    try:
        loopback = name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise PipelineError(
            f"address {address!r} would leave this host, and links are not encrypted yet; use 127.0.0.1 "
            "(between hosts: through an ssh tunnel)"
        )
