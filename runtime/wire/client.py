"""A link to a process that answers questions."""

from __future__ import annotations

from typing import Self

from runtime.wire.security import Security
from runtime.wire.sockets import Sockets


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
