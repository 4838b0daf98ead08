"""TCP ports of the loopback for tests.

They lie below the ports that the kernel gives to connections, so none is taken between the choice and its use; and
each process of tests starts elsewhere, so that processes that run side by side choose different ones.
"""

from __future__ import annotations

import os
import socket

_FIRST, _LAST = 10_000, 32_000
_next = os.getpid() * 97


def free_port() -> int:
    """A port that nobody uses now, and that was not given before."""
    global _next
    while True:
        _next += 1
        port = _FIRST + _next % (_LAST - _FIRST)
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
