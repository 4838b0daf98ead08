"""The client side of a link to a server, for file transfers and measurements."""

from __future__ import annotations

from typing import Self

from runtime.wire.security import Security
from runtime.wire.sockets import Sockets


class Client:
    """A link to a server, with sockets of its own; a context manager.

    Args:
        address: the server's address.
        security: how the link is protected.
        key: the server's public key, where links are encrypted.

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
