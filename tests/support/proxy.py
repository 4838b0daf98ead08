"""A TCP link between two processes that can be cut, delayed and recorded."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress


class Proxy:
    """A link that can be cut and delayed; it forwards one port to another."""

    def __init__(self, port: int, target: int) -> None:
        self.server = socket.create_server(("127.0.0.1", port))
        self.target, self.delay_s, self.open = target, 0.0, True
        self.seen = bytearray()
        self.pairs: list[socket.socket] = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                near, _ = self.server.accept()
            except OSError:
                return
            if not self.open:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            self.pairs += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self.pump, args=(one, other), daemon=True).start()

    def pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                time.sleep(self.delay_s)
                self.seen += data
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            _try(end.close)

    def cut(self) -> None:
        """Close all connections, and accept no more."""
        self.open = False
        for end in self.pairs:
            _try(lambda end=end: end.shutdown(socket.SHUT_RDWR))
        self.pairs.clear()

    def mend(self) -> None:
        self.open = True

    def close(self) -> None:
        self.cut()
        self.server.close()


def _try(what) -> None:
    with suppress(OSError):
        what()
