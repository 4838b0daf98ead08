"""What crosses on data links: fragments of requests, and what nodes say of them."""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated

import msgspec

from runtime.wire.messages.base import Amount, Bytes, Cost, Index, Message, Nanoseconds, NodeNumber


class Step(IntEnum):
    """How far a process is with an attempt, as its ledger says. ``UNKNOWN``: it has not begun, or it is long ago."""

    UNKNOWN = 0
    RUNNING = 1
    DONE = 2


AttemptKey = tuple[int, int]
"""A request and its attempt, both counted from 1."""


NOT_NEEDED = -1
"""In a route: this stage does not run for the request."""


ANY = 0
"""In a route: who sends there chooses the replica. (0 is the coordinator's own number, which executes nothing.)"""


SLOTS = 1024
"""Slots of a process's shared memory."""


class TensorPlace(Message, frozen=True):
    """Where a tensor is in the sender's memory: a use of a slot, and the offset of the tensor in the whole memory."""

    slot: Annotated[int, msgspec.Meta(ge=0, lt=SLOTS)]
    generation: Nanoseconds
    offset: Bytes


class TensorHead(Message, frozen=True):
    """A tensor, and where its bytes are: here, in the sender's memory, or (None) in a frame of its own."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    payload: bytes | TensorPlace | None


class Visit(Message, frozen=True):
    """A request at a stage. Times are the host's monotonic clock in nanoseconds.

    Attributes:
        stage: the stage.
        replica: which node of it.
        arrived_ns: its last fragment was there.
        started_ns: the session began.
        ended_ns: the session ended.
        sent_ns: its outputs were ready to go.
        output_bytes: of all its outputs.
        shared_bytes: of those that lie in shared memory.
    """

    stage: Index
    replica: Index
    arrived_ns: Nanoseconds
    started_ns: Nanoseconds
    ended_ns: Nanoseconds
    sent_ns: Nanoseconds
    output_bytes: Bytes
    shared_bytes: Bytes


class Fragment(Message, tag="fragment", frozen=True):
    """Tensors of one request from one source for one stage, or for the caller.

    Attributes:
        request: number of the request.
        attempt: number of the try at it, from 1; fragments of different attempts never meet.
        view: who does not know of this many changes in the pipeline yet must not pass the attempt on.
        cost: of the request, in thousandths of an ordinary one.
        budget_ns: time it has left; 0 for no limit.
        sender: number of the process that sends.
        source: the stage that sends, or :data:`CALLER`.
        route: of each stage the number of the node that executes it, :data:`ANY`, or :data:`NOT_NEEDED`.
        wanted: tensors the caller asked for.
        tensors: what is sent.
        history: the stages the request has passed on the way here.
    """

    request: Amount
    attempt: Amount
    view: Amount
    cost: Cost
    budget_ns: Nanoseconds
    sender: NodeNumber
    source: Index
    route: tuple[Index, ...]
    wanted: tuple[str, ...]
    tensors: tuple[TensorHead, ...]
    history: tuple[Visit, ...]


class Started(Message, tag="started", frozen=True):
    """A node begins to execute an attempt; said where the coordinator cannot read it in the node's memory."""

    request: Amount
    attempt: Amount
    sender: NodeNumber


class Receipt(Message, tag="receipt", frozen=True):
    """What a peer on another host would read from the sender's board.

    Attributes:
        sender: number of the process that sends.
        done: cost of all work from the reader that it is done with, ever.
        arrived: cost of all work from the reader that has arrived there, ever; what it is done with is part of it.
        others: cost of the work from all others that is there now.
        service_ns: time of an ordinary request there.
        peak_ns: the same, the slowest of late.
    """

    sender: NodeNumber
    done: Amount
    arrived: Amount
    others: Amount
    service_ns: Nanoseconds
    peak_ns: Nanoseconds


class Failed(Message, tag="failed", frozen=True):
    """A stage could not execute an attempt; another would fare no better."""

    request: Amount
    attempt: Amount
    stage: Index
    replica: Index
    reason: str


Data = Fragment | Receipt | Started | Failed
