"""State machines as tables: what may happen in each state, and where it leads. Pure; docs/states.md is drawn from them.

Anything a table does not list is a bug, or a peer that broke the protocol: an error that tells what led there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

S = TypeVar("S", bound=Enum)
C = TypeVar("C")

_TOLD = 20  # changes that a story goes back


class IllegalEventError(Exception):
    """A change that has no place in the present state; tells the ones before it."""


class Machine(Generic[S, C]):
    """One thing that goes through the states of a table.

    Args:
        name: of the thing, for its story.
        table: (state, change) -> the next state.
        state: the first one.
    """

    __slots__ = ("_name", "_story", "_table", "state")

    def __init__(self, name: str, table: Mapping[tuple[S, C], S], state: S) -> None:
        self.state = state
        self._name = name
        self._table = table
        self._story: deque[tuple[C, S]] = deque(maxlen=_TOLD)

    def go(self, change: C) -> S:
        """Make a change; returns the new state.

        Raises:
            IllegalEventError: the table does not list it.
        """
        target = self._table.get((self.state, change))
        if target is None:
            story = ", ".join(f"{called(change)} in {state.name}" for change, state in self._story)
            raise IllegalEventError(
                f"{self._name}: {called(change)} in state {self.state.name}; before it: {story or 'nothing'}"
            )
        self._story.append((change, self.state))
        self.state = target
        return target


def called(change: object) -> str:
    """A change's name in drawings and stories."""
    return str(getattr(change, "__name__", None) or getattr(change, "name", change))


def drawing(table: Mapping[tuple[S, C], S], first: S) -> str:
    """A table as a Mermaid state diagram; changes that lead the same way share an arrow."""
    arrows: dict[tuple[S, S], list[str]] = {}
    for (state, change), target in table.items():
        arrows.setdefault((state, target), []).append(called(change))
    lines = [f"    {a.name} --> {b.name}: {', '.join(sorted(names))}" for (a, b), names in arrows.items()]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {first.name}", *lines])
