"""The parameters of requests that HTTP and gRPC share: time limits, sequences, shared memory, classifications. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxsplit.errors import InputError, shown
from onnxsplit.tensors import Array
from runtime.gateway.protocol.inference import ReadRegion, RegionSlice, RequestedOutput, SequencePlace
from runtime.gateway.protocol.tensor_data import bytes_of, from_bytes
from runtime.requests.normalize import MOST_TIMEOUT_S

MOST_JSON_BYTES = 64 << 20
"""Most bytes of a request's JSON, or of a gRPC message beside its raw tensors."""


MOST_TENSORS = 4096
"""Most inputs of a request, and most outputs."""

_MOST_SEQUENCE = 2**64 - 1  # the largest number of a sequence
_SEQUENCE_CHARACTERS = 128  # most characters of the text that names a sequence


def from_region(name: str, datatype: str, shape: Sequence[int], region_slice: RegionSlice, read: ReadRegion) -> Array:
    """A tensor in shared memory. Its size is checked against its shape before it is read.

    Raises:
        InputError: The shape, the type or the size does not fit, or the region cannot be read.
    """
    size = bytes_of(name, datatype, shape)
    if size is not None and size != region_slice.size_bytes:
        raise InputError(
            f"tensor {shown(name)} has shared_memory_byte_size {shown(region_slice.size_bytes)}; {datatype} of shape "
            f"{list(shape)} has {size} bytes"
        )
    return from_bytes(name, datatype, shape, read(region_slice))


def region_slice_of(name: str, parameters: Mapping[str, Any]) -> RegionSlice | None:
    """Where in shared memory a tensor is or goes; None when its parameters name no region.

    Raises:
        InputError: The parameters name a region, but not a valid part of one.
    """
    region = parameters.get("shared_memory_region")
    if region is None:
        return None
    size = whole_number(parameters, "shared_memory_byte_size")
    offset = whole_number(parameters, "shared_memory_offset") or 0
    if not isinstance(region, str) or size is None or size < 0 or offset < 0:
        raise InputError(
            f"tensor {shown(name)} in shared memory needs shared_memory_region (a name), shared_memory_byte_size and "
            "shared_memory_offset (bytes, 0 or more)"
        )
    return RegionSlice(region, offset, size)


def requested_output(name: str, parameters: Mapping[str, Any], *, binary: bool) -> RequestedOutput:
    """An output that a request names, with what its parameters ask for.

    Raises:
        InputError: A parameter is not valid.
    """
    classes = whole_number(parameters, "classification") or 0
    if classes < 0:
        raise InputError(f"classification of output {shown(name)} is {shown(classes)}; it is the number of classes")
    return RequestedOutput(name, binary, region_slice_of(name, parameters), classes)


def timeout_ns(parameters: Mapping[str, Any]) -> int | None:
    """The time limit of a request in nanoseconds; None for no limit. The protocol counts microseconds, 0 for no limit.

    Raises:
        InputError: The limit is not a number of microseconds.
    """
    timeout = whole_number(parameters, "timeout") or 0
    if not 0 <= timeout <= MOST_TIMEOUT_S * 10**6:
        raise InputError(
            f"timeout is {shown(timeout)}; it must be from 0 (no limit) to {MOST_TIMEOUT_S * 10**6} microseconds (a "
            "year)"
        )
    return timeout * 1000 or None


def sequence(parameters: Mapping[str, Any]) -> SequencePlace | None:
    """The sequence that a request belongs to; None for no sequence, which is the number 0 or an empty text, too.

    Raises:
        InputError: The sequence is not named by such a number or text, or the request starts or ends an unnamed one.
    """
    start, end = flag(parameters, "sequence_start"), flag(parameters, "sequence_end")
    name: int | str | None = parameters.get("sequence_id")
    if isinstance(name, str):
        fits = len(name) <= _SEQUENCE_CHARACTERS
    else:
        fits = name is None or (type(name) is int and 0 <= name <= _MOST_SEQUENCE)
    if not fits:
        raise InputError(
            f"sequence_id is {shown(name)}; it must be a whole number from 1 to {_MOST_SEQUENCE}, or a text of at most "
            f"{_SEQUENCE_CHARACTERS} characters"
        )
    if name:
        return SequencePlace(name, start, end)
    if start or end:
        raise InputError("sequence_start and sequence_end need the sequence_id of their sequence; add it")
    return None


def priority(parameters: Mapping[str, Any]) -> int:
    """The priority of a request: 1 for the most important ones, 0 for an ordinary one.

    Raises:
        InputError: It is not a whole number, or is negative.
    """
    value = whole_number(parameters, "priority") or 0
    if value < 0:
        raise InputError(f"priority is {shown(value)}; 1 is the most important, and 0 is an ordinary request")
    return value


def whole_number(parameters: Mapping[str, Any], name: str) -> int | None:
    """A parameter that is a whole number; None when it is not given.

    Raises:
        InputError: It is something else.
    """
    value = parameters.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise InputError(f"parameter {shown(name)} is {shown(value)}; it must be a whole number")
    return value


def flag(parameters: Mapping[str, Any], name: str) -> bool:
    """A parameter that is true or false; False when it is not given.

    Raises:
        InputError: It is something else.
    """
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f"parameter {shown(name)} is {shown(value)}; it must be true or false")
    return value
