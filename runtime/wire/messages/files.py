"""Messages of the file link, by which nodes fetch files of the plan."""

from __future__ import annotations

from typing import Annotated

import msgspec

from runtime.wire.messages.base import Amount, Message

CHUNK_BYTES = 1 << 20
"""The largest piece of a file that can be fetched at once."""


class Fetch(Message, tag="fetch", frozen=True):
    """Request for a piece of a file.

    Attributes:
        sha256: SHA-256 of a file of the plan, or of ``plan.json``.
        offset: of the piece's first byte.
        length: bytes wanted.
    """

    sha256: Annotated[str, msgspec.Meta(min_length=64, max_length=64)]
    offset: Amount
    length: Annotated[int, msgspec.Meta(ge=1, le=CHUNK_BYTES)]


class Chunk(Message, tag="chunk", frozen=True):
    """The piece from ``offset`` of a file of ``size_bytes``; its bytes are in the frame that follows."""

    sha256: str
    offset: Amount
    size_bytes: Amount


class NoFile(Message, tag="no-file", frozen=True):
    """The plan names no file with this SHA-256, or the file cannot be read."""

    sha256: str
    reason: str


FileAnswer = Chunk | NoFile
