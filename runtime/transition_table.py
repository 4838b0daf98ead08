"""State machines as tables: what may happen in each state, and which state follows. Pure.

docs/states.md is drawn from the tables. A change that a table does not list is a bug, or a peer broke the protocol: it
raises an error that lists the changes before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

S = TypeVar("S", bound=Enum)
C = TypeVar("C")

_REMEMBERED = 20  # number of earlier changes in an error message


class IllegalEventError(Exception):
    """A change that is not allowed in the present state. The message lists the changes before it."""


class Machine(Generic[S, C]):
    """An object whose state changes according to a table.

    Args:
        name: the name of the object, for errors.
        table: the next state for each state and change.
        state: the first state.
    """

    __slots__ = ("_history", "_name", "_table", "state")

    def __init__(self, name: str, table: Mapping[tuple[S, C], S], state: S) -> None:
        self.state = state
        self._name = name
        self._table = table
        self._history: deque[tuple[C, S]] = deque(maxlen=_REMEMBERED)

    def go(self, change: C) -> S:
        """Make a change; returns the new state.

        Raises:
            IllegalEventError: the table does not list it.
        """
        target = self._table.get((self.state, change))
        if target is None:
            history = ", ".join(f"{called(change)} in {state.name}" for change, state in self._history)
            raise IllegalEventError(
                f"{self._name}: {called(change)} in state {self.state.name}; before it: {history or 'nothing'}"
            )
        self._history.append((change, self.state))
        self.state = target
        return target


def called(change: object) -> str:
    """The name of a change in drawings and errors."""
    return str(getattr(change, "__name__", None) or getattr(change, "name", change))


def drawing(table: Mapping[tuple[S, C], S], first: S) -> str:
    """A table as a Mermaid state diagram. Changes from one state to the same next state share an arrow."""
    arrows: dict[tuple[S, S], list[str]] = {}
    for (state, change), target in table.items():
        arrows.setdefault((state, target), []).append(called(change))
    lines = [f"    {a.name} --> {b.name}: {', '.join(sorted(names))}" for (a, b), names in arrows.items()]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {first.name}", *lines])
