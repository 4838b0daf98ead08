"""The base class of all messages, and the bounded numbers in them.

Every number has a bound, and every sum or product that is made of such numbers stays within 64 bits. A peer therefore
cannot make a process fail by sending a large number.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

Amount = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
"""A count, or a sum of costs."""

Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
"""A duration, or a reading of the host's monotonic clock."""

Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
"""A size, or an offset into memory."""

Index = Annotated[int, msgspec.Meta(ge=-1, le=1 << 16)]
"""The index of a stage or a replica; -1 has a meaning of its own in each field."""

NodeNumber = Annotated[int, msgspec.Meta(ge=0, lt=256)]
"""The number of a process of the pipeline; 0 is the coordinator."""

Cost = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
"""The cost of a request; see :data:`~runtime.balance.policies.UNIT_COST`."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """The base class of all messages, and of the structures in them: an array of the fields in their order."""
