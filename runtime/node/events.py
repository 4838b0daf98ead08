"""What can happen to a node, and what it can decide: the words of :mod:`runtime.node.state`.

Events first, then effects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from onnxsplit.plan import Plan
from runtime.wire.messages.control import Assign, Peer, Wire
from runtime.wire.messages.data import AttemptKey, Failed, Fragment, Visit

Tensors = Mapping[str, Any]
"""Tensors by name; what they are is the loop's business."""

OutputsByTarget = tuple[tuple[int, tuple[str, ...]], ...]
"""Stages, or the caller, and the outputs that they get."""


class Assigned(Struct, frozen=True):
    """The coordinator gave the node its stage."""

    assign: Assign


class Loaded(Struct, frozen=True):
    """The session is open; the plan says where outputs go."""

    plan: Plan


class LoadFailed(Struct, frozen=True):
    """The stage could not be loaded."""

    reason: str


class Wired(Struct, frozen=True):
    """All processes of the pipeline are known, as of now."""

    wire: Wire


class Shared(Struct, frozen=True):
    """These peers read this node's memory."""

    readers: tuple[int, ...]


class Arrived(Struct, frozen=True):
    """A fragment came in."""

    fragment: Fragment
    tensors: Tensors
    now_ns: int


class Turn(Struct, frozen=True):
    """The loop has time for a request."""

    now_ns: int


class Executed(Struct, frozen=True):
    """The session ran the request it was given, and its outputs are ready to go."""

    started_ns: int
    ended_ns: int
    ready_ns: int
    output_bytes: int
    shared_bytes: int


class ExecutionFailed(Struct, frozen=True):
    """The session could not run the request it was given."""

    reason: str


class AttemptCancelled(Struct, frozen=True):
    """Nobody waits for this attempt at a request, and those before it, any more."""

    request: int
    attempt: int


class Passed(Struct, frozen=True):
    """Nobody waits for requests before this one any more."""

    oldest: int


class LeaveAsked(Struct, frozen=True):
    """Somebody asks the node to end when its work is done."""

    reason: str


class StopAsked(Struct, frozen=True):
    """The coordinator, a signal, or the coordinator's death asks the node to end."""

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
    """Open the session."""

    assign: Assign


class Connect(Struct, frozen=True):
    """Learn the own number and all processes; map the memory of neighbours, and open links to those it sends to."""

    me: int
    peers: tuple[Peer, ...]
    neighbours: frozenset[int]
    targets: frozenset[int]


class SayReady(Struct, frozen=True):
    """Tell the coordinator that links are as it told."""


class SayLeaving(Struct, frozen=True):
    """Ask the coordinator to be relieved of work."""


class SayRefused(Struct, frozen=True):
    """Tell the coordinator why not."""

    reason: str


class LendMemory(Struct, frozen=True):
    """Lend memory to these peers from now on."""

    readers: tuple[int, ...]


class Run(Struct, frozen=True):
    """Execute the session; answer with :class:`Executed` or :class:`ExecutionFailed`.

    The inputs lie in ``fragments``; ``leaving`` are the outputs that each stage, or the caller, gets.
    """

    key: AttemptKey
    cost: int
    inputs: Tensors
    fragments: tuple[Fragment, ...]
    leaving: OutputsByTarget


class GiveBack(Struct, frozen=True):
    """The tensors of these fragments are read no more."""

    fragments: tuple[Fragment, ...]


class Forward(Struct, frozen=True):
    """Send the outputs of the request that ran last.

    Attributes:
        fragment: one that it came with: whose attempt, route and wish it is.
        budget_ns: time it has left; 0 for no limit.
        leaving: what each stage on the route, or the caller, gets.
        history: the stages it has passed, this one the last.
    """

    fragment: Fragment
    budget_ns: int
    leaving: OutputsByTarget
    history: tuple[Visit, ...]


class Discard(Struct, frozen=True):
    """Nobody wants the outputs of the request that ran last."""


class ReportFailure(Struct, frozen=True):
    """Tell the coordinator that a request failed here."""

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
    | ReportFailure
    | Exit
)
