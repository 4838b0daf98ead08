"""What nodes ask and are told on the link for files of the plan."""

from __future__ import annotations

from typing import Annotated

import msgspec

from runtime.wire.messages.base import Amount, Message

CHUNK_BYTES = 1 << 20
"""Of a file that is asked for at once, at most."""


class Fetch(Message, tag="fetch", frozen=True):
    """A node asks for a piece of a file of the plan, or of ``plan.json``, by the file's SHA-256."""

    sha256: Annotated[str, msgspec.Meta(min_length=64, max_length=64)]
    offset: Amount
    length: Annotated[int, msgspec.Meta(ge=1, le=CHUNK_BYTES)]


class Chunk(Message, tag="chunk", frozen=True):
    """The piece from ``offset`` of a file of ``size_bytes``; its bytes are the frame that follows."""

    sha256: str
    offset: Amount
    size_bytes: Amount


class NoFile(Message, tag="no-file", frozen=True):
    """No file of the plan has this SHA-256, or it cannot be read any more."""

    sha256: str
    reason: str


FileAnswer = Chunk | NoFile
