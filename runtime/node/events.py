"""The events and the effects of the node's state machine, :mod:`runtime.node.state`. Events come first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from onnxsplit.plan import Plan
from runtime.node.slots import Placed
from runtime.wire.messages.control import Assign, Peer, Wire
from runtime.wire.messages.data import AttemptKey, Failed, Fragment, Visit
from runtime.wire.messages.sequences import Drawn

Tensors = Mapping[str, Any]
"""Tensors by name. The state machine does not look at them, so their type is left open."""

OutputsByTarget = tuple[tuple[int, tuple[str, ...]], ...]
"""Pairs of a target, a stage or :data:`~onnxsplit.plan.CALLER`, and the names of the outputs that it gets."""


class Assigned(Struct, frozen=True):
    """The coordinator has assigned a stage to the node."""

    assign: Assign


class Loaded(Struct, frozen=True):
    """The stage was loaded; the plan says which stages read its outputs."""

    plan: Plan


class LoadFailed(Struct, frozen=True):
    """The stage could not be loaded."""

    reason: str


class Wired(Struct, frozen=True):
    """The coordinator has sent all processes of the pipeline, as of now."""

    wire: Wire


class Shared(Struct, frozen=True):
    """These peers have mapped this node's memory."""

    readers: tuple[int, ...]


class Arrived(Struct, frozen=True):
    """A fragment has arrived."""

    fragment: Fragment
    tensors: Tensors
    now_ns: int


class Turn(Struct, frozen=True):
    """The main loop has time for a request."""

    now_ns: int


class Executed(Struct, frozen=True):
    """The session has executed the running request, and its outputs are ready to be sent.

    The fields are those of :class:`~runtime.wire.messages.data.Visit`; times are the host's monotonic clock. ``drawn``
    holds the tokens that the last stage has chosen for the rows of a step.
    """

    started_ns: int
    ended_ns: int
    ready_ns: int
    output_bytes: int
    shared_bytes: int
    drawn: tuple[Drawn, ...] = ()


class ExecutionFailed(Struct, frozen=True):
    """The session could not execute the running request."""

    reason: str


class AttemptCancelled(Struct, frozen=True):
    """This attempt at a request, and all before it, were given up."""

    request: int
    attempt: int


class Passed(Struct, frozen=True):
    """All requests with a smaller number have ended; the states of some sequences among them are kept."""

    oldest: int
    kept: frozenset[int] = frozenset()


class LeaveAsked(Struct, frozen=True):
    """A signal asks the node to end when its work is finished."""

    reason: str


class StopAsked(Struct, frozen=True):
    """The node is to end now: the coordinator or a signal asks for it, or the coordinator has fallen silent."""

    reason: str


NodeEvent = (
    Assigned
    | Loaded
    | LoadFailed
    | Wired
    | Shared
    | Arrived
    | Turn
    | Executed
    | ExecutionFailed
    | AttemptCancelled
    | Passed
    | LeaveAsked
    | StopAsked
)


class Load(Struct, frozen=True):
    """Load the stage; answered by :class:`Loaded` or :class:`LoadFailed`."""

    assign: Assign


class Connect(Struct, frozen=True):
    """Map the memory of neighbours, and open links to targets.

    Attributes:
        me: the node's own number.
        peers: all processes of the pipeline.
        neighbours: the numbers of those that send to this node, that it sends to, or that send to the same stages.
        targets: the numbers of those that it sends to.
    """

    me: int
    peers: tuple[Peer, ...]
    neighbours: frozenset[int]
    targets: frozenset[int]


class SayReady(Struct, frozen=True):
    """Tell the coordinator that the links of the last :class:`Wired` are open."""


class SayLeaving(Struct, frozen=True):
    """Tell the coordinator that the node is leaving and takes no further requests."""


class SayRefused(Struct, frozen=True):
    """Tell the coordinator why the stage cannot be loaded."""

    reason: str


class LendMemory(Struct, frozen=True):
    """Lend memory to these peers from now on."""

    readers: tuple[int, ...]


class Run(Struct, frozen=True):
    """Execute the stage once; answered by :class:`Executed` or :class:`ExecutionFailed`.

    Attributes:
        key: the attempt.
        cost: cost of the request.
        inputs: the stage's inputs.
        fragments: the fragments in which they lie.
        leaving: the outputs that each target gets.
        placed: for a step, what to move and to clear before, and which of its rows are live; None for a request.
    """

    key: AttemptKey
    cost: int
    inputs: Tensors
    fragments: tuple[Fragment, ...]
    leaving: OutputsByTarget
    placed: Placed | None = None


class GiveBack(Struct, frozen=True):
    """Return the memory of these fragments to their senders."""

    fragments: tuple[Fragment, ...]


class Forward(Struct, frozen=True):
    """Send the outputs of the request that ran last.

    Attributes:
        fragment: one of the request's fragments, with its attempt, its route and the wanted outputs.
        budget_ns: time left until the request's deadline; 0 for no deadline.
        leaving: the outputs that each target gets.
        history: the stages that the request has passed, this one last.
        drawn: the tokens that were chosen for the rows of a step.
    """

    fragment: Fragment
    budget_ns: int
    leaving: OutputsByTarget
    history: tuple[Visit, ...]
    drawn: tuple[Drawn, ...] = ()


class Discard(Struct, frozen=True):
    """Drop the outputs of the request that ran last, because it was cancelled."""


class ClearSlots(Struct, frozen=True):
    """Forget the sequences in some slots, and give their memory back to the system."""

    slots: tuple[int, ...]


class ReportFailure(Struct, frozen=True):
    """Tell the coordinator that this stage could not execute a request."""

    message: Failed


class Exit(Struct, frozen=True):
    """End the node."""

    reason: str


NodeEffect = (
    Load
    | Connect
    | SayReady
    | SayLeaving
    | SayRefused
    | LendMemory
    | Run
    | GiveBack
    | Forward
    | Discard
    | ClearSlots
    | ReportFailure
    | Exit
)
