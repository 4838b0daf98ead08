"""Key pairs, and how links over tcp are protected."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable

import msgspec
import zmq
import zmq.auth.thread
import zmq.utils.monitor

from onnxsplit.errors import shown
from onnxsplit.numbers import parse_whole
from runtime.errors import PipelineError

_MOST_SOCKET_PATH_BYTES = 107  # the size of sun_path in sockaddr_un, less the NUL


class KeyPair(msgspec.Struct, frozen=True):
    """A CURVE key pair, each half as 40 characters of Z85."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public!r})"


def new_key_pair() -> KeyPair:
    """A new random key pair."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


class Security(msgspec.Struct, frozen=True):
    """How links over tcp are protected.

    Attributes:
        pair: this process's keys; None leaves links unencrypted.
        allows: whether the owner of a public key may connect; called in ZeroMQ's authentication thread.
        learns: whether ``allows`` learns keys from a message that may arrive after their owners connect. A key that it
            does not know is then refused for now: its owner tries again, and keeps the messages that it has queued.
        insecure: whether unencrypted links may leave this host.
        revoked: the keys that ``allows`` allowed before and does not now. What their owners send over links that are
            still open is dropped. Called for each message; it is to be fast.
    """

    pair: KeyPair | None = None
    allows: Callable[[str], bool] = lambda _: False
    learns: bool = False
    insecure: bool = False
    revoked: Callable[[], frozenset[str]] = frozenset


def _with_scheme(address: str) -> str | None:
    """The address that a text without a scheme stands for: HOST:PORT, or a path; None where it could be neither."""
    host, _, port = address.rpartition(":")
    if host and (port == "*" or parse_whole(port, 65535) is not None):
        return f"tcp://{address}"
    return f"ipc://{address}" if address.startswith(("/", "./", "../")) else None


def check_address(address: str, security: Security | None = None) -> None:
    """Check that an address is well-formed, and that no unencrypted message would leave this host.

    Raises:
        PipelineError: it is malformed, or leaves this host without keys.
    """
    security = security or Security()
    scheme, _, rest = address.partition("://")
    if scheme == "ipc" and rest:
        if (length := len(os.fsencode(rest))) > _MOST_SOCKET_PATH_BYTES:
            raise PipelineError(
                f"address {shown(address)}: its path has {length} bytes; a socket's path may have at most "
                f"{_MOST_SOCKET_PATH_BYTES}. Choose a shorter path"
            )
        if "\0" in rest:
            raise PipelineError(f"address {shown(address)}: a path must not contain a NUL byte")
        return
    host, _, port = rest.rpartition(":")
    if "://" not in address and (guess := _with_scheme(address)) is not None:
        raise PipelineError(f"address {shown(address)} has no scheme; write {guess}")
    if scheme != "tcp" or not host or (port != "*" and parse_whole(port, 65535) is None):
        raise PipelineError(
            f"address {shown(address)}: expected tcp://HOST:PORT, with a port up to 65535, or ipc://PATH"
        )
    name = host.strip("[]")
    try:
        loopback = name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        loopback = False
    if not loopback and security.pair is None and not security.insecure:
        raise PipelineError(
            f"address {shown(address)} leaves this host, and there are no keys to protect the link: make some with "
            "`onnxsplit keys new` and pass them with --keys, or pass --insecure if every host on the network is "
            "trusted"
        )
