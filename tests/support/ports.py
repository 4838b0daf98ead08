"""TCP ports of the loopback for tests.

They are below the ports that the kernel assigns to connections, so no connection takes one between its choice and its
use. Each process of tests starts at another port, so that concurrent processes choose different ones.
"""

from __future__ import annotations

import os
import socket

_FIRST, _LAST = 10_000, 32_000
_next = os.getpid() * 97


def free_port() -> int:
    """Return a free port that was not returned before."""
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
