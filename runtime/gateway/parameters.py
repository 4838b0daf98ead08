"""The parameters of a request that HTTP and gRPC share: time limits, and tensors in shared memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxsplit.errors import InputError, shown
from onnxsplit.tensors import Array
from runtime.gateway.protocol import (
    Read,
    RegionSlice,
    bytes_of,
    from_bytes,
)
from runtime.intake import MOST_TIMEOUT_S

MOST_JSON_BYTES = 64 << 20
"""The JSON of a request; tensors may follow it as bytes."""


MOST_TENSORS = 4096
"""Inputs of a request, and outputs."""


def from_region(name: str, datatype: str, shape: Sequence[int], place: RegionSlice, read: Read) -> Array:
    """A tensor in shared memory; its size is held against its shape before it is read.

    Raises:
        InputError: there is no such tensor.
    """
    size = bytes_of(name, datatype, shape)
    if size is not None and size != place.size_bytes:
        raise InputError(
            f"tensor {shown(name)} has shared_memory_byte_size {shown(place.size_bytes)}; {datatype} of shape "
            f"{list(shape)} has {size} bytes"
        )
    return from_bytes(name, datatype, shape, read(place))


def region_slice_of(name: str, parameters: Mapping[str, Any]) -> RegionSlice | None:
    """Where in shared memory a tensor is, or goes; None when it is not said to.

    Raises:
        InputError: the place makes no sense.
    """
    region = parameters.get("shared_memory_region")
    if region is None:
        return None
    size = _number(parameters, "shared_memory_byte_size")
    offset = _number(parameters, "shared_memory_offset") or 0
    if not isinstance(region, str) or size is None or size < 0 or offset < 0:
        raise InputError(
            f"tensor {shown(name)} in shared memory needs shared_memory_region (a name), shared_memory_byte_size and "
            "shared_memory_offset (bytes, 0 or more)"
        )
    return RegionSlice(region, offset, size)


def timeout_ns(parameters: Mapping[str, Any]) -> int | None:
    """The time a request may take; the protocol counts microseconds, and 0 is no limit.

    Raises:
        InputError: it is no number, or the request is one of a sequence.
    """
    if parameters.get("sequence_id"):
        raise InputError("sequence_id: requests that belong together are not supported; leave it out")
    timeout = _number(parameters, "timeout") or 0
    if not 0 <= timeout <= MOST_TIMEOUT_S * 10**6:
        raise InputError(
            f"timeout is {shown(timeout)}; it is microseconds, at most {MOST_TIMEOUT_S * 10**6} (a year), and 0 is no "
            "limit"
        )
    return timeout * 1000 or None


def _number(parameters: Mapping[str, Any], name: str) -> int | None:
    value = parameters.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise InputError(f"parameter {shown(name)} is {shown(value)}; it is a whole number")
    return value


def _flag(parameters: Mapping[str, Any], name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f"parameter {shown(name)} is {shown(value)}; it is true or false")
    return value
