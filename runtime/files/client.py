"""Takes a plan's files from a coordinator: by hash, a few pieces ahead, going on where an earlier try stopped.

asked    [4][5][6][7]                  at most ``_AHEAD`` pieces
taken    [0][1][2][3]                  in order; what is not the next piece was asked for twice, and is dropped
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from onnxsplit.plan import FileEntry
from runtime.errors import PipelineError
from runtime.wire import codec
from runtime.wire.client import Client
from runtime.wire.codec import Buffer
from runtime.wire.messages.files import CHUNK_BYTES, Chunk, Fetch, NoFile

MAX_PLAN_BYTES = 64 << 20
"""A larger ``plan.json`` is not taken."""

_AHEAD = 8
_ASK_AGAIN_S = 5.0
_PATIENCE_S = 60.0
_ROOM_BYTES = 64 << 20  # that stay free on the disk


class FileClient(Client):
    """A link to a file server."""

    def plan(self, plan_id: str) -> bytes:
        """The bytes of the ``plan.json`` with this SHA-256.

        Raises:
            PipelineError: there is none, or it is another.
        """
        text = b"".join(self._pieces(plan_id, 0, None, MAX_PLAN_BYTES))
        if hashlib.sha256(text).hexdigest() != plan_id:
            raise PipelineError(f"what {self._address} gives as the plan {plan_id[:12]} is another")
        return text

    def file(self, entry: FileEntry, target: Path, told: Callable[[int], None] = lambda _: None) -> None:
        """Have a file of the plan at ``target``; what is there of an earlier try is kept.

        Args:
            entry: its size and SHA-256.
            target: where to.
            told: hears how many bytes are there, whenever a piece has come.

        Raises:
            PipelineError: it is not to be had, is another than the plan says, or there is no room for it.
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
            raise PipelineError(f"{entry.name} as it came is another than the plan says: its SHA-256 differs")

    def _pieces(self, sha256: str, begin: int, size: int | None, most: int) -> Iterator[Buffer]:
        """The bytes from ``begin`` on. ``size`` is the whole file's, None when only the server knows it."""
        taken = asked = begin
        heard = time.monotonic()
        again = heard + _ASK_AGAIN_S
        while size is None or taken < size:
            end = size if size is not None else taken + 1
            while asked < end and asked - taken < _AHEAD * CHUNK_BYTES:
                self._link.send(codec.encode(Fetch(sha256, asked, CHUNK_BYTES)))
                asked += CHUNK_BYTES
            message = self._link.receive_all()
            now = time.monotonic()
            if message is None:
                if now - heard > _PATIENCE_S:
                    raise PipelineError(f"{self._address} has given no piece of a file for {_PATIENCE_S:.0f} s")
                if now > again:
                    asked, again = taken, now + _ASK_AGAIN_S
                self._sockets.wait(_ASK_AGAIN_S / 5)
                continue
            piece, size = self._piece(sha256, taken, size, most, *message)
            if piece is not None:
                heard, again = now, now + _ASK_AGAIN_S
                taken += len(piece)
                yield piece

    def _piece(
        self, sha256: str, taken: int, size: int | None, most: int, header: bytes, frames: list[Buffer]
    ) -> tuple[Buffer | None, int | None]:
        """The next piece, if a message holds it, and the size of the file as far as it is known."""
        said = codec.decode_file_answer(header)
        if isinstance(said, NoFile):
            raise PipelineError(f"{self._address} does not give the file {sha256[:12]}: {said.reason}")
        assert isinstance(said, Chunk)
        if said.sha256 != sha256 or said.offset != taken or len(frames) != 1:
            return None, size
        if said.size_bytes > most or (size is not None and said.size_bytes != size):
            raise PipelineError(
                f"{self._address} has {said.size_bytes} bytes of the file {sha256[:12]}, not {size or most}"
            )
        rest = said.size_bytes - taken
        if len(frames[0]) != min(rest, CHUNK_BYTES):
            raise PipelineError(f"{self._address} gave {len(frames[0])} bytes where {min(rest, CHUNK_BYTES)} were due")
        return frames[0], said.size_bytes
