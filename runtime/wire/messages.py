"""What is said on the wire.

Four links, each a ROUTER or DEALER that binds and DEALERs that connect; each message a header and then, for fragments,
a frame for every tensor that is neither in the header nor in shared memory:

    control   node DEALER -> coordinator ROUTER    Hello Ready Refused NodeBeat Leaving    rarely, and twice a second
              coordinator -> node                  Assign Trust Wire Share Cancel Beat Stop
    data      coordinator, node -> node DEALER     Fragment [tensor ...]                   inputs of a stage
              node -> node, coordinator DEALER     Receipt                                 between hosts, for balancing
              node -> coordinator DEALER           Fragment [tensor ...] Started Failed
    files     node DEALER -> coordinator ROUTER    Fetch                                   where the plan is not at hand
              coordinator -> node                  Chunk bytes | NoFile
    measure   any DEALER -> agent ROUTER           Ping [bytes] Trust MeasureLink Put bytes MeasureModel
              agent -> who asked                   Pong LinkFigures Taken ModelTime | Cannot

Headers are MessagePack with a tag; unknown fields and tags are refused.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Literal, get_args

import msgspec

Policy = Literal["completion", "resource", "task", "latency", "round-robin"]


POLICIES: tuple[Policy, ...] = get_args(Policy)


class Step(IntEnum):
    """How far a process is with an attempt, as its ledger says. ``UNKNOWN``: it has not begun, or it is long ago."""

    UNKNOWN = 0
    RUNNING = 1
    DONE = 2


PROTOCOL = 5
"""Both ends must speak the same version; a node that speaks another is refused by name.

For that, the fields of :class:`Hello` and the first one of :class:`Stop` are the same in all versions.
"""


AttemptKey = tuple[int, int]
"""A request and its attempt, both counted from 1."""

NOT_NEEDED = -1
"""In a route: this stage does not run for the request."""

CHUNK_BYTES = 1 << 20
"""Of a file that is asked for at once, at most."""

ANY = 0
"""In a route: who sends there chooses the replica. (0 is the coordinator's own number, which executes nothing.)"""


SLOTS = 1024
"""Slots of a process's shared memory."""

# Every number has a bound, and all stay within 64 bits whatever is done with them: nothing said can end a process.
Amount = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
Index = Annotated[int, msgspec.Meta(ge=-1, le=1 << 16)]
NodeNumber = Annotated[int, msgspec.Meta(ge=0, lt=256)]
Cost = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Base of all headers."""


class Memory(_Message, frozen=True):
    """A process's shared memory: where to open it, on which host, and the token that shows it is the right one."""

    host: str
    pid: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    descriptor: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
    token: bytes
    size_bytes: Bytes


class Peer(_Message, frozen=True):
    """A process of the pipeline.

    Attributes:
        number: by which all others know it; a process started in its place gets another.
        stage: that it executes; :data:`CALLER` for the caller's process.
        replica: of that stage.
        takes: requests may be sent to it; False while it is being relieved of its work.
        address: where it takes fragments.
        shortcut: where it takes those of its own host that need no frames; empty for nowhere.
        memory: its shared memory, if it has any.
        key: its public key, by which others know that they speak with it; empty where links are not encrypted.
    """

    number: NodeNumber
    stage: Index
    replica: Index
    takes: bool
    address: str
    shortcut: str
    memory: Memory | None
    key: str


class Hello(_Message, tag="hello", frozen=True):
    """A node reports: who it is and where it takes fragments.

    ``number`` is the one its launcher gave it, 0 for none. ``stage`` and ``replica`` are wishes, -1 for any.
    """

    protocol: Amount
    number: NodeNumber
    pid: Amount
    host: str
    address: str
    stage: Index
    replica: Index
    shortcut: str
    memory: Memory | None
    key: str


class Ready(_Message, tag="ready", frozen=True):
    """The node's stage is loaded and its links are as :class:`Wire` says; it has mapped the memory of ``mapped``."""

    mapped: tuple[NodeNumber, ...]


class Refused(_Message, tag="refused", frozen=True):
    """The node cannot do what it was assigned, and ends."""

    reason: str


class NodeBeat(_Message, tag="node-beat", frozen=True):
    """The node lives.

    Attributes:
        progress: requests executed so far.
        running_ns: for how long the session has been at the present one, or the node at something else; 0 when it
            waits for work.
        cost: of that request.
        longest_ns: an ordinary request took at most so long here.
        unreachable: the processes that it has a link to which is not connected now.
    """

    progress: Amount
    running_ns: Nanoseconds
    cost: Amount
    longest_ns: Nanoseconds
    unreachable: tuple[NodeNumber, ...] = ()


class Leaving(_Message, tag="leaving", frozen=True):
    """The node was told to end, and asks to be relieved of its work first."""


class Assign(_Message, tag="assign", frozen=True):
    """The stage a node is to execute.

    ``plan_id`` is the SHA-256 of plan.json in ``folder``, a path on the coordinator's host. ``threads`` is 0 for the
    plan's number. ``files``: where the plan's files can be fetched by those who do not see that folder; empty for
    nowhere. ``share_weights``: map them from the copy that the replicas on a host have in common.
    ``profile``: have ONNX Runtime profile its runs into a file of the node's home. ``beat_ns`` and ``silence_ns``: how
    often to give signs of life, and after how long without one the coordinator is taken for dead. ``balance``: how to
    choose among replicas.
    """

    plan_id: str
    folder: str
    files: str
    stage: Index
    replica: Index
    provider: str
    threads: Annotated[int, msgspec.Meta(ge=0, le=1024)]
    share_weights: bool
    profile: bool
    beat_ns: Nanoseconds
    silence_ns: Nanoseconds
    balance: Policy


class Trust(_Message, tag="trust", frozen=True):
    """The public keys of the nodes that may send to each other, from now on."""

    keys: tuple[str, ...]


class Wire(_Message, tag="wire", frozen=True):
    """All processes of the pipeline, from now on. ``view`` counts the changes; ``me`` is the node's own number."""

    view: Amount
    me: NodeNumber
    peers: tuple[Peer, ...]


class Share(_Message, tag="share", frozen=True):
    """The peers that can read the node's memory, and whose returns it can read: to them, tensors go in place."""

    readers: tuple[NodeNumber, ...]


class Cancel(_Message, tag="cancel", frozen=True):
    """Nobody waits for these attempts at a request any more: for this one and all before it."""

    request: Amount
    attempt: Amount


class Beat(_Message, tag="beat", frozen=True):
    """The coordinator lives; nobody waits for a request before ``oldest`` any more."""

    oldest: Amount


Fate = Literal["end", "rejoin", "refused"]
"""What is to become of a node that is told to stop.

    end      its work is done: it exits with 0
    rejoin   it has no place now, or was taken for dead and may not be: it drops its work and asks for a place again,
             unless a launcher started it, which starts another
    refused  it will never have a place, because of its key, its version or its wish: it exits with 1
"""


class Stop(_Message, tag="stop", frozen=True):
    """Stop; the reason is for the node's log."""

    reason: str
    fate: Fate = "refused"


def refusal(reason: str) -> bytes:
    """A :class:`Stop` for good, in the form that nodes of every version understand."""
    return msgspec.msgpack.encode(["stop", reason])


class TensorPlace(_Message, frozen=True):
    """Where a tensor is in the sender's memory: a use of a slot, and the offset of the tensor in the whole memory."""

    slot: Annotated[int, msgspec.Meta(ge=0, lt=SLOTS)]
    generation: Nanoseconds
    offset: Bytes


class TensorHead(_Message, frozen=True):
    """A tensor, and where its bytes are: here, in the sender's memory, or (None) in a frame of its own."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    payload: bytes | TensorPlace | None


class Visit(_Message, frozen=True):
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


class Fragment(_Message, tag="fragment", frozen=True):
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


class Started(_Message, tag="started", frozen=True):
    """A node begins to execute an attempt; said where the coordinator cannot read it in the node's memory."""

    request: Amount
    attempt: Amount
    sender: NodeNumber


class Receipt(_Message, tag="receipt", frozen=True):
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


class Failed(_Message, tag="failed", frozen=True):
    """A stage could not execute an attempt; another would fare no better."""

    request: Amount
    attempt: Amount
    stage: Index
    replica: Index
    reason: str


class Fetch(_Message, tag="fetch", frozen=True):
    """A node asks for a piece of a file of the plan, or of ``plan.json``, by the file's SHA-256."""

    sha256: Annotated[str, msgspec.Meta(min_length=64, max_length=64)]
    offset: Amount
    length: Annotated[int, msgspec.Meta(ge=1, le=CHUNK_BYTES)]


class Chunk(_Message, tag="chunk", frozen=True):
    """The piece from ``offset`` of a file of ``size_bytes``; its bytes are the frame that follows."""

    sha256: str
    offset: Amount
    size_bytes: Amount


class NoFile(_Message, tag="no-file", frozen=True):
    """No file of the plan has this SHA-256, or it cannot be read any more."""

    sha256: str
    reason: str


class Ping(_Message, tag="ping", frozen=True):
    """Answer at once. Bytes may follow, to see how fast they come."""

    number: Amount


class Pong(_Message, tag="pong", frozen=True):
    """The answer."""

    number: Amount


class MeasureLink(_Message, tag="measure-link", frozen=True):
    """Measure the link to another agent at an address; its public key, where links are encrypted."""

    address: str
    key: str


class LinkFigures(_Message, tag="link-figures", frozen=True):
    """A link as measured.

    Attributes:
        round_trip_ns: of a message of next to nothing.
        message_ns: between two such messages of many at once.
        bytes_per_s: of large ones.
    """

    round_trip_ns: Nanoseconds
    message_ns: Nanoseconds
    bytes_per_s: Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]


class Put(_Message, tag="put", frozen=True):
    """A piece of a file, which follows; ``name`` is a plain one. The first piece begins the file anew."""

    name: str
    offset: Amount


class Taken(_Message, tag="taken", frozen=True):
    """The file has so many bytes now."""

    name: str
    size_bytes: Amount


class MeasureModel(_Message, tag="measure-model", frozen=True):
    """Time a model that was put here, on inputs that were."""

    model: str
    inputs: str
    provider: str
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)]


class ModelTime(_Message, tag="model-time", frozen=True):
    """It takes so long; 0 where the provider is not to be had."""

    time_ns: Nanoseconds


class Cannot(_Message, tag="cannot", frozen=True):
    """What was asked cannot be done."""

    reason: str


NodeControl = Hello | Ready | Refused | NodeBeat | Leaving
CoordinatorControl = Assign | Trust | Wire | Share | Cancel | Beat | Stop
Data = Fragment | Receipt | Started | Failed
FileAnswer = Chunk | NoFile
AgentRequest = Ping | Trust | MeasureLink | Put | MeasureModel
Told = Pong | LinkFigures | Taken | ModelTime | Cannot
