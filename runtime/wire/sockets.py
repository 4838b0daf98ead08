"""Sockets: the one module that knows zmq.

Every link is a ROUTER or DEALER that binds and DEALERs that connect. Sends never block: queues are bounded by what the
coordinator admits, not by a socket's high-water mark, so that nothing is dropped behind anyone's back.

Data links between processes of one host have a shortcut beside the ZeroMQ socket: a Unix datagram socket that carries
messages of one frame, which is all that is left of a fragment whose tensors lie in shared memory. ZeroMQ hands every
message to a thread of its own at both ends; a datagram wakes its reader and nobody else, in half the time and without
those threads' share of busy cores. What does not fit, or finds the queue full, goes by ZeroMQ as everything else.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import zmq
import zmq.auth.thread
import zmq.utils.monitor

from runtime.descriptors import require_descriptors
from runtime.errors import PipelineError
from runtime.wire.codec import MAX_FRAME_BYTES, MAX_HEADER_BYTES, Buffer
from runtime.wire.security import Security, check_address

_ZERO_COPY_FROM = 64 * 1024
"""Bytes below which copying a frame is quicker than keeping track of it."""

_BACKLOG = 1024
_CONTEXT_DESCRIPTORS, _SOCKET_DESCRIPTORS = 16, 8

DEFAULT_MESSAGE_BYTES = MAX_FRAME_BYTES
"""The largest frame that is taken; a connection that announces a larger one is closed before memory is taken for it."""

_DOMAIN = "onnxsplit"
_PATIENCE = 5  # handshakes that may fail without a reason, as when the other side is just ending
_REFUSALS = {
    int(zmq.Event.HANDSHAKE_FAILED_AUTH): "it does not allow this process's key",
    int(zmq.Event.HANDSHAKE_FAILED_PROTOCOL): "it has no keys, and this process has",
    int(zmq.Event.HANDSHAKE_FAILED_NO_DETAIL): "it has no keys, or other keys than allowed/coordinator.key says",
}
_KEYLESS = "it speaks with those who have keys, and this process has none; give it some with --keys DIR"

# As integers: combining zmq's enums costs more than sending.
_NOBLOCK, _MORE, _RCVMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE), int(zmq.RCVMORE)


class Sockets:
    """The sockets of one thread, in a context of their own; a context manager that closes all at once.

    Args:
        linger_s: how long closing waits for messages that are still to be sent.
        security: of links by tcp.
        message_bytes: the largest frame that is taken.
    """

    def __init__(
        self,
        *,
        linger_s: float = 0.0,
        security: Security | None = None,
        message_bytes: int = DEFAULT_MESSAGE_BYTES,
    ) -> None:
        require_descriptors(_CONTEXT_DESCRIPTORS, "a set of sockets")
        self._linger_ms = round(linger_s * 1000)
        self._security = security or Security()
        self._message_bytes = message_bytes
        self._context = zmq.Context(io_threads=1)
        self._authenticator: zmq.auth.thread.ThreadAuthenticator | None = None
        self._open: list[zmq.Socket[bytes]] = []
        self._monitors: list[zmq.Socket[bytes]] = []
        self._states: dict[zmq.Socket[bytes], _LinkState] = {}
        self._bound_files: list[Path] = []
        self._datagram_sockets: list[socket.socket] = []
        self._poll = select.epoll()
        self._sources: dict[int, object] = {}
        self._unread: set[object] = set()

    def __enter__(self) -> Sockets:
        return self

    def __exit__(self, *_: object) -> None:
        for monitor in self._monitors:
            monitor.close(linger=0)
        for state in self._states.values():
            state.close()
        for raw in self._open:
            raw.close(linger=self._linger_ms)
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()
        for datagrams in self._datagram_sockets:
            datagrams.close()
        for file in self._bound_files:
            file.unlink(missing_ok=True)
        self._poll.close()

    def fileno(self) -> int:
        """Readable when :meth:`wait` would find something that has come since it found nothing."""
        return self._poll.fileno()

    def answering(self, address: str) -> AnsweringInlet:
        """Take messages at an address, which may end in ``:*`` for any free tcp port, from senders to be answered.

        Raises:
            PipelineError: the address is malformed, in use, or would be reachable from other hosts.
        """
        router = self._socket(zmq.ROUTER)
        router.setsockopt(zmq.MAXMSGSIZE, MAX_HEADER_BYTES)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # who connects anew is who it was, also before its end is noticed
        return AnsweringInlet(router, self._bind(router, address), self._unread)

    def inlet(self, address: str, *, shortcut: Path | None = None) -> Inlet:
        """Take messages at an address, and on this host at a shortcut beside it.

        Raises:
            PipelineError: as :meth:`answering`.
        """
        dealer = self._socket(zmq.DEALER)
        bound = self._bind(dealer, address)
        datagrams = None
        if shortcut is not None:
            datagrams = self._datagrams()
            datagrams.bind(str(shortcut))
            self._bound_files.append(shortcut)
            self.watch(datagrams.fileno())
        return Inlet(dealer, bound, datagrams, self._unread)

    def connect(self, address: str, *, receive: bool = False, shortcut: str = "", key: str = "") -> Outlet:
        """Send to whoever has bound an address; ``receive`` also takes what comes back.

        ``key`` is the public key of who must be there, where links are encrypted.
        """
        check_address(address, self._security)
        dealer = self._socket(zmq.DEALER)
        if receive:  # so that who answers knows it again when the link breaks and comes back
            dealer.setsockopt(zmq.ROUTING_ID, b"\x01" + os.urandom(16))
        pair = self._security.pair
        if pair is not None and address.startswith("tcp://"):
            if not key:
                raise PipelineError(f"no key is known of the process at {address}, so no link is made to it")
            dealer.curve_publickey = pair.public.encode()
            dealer.curve_secretkey = pair.secret.encode()
            dealer.curve_serverkey = key.encode()
        monitor = None
        if receive:
            monitor = dealer.get_monitor_socket(sum(_REFUSALS))
            self._monitors.append(monitor)
        elif address.startswith("tcp://"):
            self._states[dealer] = _LinkState(dealer, self._context)
        try:
            dealer.connect(address)
        except zmq.ZMQError as error:
            raise PipelineError(f"cannot connect to {address}: {error.strerror}") from error
        if receive:
            self._listen(dealer)
        datagrams = None
        if shortcut:
            datagrams = self._datagrams()
            with suppress(OSError):  # the ZeroMQ link is there all the same
                datagrams.connect(shortcut)
        unread = self._unread if receive else None
        return Outlet(dealer, datagrams, unread, monitor, self._states.get(dealer), self._close)

    def _close(self, raw: zmq.Socket[bytes], datagrams: socket.socket | None) -> None:
        """Close one link; what it has not sent yet is for nobody."""
        self._open.remove(raw)
        if (state := self._states.pop(raw, None)) is not None:
            state.close()
        for descriptor, source in list(self._sources.items()):
            if source is raw:
                self.unwatch(descriptor)
        self._unread.discard(raw)
        raw.close(linger=0)
        if datagrams is not None:
            self._datagram_sockets.remove(datagrams)
            datagrams.close()

    def _bind(self, raw: zmq.Socket[bytes], address: str) -> str:
        check_address(address, self._security)
        pair = self._security.pair
        if pair is not None and address.startswith("tcp://"):
            self._authenticate()
            raw.curve_server = True
            raw.curve_secretkey = pair.secret.encode()
            raw.zap_domain = _DOMAIN.encode()
        before = os.umask(0o077)  # an ipc socket is for the own user, wherever it is
        try:
            raw.bind(address)
        except zmq.ZMQError as error:
            raise PipelineError(f"cannot listen at {address}: {error.strerror}. Choose another address") from error
        finally:
            os.umask(before)
        bound = raw.getsockopt_string(zmq.LAST_ENDPOINT)
        if bound.startswith("ipc://"):
            self._bound_files.append(Path(bound.removeprefix("ipc://")))
        self._listen(raw)
        return bound

    def _authenticate(self) -> None:
        """Ask for each link that comes in whether its owner is allowed."""
        if self._authenticator is None:
            self._authenticator = zmq.auth.thread.ThreadAuthenticator(self._context)
            self._authenticator.start()
            self._authenticator.configure_curve_callback(
                domain=_DOMAIN, credentials_provider=_Allowed(self._security.allows)
            )

    def _datagrams(self) -> socket.socket:
        datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._datagram_sockets.append(datagrams)
        return datagrams

    def watch(self, descriptor: int) -> None:
        """Also wake up when a file descriptor becomes readable."""
        self._sources[descriptor] = descriptor
        self._poll.register(descriptor, select.EPOLLIN)

    def unwatch(self, descriptor: int) -> None:
        """No longer wake up for a file descriptor."""
        del self._sources[descriptor]
        self._poll.unregister(descriptor)

    def wait(self, seconds: float) -> set[object]:
        """The sockets (as their raw selves) and descriptors with something to read, after at most ``seconds``."""
        if self._unread:
            return self._unread | {self._sources[ready] for ready, _ in self._poll.poll(0)}
        return {self._sources[ready] for ready, _ in self._poll.poll(seconds)}

    def _listen(self, raw: zmq.Socket[bytes]) -> None:
        """Wake up for a ZeroMQ socket.

        Its descriptor tells only of news, so a socket counts as unread until a receive has found nothing. (zmq's own
        poller asks every socket at every turn, which takes longer than all else here.)
        """
        descriptor = int(raw.getsockopt(zmq.FD))
        self._sources[descriptor] = raw
        self._poll.register(descriptor, select.EPOLLIN)
        self._unread.add(raw)

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        require_descriptors(_SOCKET_DESCRIPTORS, "a link")
        raw = self._context.socket(kind)
        for option, value in (
            (zmq.LINGER, self._linger_ms),
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 0),
            (zmq.BACKLOG, _BACKLOG),
            (zmq.MAXMSGSIZE, self._message_bytes),
            (zmq.HEARTBEAT_IVL, 1000),
            (zmq.HEARTBEAT_TIMEOUT, 10_000),
            (zmq.CONNECT_TIMEOUT, 3_000),  # the system's own grows, so a link that is mended would come back late
        ):
            raw.setsockopt(option, value)
        self._open.append(raw)
        return raw


class _LinkState:
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
        state: _LinkState | None,
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
            if event in _REFUSALS:
                self._failed += _PATIENCE if event != zmq.Event.HANDSHAKE_FAILED_NO_DETAIL else 1
                if self._failed >= _PATIENCE:
                    return _REFUSALS[event] if self.raw.mechanism == zmq.CURVE else _KEYLESS
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


class Client:
    """A link to somebody who answers, with sockets of its own; a context manager.

    Args:
        address: of who answers.
        security: of the link.
        key: the other's public key, where links are encrypted.

    Raises:
        PipelineError: the address cannot be used.
    """

    def __init__(self, address: str, *, security: Security, key: str = "") -> None:
        self._address = address
        self._sockets = Sockets(security=security)
        self._link = self._sockets.connect(address, receive=True, key=key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sockets.__exit__()


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
        write, self._write = self._write, -1  # ringing late must not reach whatever has the number next
        os.close(write)


class _Allowed:
    """Answers the authenticator."""

    def __init__(self, allows: Callable[[str], bool]) -> None:
        self._allows = allows

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether a public key may connect."""
        return self._allows(key.decode())
