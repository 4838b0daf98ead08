"""The file that decides what detection cannot: ``--decoder decoder.toml``.

scores = "logits"                        # the output with the scores
tokens = "input_ids"                     # the input with the new tokens
vocabulary = 32000                       # the number of scores
max_length = 4096                        # the most positions of a sequence
end_tokens = [2]                         # the tokens that end a text

[[state]]                                # a state that names or structure leave open, or get wrong
past = "past_key_values.0.key"           # the input
present = "present.0.key"                # the output
kind = "append"                          # in-place, append, recurrent or window
axis = 2                                 # the axis of the positions; not for recurrent
batch_axis = 0                           # the axis of the rows
shape = [1, 8, 0, 64]                    # of one row; 0 along the axis of the positions

[[control]]                              # an input that follows from the rows of a step
input = "use_cache_branch"
role = "fixed"                           # tokens, mask, positions, past-length, total-length, last-index, first-scored
value = 1                                # of a fixed one

Everything may be left out except both ends of a state, and the input and role of a control. What is left out is
detected.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from onnxsplit.errors import InputError, shown
from onnxsplit.files import MOST_TEXT_BYTES, read_regular
from onnxsplit.plan_decoder import MOST_LENGTH, Control, Role, StateKind

_MOST_RANK = 64


@dataclass(frozen=True)
class StateOverride:
    """A state as the user gave it; None is detected. The fields are those of ``StateClaim``."""

    past: str
    present: str
    kind: StateKind | None = None
    axis: int | None = None
    batch_axis: int | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Override:
    """What the user has decided; None and empty are detected. The module's docstring describes each field."""

    scores: str | None = None
    tokens: str | None = None
    vocabulary: int | None = None
    max_length: int | None = None
    end_tokens: tuple[int, ...] | None = None
    states: tuple[StateOverride, ...] = ()
    controls: tuple[Control, ...] = ()


def read_override(path: Path) -> Override:
    """Read a file of decisions.

    Raises:
        InputError: the file cannot be read, is not TOML, or has a wrong entry.
    """
    try:
        text = read_regular(path, most_bytes=MOST_TEXT_BYTES).decode()
        found = tomllib.loads(text)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. Give --decoder auto, off, or a TOML file") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not valid TOML: {reason}. Correct it, or give --decoder auto or off") from error
    return _override(_Table(str(path), found))


def check_names(override: Override, inputs: Collection[str], outputs: Collection[str]) -> None:
    """Refuse names that the model does not have.

    Raises:
        InputError: names the first such entry.
    """
    entries = [("scores", override.scores, outputs, "output"), ("tokens", override.tokens, inputs, "input")]
    for state in override.states:
        entries += [("past", state.past, inputs, "input"), ("present", state.present, outputs, "output")]
    entries += [("input", control.input, inputs, "input") for control in override.controls]
    for key, name, known, what in entries:
        if name is not None and name not in known:
            raise InputError(
                f"--decoder: {key} = {shown(name)} is not an {what} of the model; its {what}s are {_listed(known)}"
            )


def _override(table: _Table) -> Override:
    table.refuse_others({"scores", "tokens", "vocabulary", "max_length", "end_tokens", "state", "control"})
    states = tuple(_state(entry) for entry in table.tables("state"))
    controls = tuple(_control(entry) for entry in table.tables("control"))
    tokens = table.text("tokens")
    _refuse_twice(table.where, "past", (state.past for state in states))
    _refuse_twice(table.where, "present", (state.present for state in states))
    claimed = (*(control.input for control in controls), *(state.past for state in states))
    _refuse_twice(table.where, "input", (*claimed, tokens) if tokens is not None else claimed)
    return Override(
        scores=table.text("scores"),
        tokens=tokens,
        vocabulary=table.number("vocabulary", 1, MOST_LENGTH),
        max_length=table.number("max_length", 1, MOST_LENGTH),
        end_tokens=table.numbers("end_tokens", MOST_LENGTH),
        states=states,
        controls=controls,
    )


def _state(table: _Table) -> StateOverride:
    table.refuse_others({"past", "present", "kind", "axis", "batch_axis", "shape"})
    kind: Any = table.choice("kind", get_args(StateKind))
    axis = table.number("axis", 0, _MOST_RANK - 1)
    if kind == "recurrent" and axis is not None:
        raise InputError(f"{table.where}: a recurrent state has no axis of positions; leave out axis = {axis}")
    return StateOverride(
        past=table.needed("past"),
        present=table.needed("present"),
        kind=kind,
        axis=axis,
        batch_axis=table.number("batch_axis", 0, _MOST_RANK - 1),
        shape=table.numbers("shape", MOST_LENGTH),
    )


def _control(table: _Table) -> Control:
    table.refuse_others({"input", "role", "value"})
    table.needed("role")
    role: Any = table.choice("role", get_args(Role))
    value = table.number("value", -MOST_LENGTH, MOST_LENGTH)
    if (role == "fixed") != (value is not None):
        what = "needs a value, such as value = 1" if role == "fixed" else "takes no value; leave it out"
        raise InputError(f"{table.where}: the role {role!r} {what}")
    return Control(input=table.needed("input"), role=role, value=value)


def _refuse_twice(where: str, key: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"{where}: {shown(name)} is given twice as {key}; give it once")
        seen.add(name)


def _listed(names: Collection[str], most: int = 12) -> str:
    listed = [shown(name, 60) for name in names][:most]
    return ", ".join(listed) + (f" and {len(names) - most} more" if len(names) > most else "")


class _Table:
    """A table of the file, with checks of its entries that say where they are."""

    def __init__(self, where: str, entries: dict[str, Any]) -> None:
        self.where = where
        self._entries = entries

    def refuse_others(self, known: Collection[str]) -> None:
        for key in self._entries:
            if key not in known:
                raise InputError(f"{self.where}: {shown(key)} is unknown; allowed are {', '.join(sorted(known))}")

    def tables(self, key: str) -> list[_Table]:
        found = self._entries.get(key, [])
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise InputError(f"{self.where}: {key} is {shown(found, 40)}; write a table [[{key}]] for each")
        return [_Table(f"{self.where}, [[{key}]] {number}", entry) for number, entry in enumerate(found, 1)]

    def text(self, key: str) -> str | None:
        found = self._entries.get(key)
        if found is not None and (not isinstance(found, str) or not found):
            raise InputError(f"{self.where}: {key} is {shown(found, 40)}; a name in quotes is allowed")
        return found

    def needed(self, key: str) -> str:
        found = self.text(key)
        if found is None:
            raise InputError(f'{self.where}: {key} is missing; add {key} = "NAME"')
        return found

    def choice(self, key: str, allowed: tuple[str, ...]) -> str | None:
        found = self.text(key)
        if found is not None and found not in allowed:
            raise InputError(f"{self.where}: {key} is {shown(found, 40)}; allowed are {', '.join(allowed)}")
        return found

    def number(self, key: str, least: int, most: int) -> int | None:
        found = self._entries.get(key)
        if found is not None and not _is_between(found, least, most):
            raise InputError(f"{self.where}: {key} is {shown(found, 40)}; a number from {least} to {most} is allowed")
        return found

    def numbers(self, key: str, most: int) -> tuple[int, ...] | None:
        found = self._entries.get(key)
        if found is None:
            return None
        if not isinstance(found, list) or not all(_is_between(number, 0, most) for number in found):
            raise InputError(
                f"{self.where}: {key} is {shown(found, 40)}; a list of numbers from 0 to {most} is allowed"
            )
        return tuple(found)


def _is_between(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
