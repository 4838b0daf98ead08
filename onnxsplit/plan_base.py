"""The base of all parts of a plan: bounded numbers, and the entry for a file."""

from __future__ import annotations

from typing import Annotated

import msgspec

from onnxsplit.numbers import MOST_FILE_BYTES

MOST_NODES = 255
"""The largest number of nodes of a plan: all replicas of all stages. It is also the largest number of stages."""

MOST_THREADS = 1024
"""The largest number of threads of one session."""

_MOST_RANK = 64
_MOST_INTEGER = 2**53 - 1  # the largest integer that every reader of JSON keeps exact

Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST_INTEGER)]
"""A time in nanoseconds, a size in bytes, the size of a dimension, or a count."""

Threads = Annotated[int, msgspec.Meta(ge=1, le=MOST_THREADS)]
StageIndex = Annotated[int, msgspec.Meta(ge=0, lt=MOST_NODES)]
Axis = Annotated[int, msgspec.Meta(ge=0, lt=_MOST_RANK)]
Rate = Annotated[float, msgspec.Meta(ge=0, le=1e18)]
RequestNs = Annotated[int, msgspec.Meta(ge=0, le=60 * 10**9)]
"""A time that a request costs a host beside the runs of the stages: at most a minute, in nanoseconds."""

CopyRate = Annotated[float, msgspec.Meta(ge=1000, le=1e18)]
"""A rate in bytes per second by which times are divided, so it is not 0."""

_FileSize = Annotated[int, msgspec.Meta(ge=0, le=MOST_FILE_BYTES)]


class PlanStruct(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all parts of a plan. They are immutable and compared by value; unknown JSON fields are ignored."""


class FileEntry(PlanStruct, frozen=True, kw_only=True):
    """One file of the plan directory: its name (without a folder), its size, and its SHA-256 in hexadecimal."""

    name: str
    sha256: str
    size_bytes: _FileSize
