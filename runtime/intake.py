"""What a caller gives, made normal once, so that nothing behind it needs to look again. Pure.

    inputs    name -> array of the host's byte order; strings are ``str`` that UTF-8 can encode
    outputs   a tuple of names, each once
    timeout   nanoseconds, positive and bounded

Everything that cannot be made so is refused with :class:`~onnxsplit.errors.InputError` before a place is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.ma  # loaded now: an interrupt while a request loads it would stop all others

from onnxsplit.errors import InputError, one_line, shown
from onnxsplit.tensors import Array

MOST_TIMEOUT_S = 365 * 24 * 3600
"""The longest timeout, a year: deadlines stay far from what 64 bits of nanoseconds hold."""

_TEXT_KINDS = "OUST"  # objects, fixed-width unicode and bytes, and NumPy's own strings
_WORDS = 200


def normal_inputs(inputs: object, specs: Mapping[str, tuple[str, Sequence[int | str] | None]]) -> dict[str, Array]:
    """The arrays of a request; numeric ones are copied only where their byte order is foreign.

    Args:
        inputs: name -> anything NumPy makes an array of.
        specs: what the model takes: name -> (ONNX type, shape).

    Raises:
        InputError: it is no mapping, or a value is no array of numbers or strings.
    """
    if not isinstance(inputs, Mapping):
        raise InputError(f"inputs must map names to arrays, and are {_kind(inputs)}")
    found = {}
    for name, value in inputs.items():
        if not isinstance(name, str):
            raise InputError(f"the name of an input must be text, not {shown(name)}")
        found[name] = _array(name, value, specs[name][0] if name in specs else None)
    return found


def normal_names(outputs: object) -> tuple[str, ...] | None:
    """The outputs that are asked for, each once; None stands for all.

    Raises:
        InputError: it is no list of names.
    """
    if outputs is None:
        return None
    if isinstance(outputs, str | bytes | Mapping) or not isinstance(outputs, Collection):
        raise InputError(f"outputs must be a list of names, as in ['y'], and is {shown(outputs)}")
    for name in outputs:
        if not isinstance(name, str):
            raise InputError(f"outputs must be a list of names, and holds {shown(name)}")
    return tuple(dict.fromkeys(outputs))


def normal_timeout_ns(timeout: object) -> int | None:
    """A timeout in seconds, as nanoseconds; None stands for none.

    Raises:
        InputError: it is no finite number above 0, or longer than :data:`MOST_TIMEOUT_S`.
    """
    if timeout is None:
        return None
    kinds = int | float | np.integer | np.floating
    is_number = isinstance(timeout, kinds) and not isinstance(timeout, bool | np.timedelta64)
    if is_number and 0 < timeout <= MOST_TIMEOUT_S:  # type: ignore[operator]
        return max(1, int(float(timeout) * 1e9))  # type: ignore[arg-type]
    raise InputError(
        f"timeout is {shown(timeout)}; allowed: a number of seconds above 0 and up to {MOST_TIMEOUT_S} (a year), "
        "or None for no limit"
    )


def _array(name: str, value: object, expected: str | None) -> Array:
    try:
        array = np.asarray(value)
    except Exception as error:  # a value's own conversion may raise anything
        raise InputError(f"input {shown(name)} cannot be made an array: {one_line(error, _WORDS)}") from error
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise InputError(f"input {shown(name)} has masked entries, which a model cannot see; fill them, as by filled()")
    if array.dtype.kind in _TEXT_KINDS:
        if expected not in (None, "string"):
            raise InputError(
                f"input {shown(name)} is {_kind(value)} of {str(array.dtype)[:_WORDS]}, expected {expected}"
            )
        return _strings(name, array)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _strings(name: str, array: Array) -> Array:
    """The same strings as ``str``, in an array of the pipeline's own."""
    found = np.empty(array.size, object)
    for position, text in enumerate(array.ravel().tolist()):
        if not isinstance(text, str | bytes):
            raise InputError(
                f"element {position} of input {shown(name)} is {_kind(text)}; allowed: str, or bytes that are UTF-8"
            )
        try:
            found[position] = text.decode() if isinstance(text, bytes) else str(text)
            found[position].encode()
        except UnicodeError as error:
            raise InputError(f"element {position} of input {shown(name)} is not UTF-8: {error.reason}") from error  # type: ignore[attr-defined]
    return found.reshape(array.shape)


def _kind(value: Any) -> str:
    name = type(value).__name__[:_WORDS] or "nameless object"
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"
