"""A request that is not answered yet, as the thread of its caller and the thread of results know it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from onnxsplit.errors import one_line
from onnxsplit.tensors import Array
from runtime.coordinator.answers import Answer, Done
from runtime.coordinator.events import Enter
from runtime.coordinator.request_record import OpenRequest
from runtime.errors import PipelineError
from runtime.memory.outgoing import Attempt, Outgoing

_WORDS = 500


@dataclass(slots=True)
class Pending:
    """A request that is not answered.

    Attributes:
        done: called with the answer.
        entered_ns: when it was submitted.
        outgoing: its inputs, held until it is answered so that they can be sent again.
        placed: whether the inputs were copied to the memory that nodes read.
        enter: the attempt under way, or the one to begin as soon as the inputs are placed.
        outputs: the outputs received for the attempt.
    """

    done: Done
    entered_ns: int
    outgoing: Outgoing = field(default_factory=Outgoing)
    placed: bool = False
    enter: Enter | None = None
    outputs: dict[str, Array] = field(default_factory=dict)


class Moved(NamedTuple):
    """A request that another plan is to answer: its inputs, what it asks for, its cost, deadline and callback."""

    inputs: dict[str, Array]
    wanted: tuple[str, ...]
    cost: int
    deadline_ns: int | None
    done: Done


def moved_request(pending: Pending, asked: OpenRequest | None, outputs: Collection[str]) -> Moved | None:
    """A request with copies of its inputs; None if they are not placed, or if it asks for more than these outputs."""
    if asked is None or not pending.placed or not set(outputs).issuperset(asked.wanted):
        return None
    inputs = {name: np.array(array) for name, array in pending.outgoing.arrays.items()}
    return Moved(inputs, asked.wanted, asked.cost, asked.deadline_ns, pending.done)


def attempt_of(enter: Enter, now_ns: int) -> Attempt:
    """What the fragments of an attempt that begins now have in common."""
    return Attempt(
        request=enter.request,
        attempt=enter.attempt,
        view=enter.view,
        cost=enter.cost,
        budget_ns=0 if enter.deadline_ns is None else max(1, enter.deadline_ns - now_ns),
        route=enter.route,
        wanted=enter.wanted,
    )


def ignore(_: Answer) -> None:
    """Ignore the answer to a request whose caller already has an error."""


def unsendable(error: BaseException) -> PipelineError:
    """The error for a request or a step that could not be sent."""
    if isinstance(error, PipelineError):
        return error
    told = PipelineError(f"the request could not be sent: {type(error).__name__}: {one_line(error, _WORDS)}")
    told.__cause__ = error
    return told
