"""Zstandard for tensors on slow links between hosts. The library is optional, and is imported when first needed.

A compressed tensor is exactly one Zstandard frame, which states the size of its content.
"""

from __future__ import annotations

from functools import cache

from runtime.errors import ProtocolError

_LEVEL = 1  # higher levels gain little on activations, and are slower

Raw = bytes | memoryview


@cache
def can_compress() -> bool:
    """Whether the library is installed here."""
    try:
        import zstandard  # noqa: F401
    except ImportError:
        return False
    return True


def compressed(raw: Raw) -> bytes:
    """The bytes as one Zstandard frame. The library must be installed."""
    import zstandard

    frame: bytes = zstandard.ZstdCompressor(level=_LEVEL).compress(raw)
    return frame


def decompressed(frame: Raw, size_bytes: int) -> bytes:
    """The content of a Zstandard frame.

    Nothing is allocated for a frame that states another size than the expected one, and a frame cannot yield more than
    it states.

    Args:
        frame: the frame; may come from anyone.
        size_bytes: the size that the content must have, at least 1.

    Raises:
        ProtocolError: it is not one whole frame with a content of this size, or the library is not installed here.
    """
    if not can_compress():
        raise ProtocolError("it is compressed, and zstandard is not installed here")
    import zstandard

    try:
        stated = zstandard.frame_content_size(frame)
        if stated != size_bytes:
            raise ProtocolError(f"its compressed frame states {stated} bytes of content; expected {size_bytes}")
        content: bytes = zstandard.ZstdDecompressor().decompress(
            frame, max_output_size=size_bytes, allow_extra_data=False
        )
    except (zstandard.ZstdError, ValueError) as error:
        raise ProtocolError(f"it is not one whole Zstandard frame: {error}") from error
    if len(content) != size_bytes:
        raise ProtocolError(f"its compressed frame holds {len(content)} bytes; expected {size_bytes}")
    return content
