"""What all headers share: their form, and bounded numbers."""

from __future__ import annotations

from typing import Annotated

import msgspec

# Every number has a bound, and all stay within 64 bits whatever is done with them: nothing said can end a process.
Amount = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]


Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]


Index = Annotated[int, msgspec.Meta(ge=-1, le=1 << 16)]


NodeNumber = Annotated[int, msgspec.Meta(ge=0, lt=256)]


Cost = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Base of all headers."""
