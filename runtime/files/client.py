"""Fetches a plan's files from a coordinator, by their SHA-256. Interrupted transfers resume.

received    [0][1][2][3]                in order; a piece that is not the next one was requested twice, and is dropped
requested               [4][5][6][7]    at most ``_AHEAD`` pieces
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from onnxsplit.plan_base import FileEntry
from runtime.errors import PipelineError
from runtime.wire import codec
from runtime.wire.client import Client
from runtime.wire.codec import Buffer
from runtime.wire.messages.files import CHUNK_BYTES, Chunk, Fetch, NoFile

MAX_PLAN_BYTES = 64 << 20
"""The largest ``plan.json`` that is accepted."""

_AHEAD = 8  # pieces that are requested ahead
_ASK_AGAIN_S = 5.0  # wait for a piece before it is requested again
_PATIENCE_S = 60.0  # wait for a piece before the transfer fails
_ROOM_BYTES = 64 << 20  # bytes that are left free on the disk


class FileClient(Client):
    """A link to a :class:`~runtime.files.server.FileServer`; a context manager."""

    def plan(self, plan_id: str) -> bytes:
        """Fetch the ``plan.json`` with this SHA-256.

        Raises:
            PipelineError: the server does not have it, or sends another.
        """
        text = b"".join(self._pieces(plan_id, 0, None, MAX_PLAN_BYTES))
        if hashlib.sha256(text).hexdigest() != plan_id:
            raise PipelineError(f"{self._address} sent another plan.json than {plan_id[:12]}: its SHA-256 differs")
        return text

    def file(self, entry: FileEntry, target: Path, told: Callable[[int], None] = lambda _: None) -> None:
        """Fetch a file of the plan. An interrupted transfer resumes.

        Args:
            entry: the file's size and SHA-256.
            target: the path to write it to.
            told: called after each piece with the number of bytes that are there.

        Raises:
            PipelineError: the server does not have the file, its SHA-256 differs, or the disk has no room for it.
        """
        digest = hashlib.sha256()
        with target.open("ab+") as stream:
            have = os.fstat(stream.fileno()).st_size
            if have > entry.size_bytes:
                stream.truncate(have := 0)
            stream.seek(0)
            while block := stream.read(CHUNK_BYTES):
                digest.update(block)
            free = shutil.disk_usage(target.parent).free
            if entry.size_bytes - have + _ROOM_BYTES > free:
                raise PipelineError(
                    f"{target.parent} has {free >> 20} MiB free, and {entry.name} needs "
                    f"{(entry.size_bytes - have) >> 20} MiB more; make room, or name another folder with XDG_CACHE_HOME"
                )
            for piece in self._pieces(entry.sha256, have, entry.size_bytes, entry.size_bytes):
                stream.write(piece)
                digest.update(piece)
                told(have := have + len(piece))
        if digest.hexdigest() != entry.sha256:
            target.unlink()
            raise PipelineError(
                f"{entry.name}, as received from {self._address}, is not the plan's file: its SHA-256 differs"
            )

    def _pieces(self, sha256: str, begin: int, size: int | None, most: int) -> Iterator[Buffer]:
        """The pieces of a file from byte ``begin``.

        Args:
            sha256: the file's SHA-256.
            begin: the first byte.
            size: the file's size; None when only the server knows it.
            most: the largest size allowed.
        """
        received = requested = begin
        heard = time.monotonic()
        again = heard + _ASK_AGAIN_S
        while size is None or received < size:
            end = size if size is not None else received + 1
            while requested < end and requested - received < _AHEAD * CHUNK_BYTES:
                self._link.send(codec.encode(Fetch(sha256, requested, CHUNK_BYTES)))
                requested += CHUNK_BYTES
            message = self._link.receive_all()
            now = time.monotonic()
            if message is None:
                if now - heard > _PATIENCE_S:
                    raise PipelineError(f"{self._address} has sent no piece of a file for {_PATIENCE_S:.0f} s")
                if now > again:
                    requested, again = received, now + _ASK_AGAIN_S
                self._sockets.wait(_ASK_AGAIN_S / 5)
                continue
            piece, size = self._piece(sha256, received, size, most, *message)
            if piece is not None:
                heard, again = now, now + _ASK_AGAIN_S
                received += len(piece)
                yield piece

    def _piece(
        self, sha256: str, received: int, size: int | None, most: int, header: bytes, frames: list[Buffer]
    ) -> tuple[Buffer | None, int | None]:
        """The next piece, or None if the message holds another one; and the file's size, or None if it is not known."""
        answer = codec.decode_file_answer(header)
        if isinstance(answer, NoFile):
            raise PipelineError(f"{self._address} cannot send the file {sha256[:12]}: {answer.reason}")
        assert isinstance(answer, Chunk)
        if answer.sha256 != sha256 or answer.offset != received or len(frames) != 1:
            return None, size
        if answer.size_bytes > most or (size is not None and answer.size_bytes != size):
            raise PipelineError(
                f"{self._address} has {answer.size_bytes} bytes of the file {sha256[:12]}; expected {size or most}"
            )
        rest = answer.size_bytes - received
        if len(frames[0]) != min(rest, CHUNK_BYTES):
            raise PipelineError(
                f"{self._address} sent a piece of {len(frames[0])} bytes; expected {min(rest, CHUNK_BYTES)}"
            )
        return frames[0], answer.size_bytes
