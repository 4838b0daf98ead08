"""Messages of the control link, between a node and the coordinator."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec

from runtime.wire.messages.base import Amount, Bytes, Index, Message, Nanoseconds, NodeNumber
from runtime.wire.messages.sequences import MOST_SLOTS, Position

Policy = Literal["completion", "resource", "task", "latency", "round-robin"]
"""How a replica is chosen for a request; see :mod:`runtime.balance.policies`."""

POLICIES: tuple[Policy, ...] = get_args(Policy)

PROTOCOL = 9
"""The version of the protocol. Both ends must have the same one; the coordinator refuses a node of another version.

The fields of :class:`Hello` and the first field of :class:`Stop` are the same in all versions, so that a refusal can be
understood.
"""


class Memory(Message, frozen=True):
    """The shared memory of a process, as peers need to know it to map it.

    Attributes:
        host: identifies the host, its boot and the user; equal where the memory can be mapped.
        pid: the process.
        descriptor: the process's file descriptor of the memory.
        token: random bytes at the start of the memory, by which a peer checks that it has mapped the right one.
        size_bytes: the size of the memory.
    """

    host: str
    pid: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    descriptor: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
    token: bytes
    size_bytes: Bytes


class Peer(Message, frozen=True):
    """A process of the pipeline.

    Attributes:
        number: identifies the process; a process started in its place gets another number.
        stage: the stage it executes; :data:`~onnxsplit.plan.CALLER` for the caller's process.
        replica: which replica of that stage it is.
        takes: whether requests may be sent to it; False while it finishes its work before it leaves, unless it is the
            last of its stage.
        address: where it receives fragments.
        shortcut: path of the Unix datagram socket where processes of its host may send messages of one frame; empty
            for none.
        memory: its shared memory; None for none.
        key: its public key; empty where links are not encrypted.
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
    """First message of a node: its identity, and the address where it receives fragments.

    Attributes:
        protocol: the version it speaks; see :data:`PROTOCOL`.
        number: the number its launcher gave it; 0 for none.
        pid: its process.
        host: the name of its host, as in the cluster file.
        address: where it receives fragments.
        stage: the stage it wants; -1 for any.
        replica: the replica it wants to be; -1 for any.
        shortcut: as in :class:`Peer`.
        memory: as in :class:`Peer`.
        key: as in :class:`Peer`.
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


OpCounts = Annotated[dict[Annotated[str, msgspec.Meta(max_length=256)], Amount], msgspec.Meta(max_length=1024)]
"""Numbers of ops by op type."""


class Ready(Message, tag="ready", frozen=True):
    """Reply to :class:`Wire`: the node has loaded its stage and has links to its peers.

    Attributes:
        mapped: the peers whose shared memory it has mapped.
        why_unguided: why no sequence can follow a grammar on this node; empty if it can. Only that of the last stage
            of a decoder counts.
        left_to_cpu: ops of the stage that its provider left to the CPU: their number by op type.
    """

    mapped: tuple[NodeNumber, ...]
    why_unguided: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    left_to_cpu: OpCounts = msgspec.field(default_factory=dict)


class Refused(Message, tag="refused", frozen=True):
    """The node cannot execute the stage it was assigned, for this reason, and exits."""

    reason: str


class NodeBeat(Message, tag="node-beat", frozen=True):
    """Heartbeat of a node.

    Attributes:
        progress: number of requests executed so far.
        running_ns: how long the session has been executing its present request, or the main thread has been at
            something else; 0 when it waits for work.
        cost: cost of that request.
        longest_ns: the longest time that a request of unit cost has taken on this node.
        unreachable: the processes to which the node has a link that is not connected now.
        sequences: the number of sequences whose states the node holds.
        state_bytes: the bytes of those states.
    """

    progress: Amount
    running_ns: Nanoseconds
    cost: Amount
    longest_ns: Nanoseconds
    unreachable: tuple[NodeNumber, ...] = ()
    sequences: Amount = 0
    state_bytes: Bytes = 0


class Leaving(Message, tag="leaving", frozen=True):
    """The node was told to end. It asks for no further requests, and finishes those it has."""


class Succeeded(Message, tag="succeeded", frozen=True):
    """Reply to :class:`Succeed`: the node has started its successor, which is this process."""

    pid: Amount


class SucceedRefused(Message, tag="succeed-refused", frozen=True):
    """Reply to :class:`Succeed`: the node cannot start a successor, for this reason, and serves on."""

    reason: str


class SuccessorEnded(Message, tag="successor-ended", frozen=True):
    """The successor that a node has started has ended while the node still serves; ``story`` says how."""

    pid: Amount
    story: str


class Assign(Message, tag="assign", frozen=True):
    """The stage that a node is to execute, and how.

    Attributes:
        plan_id: SHA-256 of ``plan.json``.
        folder: the plan directory, a path on the coordinator's host.
        files: address where a node that does not see that folder can fetch the plan's files; empty for none.
        stage: the stage.
        replica: which replica of it.
        provider: the execution provider.
        threads: threads of the session; 0 for the plan's number.
        share_weights: whether to map the packed weights that all replicas on a host share.
        profile: whether ONNX Runtime writes a profile into the node's home folder.
        beat_ns: time between two heartbeats.
        silence_ns: time without a heartbeat after which the coordinator counts as dead.
        balance: how the node chooses among replicas of the next stage.
        slots: the number of slots for sequences; 0 where the plan has no decoder.
        length: the most positions of a sequence.
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
    slots: Annotated[int, msgspec.Meta(ge=0, le=MOST_SLOTS)] = 0
    length: Position = 0


class Trust(Message, tag="trust", frozen=True):
    """The public keys of the processes that may send to the receiver from now on."""

    keys: tuple[str, ...]


class Wire(Message, tag="wire", frozen=True):
    """All processes of the pipeline, from now on.

    Attributes:
        view: number of changes to the set of processes so far.
        me: the receiving node's own number.
        peers: the processes.
    """

    view: Amount
    me: NodeNumber
    peers: tuple[Peer, ...]


class Share(Message, tag="share", frozen=True):
    """The peers that have mapped the node's memory: it may leave tensors for them there."""

    readers: tuple[NodeNumber, ...]


class Cancel(Message, tag="cancel", frozen=True):
    """This attempt at a request, and all before it, were given up."""

    request: Amount
    attempt: Amount


class Beat(Message, tag="beat", frozen=True):
    """Heartbeat of the coordinator. All requests with a number below ``oldest`` have ended.

    Nodes keep the states of some sequences that have ended, ``kept``, because others may begin with them.
    """

    oldest: Amount
    kept: Annotated[tuple[Amount, ...], msgspec.Meta(max_length=MOST_SLOTS)] = ()


class Succeed(Message, tag="succeed", frozen=True):
    """The node is to start another process of itself for the next plan, and to serve on meanwhile.

    The answer is :class:`Succeeded` or :class:`SucceedRefused`.

    Attributes:
        address: control address of the coordinator of the next plan.
        stage: the stage that the successor asks for there.
        replica: the replica that it asks to be.
        needed_bytes: memory that must be free for it.
        key: public key of that coordinator; empty where links are not encrypted.
        background_ns: how long the successor loads at idle priority at most; 0 for not at all.
    """

    address: str
    stage: Index
    replica: Index
    needed_bytes: Bytes
    key: str
    background_ns: Nanoseconds = 0


Fate = Literal["end", "rejoin", "refused"]
"""What a node does when it receives :class:`Stop`.

    end      its work is done: it exits with 0
    rejoin   it has no place now, or was declared dead: it drops its work. A node that a launcher started exits, and
             the launcher starts another; any other node asks for a place again
    refused  its key, its version or the stage it wants is not acceptable: it exits with 1
"""


class Stop(Message, tag="stop", frozen=True):
    """The node is to stop. It writes the reason to its log."""

    reason: str
    fate: Fate = "refused"


def refusal(reason: str) -> bytes:
    """The bytes of a :class:`Stop` with the fate ``refused``, which nodes of every version understand."""
    return msgspec.msgpack.encode(["stop", reason])


NodeControl = Hello | Ready | Refused | NodeBeat | Leaving | Succeeded | SucceedRefused | SuccessorEnded
CoordinatorControl = Assign | Trust | Wire | Share | Cancel | Beat | Succeed | Stop
