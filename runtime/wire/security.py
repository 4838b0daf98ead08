"""Keys, and what protects a link."""

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

_MOST_SOCKET_PATH_BYTES = 107  # as sockaddr_un has room for


class KeyPair(msgspec.Struct, frozen=True):
    """A CURVE key pair, each half as 40 characters of Z85."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public!r})"


def new_key_pair() -> KeyPair:
    """A new one, at random."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


class Security(msgspec.Struct, frozen=True):
    """What links of tcp are to be protected with.

    Attributes:
        pair: the own keys; None leaves links plain.
        allows: whether the owner of a public key may connect; called in a thread of its own.
        insecure: plain links may leave this host.
    """

    pair: KeyPair | None = None
    allows: Callable[[str], bool] = lambda _: False
    insecure: bool = False


def check_address(address: str, security: Security | None = None) -> None:
    """Refuse an address that is malformed, or that would let plain messages leave this host.

    Raises:
        PipelineError: saying what is allowed.
    """
    security = security or Security()
    scheme, _, rest = address.partition("://")
    if scheme == "ipc" and rest:
        if (length := len(os.fsencode(rest))) > _MOST_SOCKET_PATH_BYTES:
            raise PipelineError(
                f"address {shown(address)}: its path has {length} bytes; a path of a socket may have "
                f"{_MOST_SOCKET_PATH_BYTES}. Choose a shorter one"
            )
        if "\0" in rest:
            raise PipelineError(f"address {shown(address)}: a path holds no NUL byte")
        return
    host, _, port = rest.rpartition(":")
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
            "`onnxsplit keys new` and give them with --keys, or say --insecure where everybody on the network is "
            "trusted"
        )
