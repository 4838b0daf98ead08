"""A request that is not answered yet, as the thread of its caller and the thread of results know it."""

from __future__ import annotations

from dataclasses import dataclass, field

from onnxsplit.errors import one_line
from onnxsplit.tensors import Array
from runtime.coordinator.answers import Answer, Done
from runtime.coordinator.events import Enter
from runtime.errors import PipelineError
from runtime.memory.outgoing import Outgoing

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


def ignore(_: Answer) -> None:
    """Ignore the answer to a request whose caller already has an error."""


def unsendable(error: BaseException) -> PipelineError:
    """The error for a request or a step that could not be sent."""
    if isinstance(error, PipelineError):
        return error
    told = PipelineError(f"the request could not be sent: {type(error).__name__}: {one_line(error, _WORDS)}")
    told.__cause__ = error
    return told
