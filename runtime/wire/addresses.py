"""The address by which a peer reaches this host, and the address by which this host reaches a peer."""

from __future__ import annotations

import socket

from runtime.errors import PipelineError


def own_address(peer: str) -> str:
    """The IP address by which a peer reaches this host.

    Args:
        peer: a tcp address on the peer's host.

    Returns:
        The address; an IPv6 address is in brackets.

    Raises:
        PipelineError: there is no route to the peer.
    """
    host = peer.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing: the kernel looks up the route
            name = str(probe.getsockname()[0])
    except OSError as error:
        raise PipelineError(f"cannot reach {peer}: {error.strerror}") from error
    return f"[{name}]" if ":" in name else name


def reachable(address: str, by: str) -> str:
    """The address to connect to, for an address that a peer has announced.

    A peer that listens on all addresses of its host announces ``0.0.0.0`` or ``[::]``.

    Args:
        address: what the peer has announced.
        by: a tcp address by which its host was reached.

    Returns:
        ``address``, with the host of ``by`` in place of ``0.0.0.0`` or ``[::]``.
    """
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or host not in ("0.0.0.0", "[::]"):  # noqa: S104  nothing is bound here
        return address
    return f"{by.rpartition(':')[0]}:{port}"
