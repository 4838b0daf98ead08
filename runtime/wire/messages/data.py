"""Messages of data links: fragments of requests, and what became of them."""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated

import msgspec

from runtime.wire.messages.base import Amount, Bytes, Cost, Index, Message, Nanoseconds, NodeNumber
from runtime.wire.messages.sequences import DrawnTokens, Rows

AttemptKey = tuple[int, int]
"""The number of a request and of an attempt at it, both counted from 1."""

NOT_NEEDED = -1
"""In a route: this stage does not run for the request."""

ANY = 0
"""In a route: the sender chooses the replica. (0 is the coordinator's number, which executes no stage.)"""

SLOTS = 1024
"""Number of slots in the shared memory of a process."""


class Step(IntEnum):
    """A process's progress with an attempt, as recorded in its ledger in shared memory.

    ``UNKNOWN``: it has not begun, or the ledger has been overwritten since.
    """

    UNKNOWN = 0
    RUNNING = 1
    DONE = 2


class TensorPlace(Message, frozen=True):
    """Where a tensor lies in the sender's shared memory.

    Attributes:
        slot: the slot.
        generation: which use of the slot.
        offset: of the tensor's first byte, from the start of the whole memory.
    """

    slot: Annotated[int, msgspec.Meta(ge=0, lt=SLOTS)]
    generation: Nanoseconds
    offset: Bytes


class TensorHead(Message, frozen=True):
    """Description of one tensor.

    Attributes:
        name: the tensor's name in the model.
        dtype: ONNX's name of its type.
        shape: its sizes.
        payload: its bytes, or where they lie in the sender's shared memory; None when they are in a frame of their own.
        zstd: whether that frame is compressed (:mod:`runtime.wire.compression`); only for ``int8``. The type and the
            shape tell how many bytes it must yield.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    payload: bytes | TensorPlace | None
    zstd: bool = False


class Visit(Message, frozen=True):
    """One stage that a request has passed. Times are the host's monotonic clock in nanoseconds.

    Attributes:
        stage: the stage.
        replica: the replica that executed it.
        arrived_ns: when its last fragment had arrived.
        started_ns: when the session began.
        ended_ns: when the session ended.
        sent_ns: when its outputs were ready to be sent.
        output_bytes: size of all its outputs.
        shared_bytes: size of those outputs that lie in shared memory.
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
    """Tensors of one attempt at a request, from one source for one stage or for the caller.

    Attributes:
        request: number of the request.
        attempt: number of the attempt, from 1; fragments of different attempts are never joined.
        view: the :class:`~runtime.wire.messages.control.Wire` that the receiver must have taken in before it handles
            the fragment.
        cost: cost of the request, in thousandths of the request that the plan was made for.
        budget_ns: time left until the request's deadline; 0 for no deadline.
        sender: number of the sending process.
        source: the sending stage, or :data:`~onnxsplit.plan.CALLER`.
        route: for each stage the number of the node that executes it, :data:`ANY`, or :data:`NOT_NEEDED`.
        wanted: the outputs that the caller asked for.
        tensors: the tensors sent.
        history: the stages that the request has passed on its way here.
        rows: the sequences of a step. A fragment with rows holds no states and no controls; the receiver has or makes
            those. Empty for an ordinary request.
        drawn: the tokens that the last stage has chosen for the rows; for the coordinator only.
        signature: the number under which later entries of the sender's lane refer to what they share with this
            fragment (:mod:`runtime.memory.lane`); 0 for none.
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
    rows: Rows = ()
    drawn: DrawnTokens = ()
    signature: Amount = 0


class Started(Message, tag="started", frozen=True):
    """A node begins to execute an attempt; sent only where the coordinator cannot read the node's shared memory."""

    request: Amount
    attempt: Amount
    sender: NodeNumber


class Receipt(Message, tag="receipt", frozen=True):
    """The load of a node, for a peer on another host, which cannot read the node's load board.

    Costs are sums over all time, in thousandths of the request that the plan was made for.

    Attributes:
        sender: number of the sending process.
        done: cost of all work from the receiver that the sender has finished.
        arrived: cost of all work from the receiver that has arrived at the sender, finished work included.
        others: cost of the unfinished work from all other processes.
        service_ns: time that a request of unit cost takes on the sender (EWMA).
        peak_ns: the same as a peak-EWMA.
        decompresses: whether the sender reads compressed tensors. Until a receipt says so, none are sent to it.
    """

    sender: NodeNumber
    done: Amount
    arrived: Amount
    others: Amount
    service_ns: Nanoseconds
    peak_ns: Nanoseconds
    decompresses: bool = False


class Failed(Message, tag="failed", frozen=True):
    """A stage could not execute an attempt, and no other replica could."""

    request: Amount
    attempt: Amount
    stage: Index
    replica: Index
    reason: str


Data = Fragment | Receipt | Started | Failed
