"""Addresses: the one a peer reaches this host by, and whether an address can be reached."""

from __future__ import annotations

import socket

from runtime.errors import PipelineError


def own_address(peer: str) -> str:
    """The address of this host by which the host of a tcp address reaches it; brackets around IPv6."""
    host = peer.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing: it asks the routing table
            name = str(probe.getsockname()[0])
    except OSError as error:
        raise PipelineError(f"cannot reach {peer}: {error.strerror}") from error
    return f"[{name}]" if ":" in name else name


def reachable(address: str, by: str) -> str:
    """An address told by somebody who listens at all addresses of its host, for one who reached that host at ``by``."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or host not in ("0.0.0.0", "[::]"):  # noqa: S104  nothing is bound here
        return address
    return f"{by.rpartition(':')[0]}:{port}"
