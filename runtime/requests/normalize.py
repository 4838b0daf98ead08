"""Normalises the arguments of a request, once, so that no later code has to check them again. Pure.

    inputs    arrays in the host's byte order, by name; strings are ``str`` that UTF-8 can encode
    outputs   a tuple of names without duplicates
    timeout   nanoseconds, positive and bounded

Arguments that cannot be normalised raise :class:`~onnxsplit.errors.InputError` before the request is admitted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from onnxsplit.errors import InputError, shown
from onnxsplit.tensors import Array
from runtime.requests.arrays import Specs, by_name, kind_of, to_array

MOST_TIMEOUT_S = 365 * 24 * 3600
"""The longest timeout, a year. Deadlines in nanoseconds then stay far below 64 bits."""

_TEXT_KINDS = "OUST"  # objects, fixed-width unicode and bytes, and NumPy's own strings


def normal_inputs(inputs: object, specs: Specs, required: Sequence[str]) -> dict[str, Array]:
    """The inputs of a request as arrays. A numeric array is copied only if its byte order is not the host's.

    Args:
        inputs: by name, anything that :mod:`runtime.requests.arrays` converts to an array; a model of one input also
            takes that without a name.
        specs: by name, the ONNX type and the shape of the model's inputs.
        required: the inputs without a default.

    Raises:
        InputError: names are missing, or a value is not an array of numbers or strings.
    """
    arrays = {}
    for name, value in by_name(inputs, specs, required).items():
        if not isinstance(name, str):
            raise InputError(f"the name of an input must be text, not {shown(name)}")
        expected, shape = specs.get(name, (None, None))
        array = to_array(name, value, expected, None if shape is None else len(shape))
        if array.dtype.kind in _TEXT_KINDS:
            arrays[name] = _strings(name, array)
        else:
            arrays[name] = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    return arrays


def normal_names(outputs: object) -> tuple[str, ...] | None:
    """The names of the wanted outputs without duplicates; None stands for all outputs.

    Raises:
        InputError: ``outputs`` is not a list of names.
    """
    if outputs is None:
        return None
    if isinstance(outputs, str | bytes | Mapping) or not isinstance(outputs, Collection):
        raise InputError(f"outputs must be a list of names, as in ['y'], but it is {shown(outputs)}")
    for name in outputs:
        if not isinstance(name, str):
            raise InputError(f"outputs must be a list of names, but it holds {shown(name)}")
    return tuple(dict.fromkeys(outputs))


def normal_timeout_ns(timeout: object) -> int | None:
    """A timeout, given in seconds, in nanoseconds; None stands for no timeout.

    Raises:
        InputError: it is not a finite number above 0, or longer than :data:`MOST_TIMEOUT_S`.
    """
    if timeout is None:
        return None
    kinds = int | float | np.integer | np.floating
    is_number = isinstance(timeout, kinds) and not isinstance(timeout, bool | np.timedelta64)
    if is_number and 0 < timeout <= MOST_TIMEOUT_S:  # type: ignore[operator]
        return max(1, int(float(timeout) * 1e9))  # type: ignore[arg-type]
    raise InputError(
        f"timeout is {shown(timeout)}; allowed: a number of seconds above 0 and up to {MOST_TIMEOUT_S} (a year), "
        "or None for no limit",
        option="timeout",
    )


def _strings(name: str, array: Array) -> Array:
    """The same strings as ``str``, in a new array."""
    texts = np.empty(array.size, object)
    for position, text in enumerate(array.ravel().tolist()):
        if not isinstance(text, str | bytes):
            raise InputError(
                f"element {position} of input {shown(name)} is {kind_of(text)}; allowed: str, or bytes in UTF-8"
            )
        try:
            texts[position] = text.decode() if isinstance(text, bytes) else str(text)
            texts[position].encode()
        except UnicodeError as error:
            raise InputError(f"element {position} of input {shown(name)} is not UTF-8: {error.reason}") from error  # type: ignore[attr-defined]
    return texts.reshape(array.shape)
