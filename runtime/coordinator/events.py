"""What can happen to a coordinator, and what it can decide: the words of :mod:`runtime.coordinator.state`.

Events first, then effects.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from runtime.coordinator.reach import LinkKey
from runtime.coordinator.roster import KillNode, StartNode
from runtime.errors import PipelineError
from runtime.topology import ReplicaKey
from runtime.wire.messages.control import Fate, Hello
from runtime.wire.messages.data import AttemptKey, Failed, Step, Visit

Steps = Mapping[AttemptKey, Mapping[int, Step]]
"""How far nodes, by number, are known to be with attempts."""


class Joined(Struct, frozen=True):
    """A node reported."""

    identity: bytes
    hello: Hello
    now_ns: int


class Prepared(Struct, frozen=True):
    """A node has loaded its stage and its links are as it was told; it has mapped the memory of these peers."""

    identity: bytes
    mapped: tuple[int, ...]
    now_ns: int


class Met(Struct, frozen=True):
    """The coordinator itself knows the nodes as they are now, and has mapped the memory of these."""

    mapped: tuple[int, ...]
    now_ns: int


class Declined(Struct, frozen=True):
    """A node cannot do what it was assigned."""

    identity: bytes
    reason: str
    now_ns: int


class LeaveWanted(Struct, frozen=True):
    """A node asks to be relieved of its work."""

    identity: bytes
    now_ns: int


class Lost(Struct, frozen=True):
    """The process with this number is gone.

    ``reason`` is its story; ``steps`` how far all nodes are with all attempts in flight; ``fate`` what it is told, in
    case it lives.
    """

    number: int
    reason: str
    steps: Steps
    now_ns: int
    fate: Fate = "rejoin"


class Reconnected(Struct, frozen=True):
    """A node is heard again whose control link was broken; what it was told meanwhile did not reach it."""

    identity: bytes


class LinksSeen(Struct, frozen=True):
    """These links, and no others, are dead now: numbers of who sends and of who should receive."""

    dead: frozenset[LinkKey]
    now_ns: int


class Submitted(Struct, frozen=True):
    """A caller asks for tensors. ``deadline_ns`` is None for none."""

    request: int
    wanted: tuple[str, ...]
    cost: int
    deadline_ns: int | None
    now_ns: int


class Returned(Struct, frozen=True):
    """Tensors of an attempt came back, from a stage with this history."""

    request: int
    attempt: int
    names: tuple[str, ...]
    history: tuple[Visit, ...]


class Reported(Struct, frozen=True):
    """A node says that an attempt failed at its stage."""

    message: Failed


class Expired(Struct, frozen=True):
    """A request's time ran out."""

    request: int
    steps: Mapping[int, Step]


class GivenUp(Struct, frozen=True):
    """The caller does not want a request any more."""

    request: int


class Unsendable(Struct, frozen=True):
    """A request cannot be sent, or what came back of an attempt at it cannot be read; 0 stands for any attempt."""

    request: int
    error: PipelineError
    attempt: int = 0


class Tick(Struct, frozen=True):
    """Time passed. ``steps``: as for :class:`Lost`, where an attempt is overdue."""

    now_ns: int
    steps: Steps = {}


class TimedOut(Struct, frozen=True):
    """The nodes did not all come up in time."""

    reason: str


class Scaled(Struct, frozen=True):
    """A stage is to have so many nodes from now on."""

    stage: int
    replicas: int
    now_ns: int


class DrainAsked(Struct, frozen=True):
    """No more requests; the ones in flight are to be answered."""


class CloseAsked(Struct, frozen=True):
    """The pipeline is to end."""


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


class GiveStage(Struct, frozen=True):
    """Assign a slot to a node."""

    identity: bytes
    slot: ReplicaKey


class Introduce(Struct, frozen=True):
    """Tell these nodes who all processes are; with ``meet``, learn it, too, and answer with :class:`Met`."""

    identities: tuple[bytes, ...]
    meet: bool


class ShareMemory(Struct, frozen=True):
    """These peers read a node's memory (the coordinator's own when ``identity`` is None)."""

    identity: bytes | None
    readers: tuple[int, ...]


class SendAway(Struct, frozen=True):
    """Tell a node to stop, and what is to become of it; ``again``: it was told so before, and keeps asking."""

    identity: bytes
    reason: str
    fate: Fate
    again: bool = False


class LinkChanged(Struct, frozen=True):
    """A link between two processes is dead, or works again; the story names both."""

    story: str
    is_dead: bool


class Announce(Struct, frozen=True):
    """The pipeline is ready, or will never be."""

    error: PipelineError | None


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
    """The attempt under way is over: what came back of it is void. Another follows, maybe later."""

    request: int
    attempt: int
    reason: str


class Resolve(Struct, frozen=True):
    """Give the caller its tensors; they passed these stages."""

    request: int
    visits: tuple[Visit, ...]


class Reject(Struct, frozen=True):
    """Give the caller an error."""

    request: int
    error: PipelineError


class Forget(Struct, frozen=True):
    """Tell nodes that nobody waits for this attempt, and those before it, any more."""

    request: int
    attempt: int
    identities: tuple[bytes, ...]


class Drained(Struct, frozen=True):
    """No request is in flight any more, and none will be."""


CoordinatorEffect = (
    StartNode
    | KillNode
    | GiveStage
    | Introduce
    | ShareMemory
    | SendAway
    | LinkChanged
    | Announce
    | Enter
    | Again
    | Resolve
    | Reject
    | Forget
    | Drained
)
