"""What is said on the wire.

Two links, each a ROUTER or DEALER that binds and DEALERs that connect; each message a header and then, for fragments,
a frame for every tensor that is neither in the header nor in shared memory:

    control   node DEALER -> coordinator ROUTER    Hello Ready Refused NodeBeat         once, and once a second
              coordinator -> node                  Assign Wire Share Cancel Beat Stop
    data      coordinator, node -> node DEALER     Fragment [tensor ...]                inputs of a stage
              node -> coordinator DEALER           Fragment [tensor ...] Failed

Headers are MessagePack with a tag; unknown fields and tags are refused.
"""

from __future__ import annotations

import msgspec

PROTOCOL = 2
"""Both ends must speak the same version; a node that speaks another is refused by name."""

CALLER = -1
"""As a fragment's source: the caller's inputs, sent by the coordinator."""

NOT_NEEDED = -1
"""In a route: this stage does not run for the request."""


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Base of all headers."""


class Memory(_Message, frozen=True):
    """A process's shared memory: where to open it, on which host, and the token that shows it is the right one."""

    host: str
    pid: int
    descriptor: int
    token: bytes
    size_bytes: int


class Peer(_Message, frozen=True):
    """A process of the pipeline.

    Attributes:
        stage: that it executes; :data:`CALLER` for the caller's process.
        replica: of that stage.
        address: where it takes fragments.
        shortcut: where it takes those of its own host that need no frames; empty for nowhere.
        memory: its shared memory, if it has any.
    """

    stage: int
    replica: int
    address: str
    shortcut: str
    memory: Memory | None


class Hello(_Message, tag="hello", frozen=True):
    """A node reports: who it is and where it takes fragments. ``stage`` and ``replica`` are wishes, -1 for any."""

    protocol: int
    pid: int
    host: str
    address: str
    stage: int
    replica: int
    shortcut: str
    memory: Memory | None


class Ready(_Message, tag="ready", frozen=True):
    """The node's stage is loaded and its links are set up; it has mapped the memory of the peers ``mapped``."""

    mapped: tuple[int, ...]


class Refused(_Message, tag="refused", frozen=True):
    """The node cannot do what it was assigned, and ends."""

    reason: str


class NodeBeat(_Message, tag="node-beat", frozen=True):
    """The node lives; ``progress`` counts the requests it has executed."""

    progress: int


class Assign(_Message, tag="assign", frozen=True):
    """The stage a node is to execute.

    ``plan_id`` is the SHA-256 of plan.json in ``folder``, a path on the coordinator's host. ``threads`` is 0 for the
    plan's number. ``share_weights``: map them from the copy that the replicas on a host have in common.
    ``profile``: have ONNX Runtime profile its runs into a file of the node's home.
    """

    plan_id: str
    folder: str
    stage: int
    replica: int
    provider: str
    threads: int
    share_weights: bool
    profile: bool


class Wire(_Message, tag="wire", frozen=True):
    """All processes of the pipeline. A peer's number is its position; the first is the caller's."""

    peers: tuple[Peer, ...]


class Share(_Message, tag="share", frozen=True):
    """The peers that can read the node's memory, and whose returns it can read: to them, tensors go in place."""

    readers: tuple[int, ...]


class Cancel(_Message, tag="cancel", frozen=True):
    """Nobody waits for this request any more."""

    request: int


class Beat(_Message, tag="beat", frozen=True):
    """The coordinator lives."""


class Stop(_Message, tag="stop", frozen=True):
    """End; the reason is for the node's log."""

    reason: str


class Place(_Message, frozen=True):
    """Where a tensor is in the sender's memory: a use of a slot, and the offset of the tensor in the whole memory."""

    slot: int
    generation: int
    offset: int


class TensorHead(_Message, frozen=True):
    """A tensor, and where its bytes are: here, in the sender's memory, or (None) in a frame of its own."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    payload: bytes | Place | None


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

    stage: int
    replica: int
    arrived_ns: int
    started_ns: int
    ended_ns: int
    sent_ns: int
    output_bytes: int
    shared_bytes: int


class Fragment(_Message, tag="fragment", frozen=True):
    """Tensors of one request from one source for one stage, or for the caller.

    Attributes:
        request: number of the request.
        sender: number of the process that sends.
        source: the stage that sends, or :data:`CALLER`.
        route: the replica that executes each stage, :data:`NOT_NEEDED` where none does.
        wanted: tensors the caller asked for.
        tensors: what is sent.
        history: the stages the request has passed on the way here.
    """

    request: int
    sender: int
    source: int
    route: tuple[int, ...]
    wanted: tuple[str, ...]
    tensors: tuple[TensorHead, ...]
    history: tuple[Visit, ...]


class Failed(_Message, tag="failed", frozen=True):
    """A stage could not execute a request."""

    request: int
    stage: int
    replica: int
    reason: str


NodeControl = Hello | Ready | Refused | NodeBeat
CoordinatorControl = Assign | Wire | Share | Cancel | Beat | Stop
Data = Fragment | Failed
