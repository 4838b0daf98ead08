"""Serves a plan's files, by their SHA-256 and in pieces, to nodes that do not see the plan's folder."""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from onnxsplit.plan import PLAN_FILE, Plan
from runtime.logs import DropLog
from runtime.wire import codec
from runtime.wire.links import AnsweringInlet
from runtime.wire.messages.files import Chunk, Fetch, NoFile
from runtime.wire.security import Security
from runtime.wire.sockets import Sockets
from runtime.wire.wakeup import Wakeup

_drops = DropLog(logging.getLogger("runtime.coordinator"))


class FileServer:
    """A thread that serves the files that a plan names, and no others; a context manager that starts and ends it.

    Args:
        address: the address to bind.
        folder: the plan directory.
        plan: its plan.
        plan_id: the SHA-256 of ``plan.json``, which is served too.
        security: how links are protected.

    Attributes:
        address: the address that was bound.

    Raises:
        PipelineError: the address cannot be used.
    """

    def __init__(self, address: str, folder: Path, plan: Plan, plan_id: str, *, security: Security) -> None:
        self._folder = folder
        self._revoked = security.revoked
        self._names = {entry.sha256: entry.name for entry in plan.files()} | {plan_id: PLAN_FILE}
        self._ending = False
        self._wakeup = Wakeup()
        self._stack = ExitStack()
        self._sockets = self._stack.enter_context(Sockets(security=security))
        self._files: dict[str, int] = {}
        self._last_ns = 0
        with ExitStack() as undo:
            undo.callback(self._stack.close)
            self._inlet = self._sockets.answering(address)
            undo.pop_all()
        self.address = self._inlet.address
        self._thread = threading.Thread(target=self._serve, name="files", daemon=True)

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending = True
        self._wakeup.ring()
        self._thread.join()
        self._stack.close()
        self._wakeup.close()
        for descriptor in self._files.values():
            os.close(descriptor)

    @property
    def idle_s(self) -> float:
        """Seconds since the last piece was sent; infinite when none was."""
        return time.monotonic() - self._last_ns / 1e9 if self._last_ns else float("inf")

    def _serve(self) -> None:
        self._sockets.watch(self._wakeup.fileno())
        while not self._ending:
            self._sockets.wait(60.0)
            while (message := self._inlet.receive()) is not None:
                identity, header, key = message
                if key in self._revoked():  # over a link that was opened before
                    continue
                try:
                    self._answer(self._inlet, identity, codec.decode_fetch(header))
                except Exception as error:  # a malformed request gets no answer, and others are served
                    _drops.note(error)

    def _answer(self, inlet: AnsweringInlet, identity: bytes, fetch: Fetch) -> None:
        try:
            descriptor = self._open(fetch.sha256)
            piece = os.pread(descriptor, fetch.length, fetch.offset)
            size = os.fstat(descriptor).st_size
        except OSError as error:
            inlet.send(identity, codec.encode(NoFile(fetch.sha256, error.strerror or str(error))))
            return
        self._last_ns = time.monotonic_ns()
        inlet.send(identity, codec.encode(Chunk(fetch.sha256, fetch.offset, size)), piece)

    def _open(self, sha256: str) -> int:
        if sha256 not in self._files:
            name = self._names.get(sha256)
            if name is None:
                raise FileNotFoundError(0, "the plan names no such file")
            self._files[sha256] = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        return self._files[sha256]
