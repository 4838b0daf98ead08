"""Reads one JSON value character by character, and says at once when it is none. Pure."""

from __future__ import annotations

import json
from enum import Enum

_MOST_NESTED = 200
_SPACE = " \t\r\n"
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
_NUMBERS = {  # what may follow in a number: the part that was read last, and the kind of the next character
    "sign": {"0": "zero", "1": "whole"},
    "zero": {".": "point", "e": "exponent"},
    "whole": {"0": "whole", "1": "whole", ".": "point", "e": "exponent"},
    "point": {"0": "fraction", "1": "fraction"},
    "fraction": {"0": "fraction", "1": "fraction", "e": "exponent"},
    "exponent": {"0": "power", "1": "power", "-": "power sign", "+": "power sign"},
    "power sign": {"0": "power", "1": "power"},
    "power": {"0": "power", "1": "power"},
}
_WHOLE_NUMBERS = ("zero", "whole", "fraction", "power")


class Place(Enum):
    """What may come next outside of strings, numbers and literals."""

    VALUE = "a value"
    FIRST_ITEM = "a value or the end of the list"
    FIRST_KEY = "a key or the end of the object"
    KEY = "a key"
    COLON = "a colon"
    NEXT = "a comma or the end"
    DONE = "nothing"


class JsonScanner:
    """Reads one JSON value.

    Attributes:
        place: what may come next.
        key: the key of the outermost object whose value is read; None where none is.
        opening: the last character, if a value of the outermost object begins with it; empty otherwise.
        string: the string that ended with the last character, if it is such a value; None otherwise.
    """

    def __init__(self) -> None:
        self.place = Place.VALUE
        self.key: str | None = None
        self.opening = ""
        self.string: str | None = None
        self._open: list[str] = []
        self._text: list[str] | None = None  # the characters of the string that is being read
        self._escape = 0  # the number of characters of an escape that are missing
        self._number = ""  # the part of a number that was read last
        self._literal = ""  # what is missing of a literal

    @property
    def depth(self) -> int:
        """The number of objects and lists that are open."""
        return len(self._open)

    def add(self, character: str) -> bool:
        """Read the next character; returns whether the text can still become JSON."""
        self.string, self.opening = None, ""
        if self._text is not None:
            return self._in_string(character, self._text)
        if self._literal:
            fits, self._literal = self._literal[0] == character, self._literal[1:]
            if fits and not self._literal:
                self._end_value()
            return fits
        if self._number:
            following = _NUMBERS[self._number].get(_kind(character))
            if following is not None:
                self._number = following
                return True
            if self._number not in _WHOLE_NUMBERS:
                return False
            self._number = ""
            self._end_value()
        return character in _SPACE or self._between(character)

    def _between(self, character: str) -> bool:
        """Read a character outside of strings, numbers and literals."""
        match self.place, character:
            case (Place.VALUE | Place.FIRST_ITEM, _) if self._begins_value(character):
                return True
            case (Place.FIRST_ITEM, "]") | (Place.FIRST_KEY, "}"):
                self._close()
            case Place.FIRST_KEY | Place.KEY, '"':
                self._text = []
                self.place = Place.KEY
            case Place.COLON, ":":
                self.place = Place.VALUE
            case Place.NEXT, ",":
                self.place = Place.KEY if self._open[-1] == "{" else Place.VALUE
                if self.depth == 1:
                    self.key = None
            case (Place.NEXT, "}") if self._open[-1] == "{":
                self._close()
            case (Place.NEXT, "]") if self._open[-1] == "[":
                self._close()
            case _:
                return False
        return True

    def _begins_value(self, character: str) -> bool:
        if self._open == ["{"]:
            self.opening = character
        if character in "{[":
            self._open.append(character)
            self.place = Place.FIRST_KEY if character == "{" else Place.FIRST_ITEM
            return self.depth <= _MOST_NESTED
        if character == '"':
            self._text = []
            self.place = Place.VALUE
        elif character in _LITERALS:
            self._literal = _LITERALS[character]
        elif (kind := _kind(character)) in ("0", "1", "-"):
            self._number = {"0": "zero", "1": "whole", "-": "sign"}[kind]
        else:
            return False
        return True

    def _close(self) -> None:
        self._open.pop()
        self._end_value()

    def _end_value(self) -> None:
        self.place = Place.NEXT if self._open else Place.DONE

    def _in_string(self, character: str, text: list[str]) -> bool:
        if self._escape:
            if self._escape == 5:
                if character not in '"\\/bfnrtu':
                    return False
                self._escape = 4 if character == "u" else 0
            elif character in "0123456789abcdefABCDEF":
                self._escape -= 1
            else:
                return False
        elif character == '"':
            self._end_string("".join(text))
            return True
        elif character == "\\":
            self._escape = 5
        elif character < " ":
            return False
        if self.depth == 1:
            text.append(character)
        return True

    def _end_string(self, text: str) -> None:
        self._text = None
        outer = self._open == ["{"]
        decoded = json.loads(f'"{text}"') if outer else None
        if self.place is Place.KEY:
            self.place = Place.COLON
            if outer:
                self.key = decoded
        else:
            self.string = decoded
            self._end_value()


def _kind(character: str) -> str:
    """The kind of a character of a number: 1 stands for 1 to 9, e for E."""
    if character in "123456789":
        return "1"
    return "e" if character == "E" else character
