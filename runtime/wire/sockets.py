"""The sockets of one thread: opens and closes links, and waits for messages.

Every link is a ROUTER or DEALER that binds and DEALERs that connect. Sends never block. Queues are bounded by the
number of requests that the coordinator admits, not by a high-water mark, so ZeroMQ never drops a message silently.

Data links between processes on one host have a shortcut beside the ZeroMQ socket: a Unix datagram socket for messages
of one frame, such as a fragment whose tensors lie in shared memory. ZeroMQ passes each message through an I/O thread at
both ends. A datagram wakes only its receiver, which takes half the time and no processor time of I/O threads. A message
that has several frames, is too large for a datagram or finds the queue full is sent over ZeroMQ.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import zmq
import zmq.auth.thread
import zmq.utils.monitor

from runtime.descriptors import require_descriptors
from runtime.errors import PipelineError
from runtime.wire.codec import MAX_FRAME_BYTES, MAX_HEADER_BYTES
from runtime.wire.links import REFUSALS, AnsweringInlet, Inlet, LinkState, Outlet
from runtime.wire.security import Security, check_address

DEFAULT_MESSAGE_BYTES = MAX_FRAME_BYTES
"""The largest frame that is accepted. A connection that announces a larger one is closed before memory is allocated."""

_BACKLOG = 1024  # connections that may wait to be accepted
_CONTEXT_DESCRIPTORS, _SOCKET_DESCRIPTORS = 16, 8  # file descriptors that ZeroMQ opens for each, at most
_LEARNING_MS = 2000  # after which a connection that was refused for now is closed, and its owner tries again
_DOMAIN = "onnxsplit"  # ZAP domain, https://rfc.zeromq.org/spec/27/


class Sockets:
    """The sockets of one thread, in a ZeroMQ context of their own; a context manager that closes them all.

    Args:
        linger_s: seconds that closing waits for messages that have not been sent yet.
        security: how links over tcp are protected; plain links on this host only when None.
        message_bytes: the largest frame that is accepted.
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
        self._states: dict[zmq.Socket[bytes], LinkState] = {}
        self._bound_files: list[tuple[Path, int]] = []  # with the inode: another process may have bound the path since
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
        for file, inode in self._bound_files:
            with suppress(FileNotFoundError):
                if file.stat().st_ino == inode:
                    file.unlink()
        self._poll.close()

    def fileno(self) -> int:
        """A descriptor that is readable when something has arrived since :meth:`wait` last returned nothing."""
        return self._poll.fileno()

    def answering(self, address: str) -> AnsweringInlet:
        """Bind an address to receive messages from senders that can be answered.

        Args:
            address: the address; one that ends in ``:*`` binds any free tcp port.

        Raises:
            PipelineError: the address is malformed or in use, or would be reachable from other hosts without keys.
        """
        router = self._socket(zmq.ROUTER)
        router.setsockopt(zmq.MAXMSGSIZE, MAX_HEADER_BYTES)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a reconnect replaces a connection that still looks open
        return AnsweringInlet(router, self._bind(router, address), self._unread)

    def inlet(self, address: str, *, shortcut: Path | None = None) -> Inlet:
        """Bind an address to receive messages that are not answered.

        Args:
            address: the address, as in :meth:`answering`.
            shortcut: path of a Unix datagram socket where processes on this host may send messages of one frame.

        Raises:
            PipelineError: as :meth:`answering`.
        """
        dealer = self._socket(zmq.DEALER)
        bound = self._bind(dealer, address)
        datagrams = None
        if shortcut is not None:
            datagrams = self._datagrams()
            datagrams.bind(str(shortcut))
            self._note_file(shortcut)
            self.watch(datagrams.fileno())
        return Inlet(dealer, bound, datagrams, self._unread, self._security.revoked)

    def connect(self, address: str, *, receive: bool = False, shortcut: str = "", key: str = "") -> Outlet:
        """Connect to an address, to send messages to the process that has bound it.

        Args:
            address: the address.
            receive: whether answers are received too.
            shortcut: path of that process's Unix datagram socket; empty for none.
            key: the public key that the process must prove to have, where links are encrypted.

        Raises:
            PipelineError: the address cannot be used, or ``key`` is missing.
        """
        check_address(address, self._security)
        dealer = self._socket(zmq.DEALER)
        if receive:  # an identity that stays the same after a reconnect, so that answers arrive
            dealer.setsockopt(zmq.ROUTING_ID, b"\x01" + os.urandom(16))
        pair = self._security.pair
        if pair is not None and address.startswith("tcp://"):
            if not key:
                raise PipelineError(f"cannot connect to {address}: the public key of that process is not known")
            dealer.curve_publickey = pair.public.encode()
            dealer.curve_secretkey = pair.secret.encode()
            dealer.curve_serverkey = key.encode()
        monitor = None
        if receive:
            monitor = dealer.get_monitor_socket(sum(REFUSALS))
            self._monitors.append(monitor)
        elif address.startswith("tcp://"):
            self._states[dealer] = LinkState(dealer, self._context)
        try:
            dealer.connect(address)
        except zmq.ZMQError as error:
            raise PipelineError(f"cannot connect to {address}: {error.strerror}") from error
        if receive:
            self._listen(dealer)
        datagrams = None
        if shortcut:
            datagrams = self._datagrams()
            with suppress(OSError):  # the ZeroMQ link is used instead
                datagrams.connect(shortcut)
        unread = self._unread if receive else None
        return Outlet(dealer, datagrams, unread, monitor, self._states.get(dealer), self._close)

    def _close(self, raw: zmq.Socket[bytes], datagrams: socket.socket | None) -> None:
        """Close one link, and drop the messages that it has not sent yet."""
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
            if self._security.learns:
                raw.handshake_ivl = _LEARNING_MS
        try:
            bound = self._bind_now(raw, address)
        except zmq.ZMQError as error:
            raise PipelineError(f"cannot listen at {address}: {error.strerror}. Choose another address") from error
        self._listen(raw)
        return bound

    def bind_also(self, inlet: AnsweringInlet, address: str) -> bool:
        """Let an inlet listen at a further address too; False, with nothing changed, while that is in use.

        Raises:
            PipelineError: the address cannot be used.
        """
        check_address(address, self._security)
        if address.startswith("ipc://") and Path(address.removeprefix("ipc://")).exists():
            return False  # ZeroMQ would take the path from the process that listens there
        try:
            self._bind_now(inlet.raw, address)
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise PipelineError(f"cannot listen at {address}: {error.strerror}") from error
        return True

    def _bind_now(self, raw: zmq.Socket[bytes], address: str) -> str:
        """Bind a socket; returns the address with the port that was chosen."""
        before = os.umask(0o077)  # only this user may connect to an ipc socket
        try:
            raw.bind(address)
        finally:
            os.umask(before)
        bound = raw.getsockopt_string(zmq.LAST_ENDPOINT)
        if bound.startswith("ipc://"):
            self._note_file(Path(bound.removeprefix("ipc://")))
        return bound

    def _note_file(self, path: Path) -> None:
        self._bound_files.append((path, path.stat().st_ino))

    def _authenticate(self) -> None:
        """Check the key of every process that connects."""
        if self._authenticator is None:
            self._authenticator = _Authenticator(self._context, learns=self._security.learns)
            self._authenticator.start()
            self._authenticator.configure_curve_callback(
                domain=_DOMAIN, credentials_provider=_Allowed(self._security.allows)
            )

    def _datagrams(self) -> socket.socket:
        datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._datagram_sockets.append(datagrams)
        return datagrams

    def watch(self, descriptor: int) -> None:
        """Let :meth:`wait` also return when a file descriptor becomes readable."""
        self._sources[descriptor] = descriptor
        self._poll.register(descriptor, select.EPOLLIN)

    def unwatch(self, descriptor: int) -> None:
        """Let :meth:`wait` ignore a file descriptor from now on."""
        del self._sources[descriptor]
        self._poll.unregister(descriptor)

    def wait(self, seconds: float) -> set[object]:
        """Wait until something can be read, for at most ``seconds``; returns the ZeroMQ sockets and descriptors."""
        if self._unread:
            return self._unread | {self._sources[ready] for ready, _ in self._poll.poll(0)}
        return {self._sources[ready] for ready, _ in self._poll.poll(seconds)}

    def _listen(self, raw: zmq.Socket[bytes]) -> None:
        """Let :meth:`wait` return when a ZeroMQ socket has received something.

        The descriptor of a ZeroMQ socket is edge-triggered, so a socket counts as unread until a receive has returned
        nothing. (ZeroMQ's own poller queries every socket each time, which takes longer than everything else here.)
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
            (zmq.CONNECT_TIMEOUT, 3_000),  # the system's timeout grows, so a repaired link would reconnect late
        ):
            raw.setsockopt(option, value)
        self._open.append(raw)
        return raw


class _Authenticator(zmq.auth.thread.ThreadAuthenticator):
    """ZeroMQ's authenticator, which can also refuse keys for now.

    ZeroMQ never again tries a connection that was refused for good (status 400, https://rfc.zeromq.org/spec/27/).
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], *, learns: bool) -> None:
        super().__init__(context)
        self._refusal = b"300" if learns else b"400"

    def _send_zap_reply(self, request_id: bytes, code: bytes, text: bytes, user_id: str = "anonymous") -> None:
        super()._send_zap_reply(request_id, self._refusal if code == b"400" else code, text, user_id)


class _Allowed:
    """Tells ZeroMQ's authenticator which public keys may connect."""

    def __init__(self, allows: Callable[[str], bool]) -> None:
        self._allows = allows

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether a public key may connect."""
        return self._allows(key.decode())
