"""A request of a chaos run: its arguments and its permitted outcomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.faults.odd.nets import Net
from onnxsplit.errors import InputError, OnnxsplitError

ROWS = 64
"""Of the largest batches."""


Errors = tuple[type[BaseException], ...]


Source = np.random.Generator


@dataclass(frozen=True)
class Ask:
    """A request and its permitted outcomes.

    Attributes:
        kind: its name in ``KINDS``.
        inputs: argument of ``submit``, as are ``outputs``, ``timeout`` and ``block``.
        want: the right answer, or None if every answer is wrong.
        may: errors that are permitted instead of an answer.
        cancel: when it is cancelled: ``at once``, ``in a moment`` or ``after the answer``.
        change: whether other values are written into the inputs as soon as ``submit`` has returned.
        kill: whether a node of the first stage is killed first, so that the request waits for another.
        then: the action of a callback of the future: ``raise``, ``exit``, ``submit`` or ``submit without waiting``.
    """

    kind: str
    inputs: Any
    want: dict[str, Any] | None
    outputs: Any = None
    timeout: Any = None
    block: bool = True
    may: Errors = ()
    cancel: str = ""
    change: bool = False
    kill: bool = False
    then: str = ""


Kind = Callable[[Net, Source], "Ask | None"]


def ordinary(net: Net, source: Source, rows: int | None = None) -> Ask:
    """Make an ordinary request of a few rows."""
    inputs = net.make(source, int(source.integers(1, 4)) if rows is None else rows)
    return Ask("ordinary", inputs, net.answer(inputs, net.plan.outputs), may=unjoinable(net, rows or 3))


def unjoinable(net: Net, rows: int) -> Errors:
    """Return the errors that are permitted because parts of ``longest`` may have lengths that cannot be joined."""
    return (OnnxsplitError,) if net.name == "longest" and rows > net.micro_batch else ()


def refused(net: Net, source: Source, **changes: Any) -> Ask:
    """Make a request that must be refused because of its arguments."""
    return replace(ordinary(net, source), want=None, may=(InputError,), **changes)
