"""The options of a text, in addition to those of its tokens. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from onnxsplit.errors import InputError, shown

MOST_STOPS = 16
"""The largest number of stop strings."""

_MOST_CHARACTERS = 1024  # of a stop string


class TextArguments(TypedDict, total=False):
    """The attributes of :class:`TextOptions`, for editors and type checkers."""

    stop: str | Sequence[str]
    include_stop: bool
    skip_special: bool


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How the text of a sequence is to be given out.

    Attributes:
        stop: strings that end the text.
        include_stop: whether the text contains the one that ended it.
        skip_special: whether the text leaves special tokens out.
    """

    stop: str | Sequence[str] = ()
    include_stop: bool = False
    skip_special: bool = True

    def stops(self) -> tuple[str, ...]:
        """The stop strings.

        Raises:
            InputError: one is empty or too long, or there are too many.
        """
        if not isinstance(self.stop, str | list | tuple):
            raise InputError(f"stop must be a string or a list of strings, not {shown(self.stop)}", option="stop")
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stops) > MOST_STOPS:
            raise InputError(f"stop has {len(stops)} strings; at most {MOST_STOPS} are allowed", option="stop")
        for stop in stops:
            if not isinstance(stop, str) or not 1 <= len(stop) <= _MOST_CHARACTERS:
                raise InputError(
                    f"stop holds {shown(stop)}; allowed are strings of 1 to {_MOST_CHARACTERS} characters",
                    option="stop",
                )
        return stops
