"""The events and the effects of the coordinator's state machine. Pure.

Events come first. Effects are of two kinds: those on requests and sequences (:data:`RequestEffect`), which any thread
of the caller's process performs at once, and those on nodes (:data:`ControlEffect`), which the coordinator's own thread
performs. :mod:`runtime.coordinator.interpreter` has a method for each. Those of sequences are defined in
:mod:`runtime.coordinator.sequence_events`.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from onnxsplit.errors import OnnxsplitError
from runtime.coordinator.reach import LinkKey
from runtime.coordinator.sequence_events import SequenceEffect, SequenceEvent
from runtime.errors import PipelineError
from runtime.topology import ReplicaKey
from runtime.wire.messages.control import Fate, Hello
from runtime.wire.messages.data import AttemptKey, Failed, Step, Visit

Steps = Mapping[AttemptKey, Mapping[int, Step]]
"""For each attempt, how far each node is with it, by the node's number; nodes not known to have it are left out."""


class Joined(Struct, frozen=True):
    """A node has sent its first message."""

    identity: bytes
    hello: Hello
    now_ns: int


class Prepared(Struct, frozen=True):
    """A node has loaded its stage and opened its links; it has mapped the memory of these processes."""

    identity: bytes
    mapped: tuple[int, ...]
    now_ns: int
    why_unguided: str = ""
    left_to_cpu: Mapping[str, int] = {}


class Met(Struct, frozen=True):
    """The coordinator has connected to the present nodes, and has mapped the memory of these."""

    mapped: tuple[int, ...]
    now_ns: int


class Declined(Struct, frozen=True):
    """A node cannot execute the stage it was assigned."""

    identity: bytes
    reason: str
    now_ns: int


class LeaveWanted(Struct, frozen=True):
    """A node asks to receive no more requests, because it was told to end."""

    identity: bytes
    now_ns: int


class Lost(Struct, frozen=True):
    """The process of a node has ended or counts as dead.

    Attributes:
        number: the node's number.
        reason: what happened, in words that follow the node's name.
        steps: how far all nodes are with all attempts in flight.
        now_ns: the host's monotonic clock.
        fate: what the node is told to do if it still lives.
    """

    number: int
    reason: str
    steps: Steps
    now_ns: int
    fate: Fate = "rejoin"


class Reconnected(Struct, frozen=True):
    """A node whose control link was broken was heard again. It has missed the messages sent meanwhile."""

    identity: bytes


class LinksSeen(Struct, frozen=True):
    """All links that are dead now, each as the numbers of its sender and its receiver."""

    dead: frozenset[LinkKey]
    now_ns: int


class Submitted(Struct, frozen=True):
    """A caller asks for tensors. ``deadline_ns`` is None where there is no time limit."""

    request: int
    wanted: tuple[str, ...]
    cost: int
    deadline_ns: int | None
    now_ns: int


class Returned(Struct, frozen=True):
    """Output tensors of an attempt have arrived. ``history`` lists the stages that they passed."""

    request: int
    attempt: int
    names: tuple[str, ...]
    history: tuple[Visit, ...]


class Reported(Struct, frozen=True):
    """A node says that an attempt failed at its stage."""

    message: Failed


class Expired(Struct, frozen=True):
    """The deadline of a request or of a sequence has passed.

    ``steps`` says how far nodes are with its attempt, or with its step in flight.
    """

    request: int
    steps: Mapping[int, Step]


class GivenUp(Struct, frozen=True):
    """The caller has cancelled a request or a sequence."""

    request: int


class Unsendable(Struct, frozen=True):
    """A request or a step cannot be sent, or its outputs cannot be read. Attempt 0 stands for any attempt."""

    request: int
    error: PipelineError
    attempt: int = 0


class Tick(Struct, frozen=True):
    """Time has passed. ``steps`` is as for :class:`Lost`, and is given when an attempt is overdue."""

    now_ns: int
    steps: Steps = {}


class TimedOut(Struct, frozen=True):
    """The nodes did not all become ready in time."""

    reason: str


class Scaled(Struct, frozen=True):
    """A stage is to have this number of replicas from now on.

    A ``tentative`` replica that does not become ready is given up: its slot is removed, and none is started in its
    place. Once it is ready, it is a replica like any other.
    """

    stage: int
    replicas: int
    now_ns: int
    tentative: bool = False


class DrainAsked(Struct, frozen=True):
    """The caller wants no more requests to be taken; those in flight are answered."""


class CloseAsked(Struct, frozen=True):
    """The caller wants the pipeline to end."""


CoordinatorEvent = (
    Joined
    | Met
    | Prepared
    | Declined
    | LeaveWanted
    | Lost
    | Reconnected
    | LinksSeen
    | Submitted
    | SequenceEvent
    | Returned
    | Reported
    | Expired
    | GivenUp
    | Unsendable
    | Tick
    | TimedOut
    | Scaled
    | DrainAsked
    | CloseAsked
)


class Enter(Struct, frozen=True):
    """Begin an attempt: send the request's inputs to the stages that read them."""

    request: int
    attempt: int
    view: int
    cost: int
    deadline_ns: int | None
    route: tuple[int, ...]
    wanted: tuple[str, ...]


class Again(Struct, frozen=True):
    """End the present attempt, and drop the outputs received for it. Another attempt follows, perhaps later."""

    request: int
    attempt: int
    reason: str


class Resolve(Struct, frozen=True):
    """Answer a request with its tensors. ``visits`` are the stages that they passed."""

    request: int
    visits: tuple[Visit, ...]


class Reject(Struct, frozen=True):
    """Answer a request or a sequence with an error."""

    request: int
    error: OnnxsplitError


RequestEffect = Enter | Again | Resolve | Reject | SequenceEffect


class StartNode(Struct, frozen=True):
    """Start a process for a slot; it will have this number."""

    slot: ReplicaKey
    number: int


class KillNode(Struct, frozen=True):
    """End the process with this number at once."""

    number: int


class GiveStage(Struct, frozen=True):
    """Assign a slot to a node."""

    identity: bytes
    slot: ReplicaKey


class Introduce(Struct, frozen=True):
    """Tell these nodes which processes exist. With ``meet``, connect to the nodes and answer with :class:`Met`."""

    identities: tuple[bytes, ...]
    meet: bool


class ShareMemory(Struct, frozen=True):
    """Have a node lend its memory to these processes; the coordinator itself where ``identity`` is None."""

    identity: bytes | None
    readers: tuple[int, ...]


class SendAway(Struct, frozen=True):
    """Tell a node to stop, and what to do then. ``again``: it was told before, and keeps asking for a place."""

    identity: bytes
    reason: str
    fate: Fate
    again: bool = False


class LinkChanged(Struct, frozen=True):
    """Log that a link between two processes is dead, or works again. ``story`` names both."""

    story: str
    is_dead: bool


class Announce(Struct, frozen=True):
    """Tell the caller that the pipeline is ready, or why it will never be."""

    error: PipelineError | None


class Forget(Struct, frozen=True):
    """Tell nodes that this attempt at a request or a sequence, and all before it, were given up or have ended."""

    request: int
    attempt: int
    identities: tuple[bytes, ...]


class Drained(Struct, frozen=True):
    """Tell the caller that no request and no sequence is in flight, and none will be."""


ControlEffect = (
    StartNode | KillNode | GiveStage | Introduce | ShareMemory | SendAway | LinkChanged | Announce | Forget | Drained
)

Decision = tuple[list[RequestEffect], list[ControlEffect]]
"""The effects of one event: those on requests and those on nodes, each in order."""


class Effects:
    """Collects the effects of the event that is being handled, in two lists."""

    def __init__(self) -> None:
        self.on_requests: list[RequestEffect] = []
        self.on_nodes: list[ControlEffect] = []
