"""What is said on the wire.

Two links, each ROUTER (who binds) to DEALER (who connects), each message a header and then, for fragments, one frame
a tensor:

    control   node DEALER -> coordinator ROUTER    Hello Ready Refused NodeBeat         once, and once a second
              coordinator -> node                  Assign Wire Cancel Beat Stop
    data      coordinator, node -> node ROUTER     Fragment [tensor ...]                inputs of a stage
              node -> coordinator ROUTER           Fragment [tensor ...] Finished Failed

Headers are MessagePack with a tag; unknown fields and tags are refused.
"""

from __future__ import annotations

import msgspec

PROTOCOL = 1
"""Both ends must speak the same version; a node that speaks another is refused by name."""

CALLER = -1
"""As a fragment's source: the caller's inputs, sent by the coordinator."""

NOT_NEEDED = -1
"""In a route: this stage does not run for the request."""


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Base of all headers."""


class Hello(_Message, tag="hello", frozen=True):
    """A node reports: who it is and where it takes fragments. ``stage`` and ``replica`` are wishes, -1 for any."""

    protocol: int
    pid: int
    host: str
    address: str
    stage: int
    replica: int


class Ready(_Message, tag="ready", frozen=True):
    """The node's stage is loaded and its links are set up."""


class Refused(_Message, tag="refused", frozen=True):
    """The node cannot do what it was assigned, and ends."""

    reason: str


class NodeBeat(_Message, tag="node-beat", frozen=True):
    """The node lives; ``progress`` counts the requests it has executed."""

    progress: int


class Assign(_Message, tag="assign", frozen=True):
    """The stage a node is to execute.

    ``plan_id`` is the SHA-256 of plan.json in ``folder``, a path on the coordinator's host. ``threads`` is 0 for the
    plan's number. ``address`` takes results.
    """

    plan_id: str
    folder: str
    stage: int
    replica: int
    provider: str
    threads: int
    address: str


class Wire(_Message, tag="wire", frozen=True):
    """Where all nodes take fragments: by stage, then replica."""

    addresses: tuple[tuple[str, ...], ...]


class Cancel(_Message, tag="cancel", frozen=True):
    """Nobody waits for this request any more."""

    request: int


class Beat(_Message, tag="beat", frozen=True):
    """The coordinator lives."""


class Stop(_Message, tag="stop", frozen=True):
    """End; the reason is for the node's log."""

    reason: str


class TensorHead(_Message, frozen=True):
    """A tensor whose bytes are in a frame of its own."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Fragment(_Message, tag="fragment", frozen=True):
    """Tensors of one request from one source for one stage, or for the caller.

    Attributes:
        request: number of the request.
        source: the stage that sends, or :data:`CALLER`.
        route: the replica that executes each stage, :data:`NOT_NEEDED` where none does.
        wanted: tensors the caller asked for.
        tensors: one for every frame that follows.
    """

    request: int
    source: int
    route: tuple[int, ...]
    wanted: tuple[str, ...]
    tensors: tuple[TensorHead, ...]


class Finished(_Message, tag="finished", frozen=True):
    """A stage executed a request. Times in nanoseconds: waiting for its turn, and running."""

    request: int
    stage: int
    replica: int
    wait_ns: int
    run_ns: int


class Failed(_Message, tag="failed", frozen=True):
    """A stage could not execute a request."""

    request: int
    stage: int
    replica: int
    reason: str


NodeControl = Hello | Ready | Refused | NodeBeat
CoordinatorControl = Assign | Wire | Cancel | Beat | Stop
Data = Fragment | Finished | Failed
