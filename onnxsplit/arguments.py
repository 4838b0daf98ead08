"""Checks of the names of options that callers in Python give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches

from onnxsplit.errors import InputError, shown

_ALIKE = 0.6  # the least similarity, from 0 to 1, of a name that is suggested


def option_names(*kinds: type) -> list[str]:
    """The names of the options that some dataclasses have."""
    return [field.name for kind in kinds for field in fields(kind)]


def check_names(given: Iterable[str], known: Sequence[str]) -> None:
    """Refuse options that there are not.

    Raises:
        InputError: names the option, the one that is most like it, and all that there are.
    """
    for name in given:
        if name not in known:
            alike = get_close_matches(str(name), known, 1, _ALIKE)
            meant = f" Did you mean {alike[0]!r}?" if alike else ""
            raise InputError(f"there is no option {shown(name)}.{meant} There are {', '.join(known)}")
