"""The process of a simulated node."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from runtime.node.events import NodeEvent
from runtime.node.state import NodeState
from runtime.topology import ReplicaKey
from runtime.wire.messages.control import Peer
from runtime.wire.messages.data import AttemptKey, Step

COORDINATOR = 0
"""The number of the coordinator's process."""

Tensor = Any
"""A nested tuple: (name, request, attempt) for an input of the model, else (name, each input of its stage)."""


@dataclass(eq=False)
class SimulatedNode:
    """The process of a node.

    Attributes:
        number: under which others know it.
        slot: its stage and replica.
        state: its state machine.
        alive: False once it has ended.
        stopped: whether it does nothing, as after SIGSTOP.
        peers: the processes it knows.
        ledger: how far it is with attempts. Others read it, even when the process is dead.
        events: what has come in and is not handled yet.
        outputs: those of the request that ran last.
    """

    number: int
    slot: ReplicaKey
    state: NodeState = field(default_factory=NodeState)
    alive: bool = True
    stopped: bool = False
    peers: tuple[Peer, ...] = ()
    ledger: dict[AttemptKey, Step] = field(default_factory=dict)
    events: deque[NodeEvent] = field(default_factory=deque)
    outputs: dict[str, Tensor] = field(default_factory=dict)
