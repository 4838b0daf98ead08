"""What a request of a chaos run is: what is asked, and what may become of it."""

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
    """A request, and what may become of it.

    Attributes:
        kind: its name in ``KINDS``.
        inputs: as handed to ``submit``; so are ``outputs``, ``timeout`` and ``block``.
        want: the right answer; None when no answer is right.
        may: the errors that it may fail with instead.
        cancel: ``at once``, ``in a moment`` or ``after the answer``.
        change: write other values into the inputs as soon as ``submit`` has returned.
        kill: kill the node of the first stage before, so that the request waits for another.
        then: what a callback of the future does: ``raise``, ``exit``, ``submit`` or ``submit without waiting``.
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
    """A request as it should be, of a few rows."""
    inputs = net.make(source, int(source.integers(1, 4)) if rows is None else rows)
    return Ask("ordinary", inputs, net.answer(inputs, net.plan.outputs), may=unjoinable(net, rows or 3))


def unjoinable(net: Net, rows: int) -> Errors:
    """Parts of the longest row may have lengths that cannot be joined, which is an error of its plan."""
    return (OnnxsplitError,) if net.name == "longest" and rows > net.micro_batch else ()


def refused(net: Net, source: Source, **changes: Any) -> Ask:
    """A request that must be refused for what it says."""
    return replace(ordinary(net, source), want=None, may=(InputError,), **changes)
