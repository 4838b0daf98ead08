"""What nodes and their coordinator say on the control link."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec

from runtime.wire.messages.base import Amount, Bytes, Index, Message, Nanoseconds, NodeNumber

Policy = Literal["completion", "resource", "task", "latency", "round-robin"]


POLICIES: tuple[Policy, ...] = get_args(Policy)


PROTOCOL = 5
"""Both ends must speak the same version; a node that speaks another is refused by name.

For that, the fields of :class:`Hello` and the first one of :class:`Stop` are the same in all versions.
"""


class Memory(Message, frozen=True):
    """A process's shared memory: where to open it, on which host, and the token that shows it is the right one."""

    host: str
    pid: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    descriptor: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
    token: bytes
    size_bytes: Bytes


class Peer(Message, frozen=True):
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


class Hello(Message, tag="hello", frozen=True):
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


class Ready(Message, tag="ready", frozen=True):
    """The node's stage is loaded and its links are as :class:`Wire` says; it has mapped the memory of ``mapped``."""

    mapped: tuple[NodeNumber, ...]


class Refused(Message, tag="refused", frozen=True):
    """The node cannot do what it was assigned, and ends."""

    reason: str


class NodeBeat(Message, tag="node-beat", frozen=True):
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


class Leaving(Message, tag="leaving", frozen=True):
    """The node was told to end, and asks to be relieved of its work first."""


class Assign(Message, tag="assign", frozen=True):
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


class Trust(Message, tag="trust", frozen=True):
    """The public keys of the nodes that may send to each other, from now on."""

    keys: tuple[str, ...]


class Wire(Message, tag="wire", frozen=True):
    """All processes of the pipeline, from now on. ``view`` counts the changes; ``me`` is the node's own number."""

    view: Amount
    me: NodeNumber
    peers: tuple[Peer, ...]


class Share(Message, tag="share", frozen=True):
    """The peers that can read the node's memory, and whose returns it can read: to them, tensors go in place."""

    readers: tuple[NodeNumber, ...]


class Cancel(Message, tag="cancel", frozen=True):
    """Nobody waits for these attempts at a request any more: for this one and all before it."""

    request: Amount
    attempt: Amount


class Beat(Message, tag="beat", frozen=True):
    """The coordinator lives; nobody waits for a request before ``oldest`` any more."""

    oldest: Amount


Fate = Literal["end", "rejoin", "refused"]
"""What is to become of a node that is told to stop.

    end      its work is done: it exits with 0
    rejoin   it has no place now, or was taken for dead and may not be: it drops its work and asks for a place again,
             unless a launcher started it, which starts another
    refused  it will never have a place, because of its key, its version or its wish: it exits with 1
"""


class Stop(Message, tag="stop", frozen=True):
    """Stop; the reason is for the node's log."""

    reason: str
    fate: Fate = "refused"


def refusal(reason: str) -> bytes:
    """A :class:`Stop` for good, in the form that nodes of every version understand."""
    return msgspec.msgpack.encode(["stop", reason])


NodeControl = Hello | Ready | Refused | NodeBeat | Leaving


CoordinatorControl = Assign | Trust | Wire | Share | Cancel | Beat | Stop
