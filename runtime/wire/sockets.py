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

_BACKLOG = 1024
_CONTEXT_DESCRIPTORS, _SOCKET_DESCRIPTORS = 16, 8

DEFAULT_MESSAGE_BYTES = MAX_FRAME_BYTES
"""The largest frame that is taken; a connection that announces a larger one is closed before memory is taken for it."""

_DOMAIN = "onnxsplit"


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
        self._states: dict[zmq.Socket[bytes], LinkState] = {}
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


class _Allowed:
    """Answers the authenticator."""

    def __init__(self, allows: Callable[[str], bool]) -> None:
        self._allows = allows

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether a public key may connect."""
        return self._allows(key.decode())
