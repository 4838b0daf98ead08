"""Dispatches the effects of the coordinator's state machine, in every kind of pipeline. Pure.

The machine returns effects as values. Here each value becomes a method call, so code that runs a machine only needs a
method for each effect. There are two implementations: the coordinator of real pipelines
(:mod:`runtime.coordinator.request_io` and :mod:`runtime.coordinator.node_controller`), and the simulator for tests and
benchmarks (:mod:`runtime.testing`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable

from onnxsplit.errors import OnnxsplitError
from runtime.coordinator.events import (
    Again,
    Announce,
    ControlEffect,
    CoordinatorEvent,
    Declined,
    Drained,
    Enter,
    Forget,
    GiveStage,
    Introduce,
    Joined,
    KillNode,
    LeaveWanted,
    LinkChanged,
    Met,
    Prepared,
    Reject,
    RequestEffect,
    Resolve,
    SendAway,
    ShareMemory,
    StartNode,
)
from runtime.coordinator.sequence_events import Emit, EnterStep, Finish
from runtime.coordinator.state import CoordinatorState
from runtime.errors import PipelineError
from runtime.topology import ReplicaKey
from runtime.wire.messages.control import Fate, Hello, Leaving, Ready, Refused
from runtime.wire.messages.data import Visit


class RequestEffects(ABC):
    """One method for each effect on requests; :meth:`perform_all` calls them."""

    def perform_all(self, effects: Iterable[RequestEffect]) -> None:
        """Perform effects, in order."""
        for effect in effects:
            match effect:
                case EnterStep():
                    self.enter_step(effect)
                case Emit():
                    self.emit(effect)
                case Enter():
                    self.enter(effect)
                case Resolve(request, visits):
                    self.resolve(request, visits)
                case Again(request, attempt, reason):
                    self.end_attempt(request, attempt, reason)
                case Reject(request, error):
                    self.reject(request, error)
                case Finish():
                    self.finish(effect)

    @abstractmethod
    def enter(self, enter: Enter) -> None:
        """Begin an attempt: send the request's inputs to the stages that read them."""

    @abstractmethod
    def end_attempt(self, request: int, attempt: int, reason: str) -> None:
        """Drop the outputs received for an attempt; another attempt follows."""

    @abstractmethod
    def resolve(self, request: int, visits: tuple[Visit, ...]) -> None:
        """Answer a request with its tensors."""

    @abstractmethod
    def reject(self, request: int, error: OnnxsplitError) -> None:
        """Answer a request or a sequence with an error."""

    @abstractmethod
    def enter_step(self, step: EnterStep) -> None:
        """Send a step to the stages that begin it."""

    @abstractmethod
    def emit(self, emit: Emit) -> None:
        """Give the caller of a sequence its next token."""

    @abstractmethod
    def finish(self, finish: Finish) -> None:
        """End a sequence; its caller has got all tokens."""


class NodeEffects(ABC):
    """One method for each effect on nodes; :meth:`perform` calls them."""

    def perform(self, effect: ControlEffect) -> CoordinatorEvent | None:
        """Perform an effect; returns the event that answers it, if one does."""
        match effect:
            case Forget(request, attempt, identities):
                self.forget(request, attempt, identities)
            case StartNode(slot, number):
                self.start_node(slot, number)
            case KillNode(number):
                self.kill_node(number)
            case GiveStage(identity, slot):
                self.give_stage(identity, slot)
            case Introduce(identities, meet):
                return self.introduce(identities, meet=meet)
            case ShareMemory(identity, readers):
                self.share_memory(identity, readers)
            case SendAway(identity, reason, fate, again):
                self.send_away(identity, reason, fate, again=again)
            case LinkChanged(story, is_dead):
                self.link_changed(story, is_dead=is_dead)
            case Announce(error):
                self.announce(error)
            case Drained():
                self.drained()
        return None

    @abstractmethod
    def start_node(self, slot: ReplicaKey, number: int) -> None:
        """Start a process for a slot, under a number."""

    @abstractmethod
    def kill_node(self, number: int) -> None:
        """End the process with a number at once."""

    @abstractmethod
    def give_stage(self, identity: bytes, slot: ReplicaKey) -> None:
        """Assign a slot to a node."""

    @abstractmethod
    def introduce(self, identities: tuple[bytes, ...], *, meet: bool) -> Met | None:
        """Tell nodes which processes exist; with ``meet``, also connect to the nodes, and return the event."""

    @abstractmethod
    def send_away(self, identity: bytes, reason: str, fate: Fate, *, again: bool) -> None:
        """Tell a node to stop, and what to do then."""

    @abstractmethod
    def forget(self, request: int, attempt: int, identities: tuple[bytes, ...]) -> None:
        """Tell nodes that an attempt was given up."""

    @abstractmethod
    def announce(self, error: PipelineError | None) -> None:
        """Tell the caller that the pipeline is ready, or why it will never be."""

    @abstractmethod
    def share_memory(self, identity: bytes | None, readers: tuple[int, ...]) -> None:
        """Let a node lend its memory to processes; the coordinator itself where ``identity`` is None."""

    @abstractmethod
    def link_changed(self, story: str, *, is_dead: bool) -> None:
        """Log that a link is dead, or works again."""

    @abstractmethod
    def drained(self) -> None:
        """Tell the caller that no request is in flight, and none will be."""


def carry_out(machine: CoordinatorState, event: CoordinatorEvent, requests: RequestEffects, nodes: NodeEffects) -> None:
    """Pass an event to a machine, and perform all its effects.

    The effects on nodes come first, because requests are sent to the nodes that exist then. Events that answer an
    effect are handled last.
    """
    events = deque([event])
    while events:
        on_requests, on_nodes = machine.handle(events.popleft())
        for effect in on_nodes:
            answer = nodes.perform(effect)
            if answer is not None:
                events.append(answer)
        requests.perform_all(on_requests)


def control_event(identity: bytes, message: object, now_ns: int) -> CoordinatorEvent | None:
    """The event for a message on a node's control link; None for a message that is not an event."""
    match message:
        case Hello():
            return Joined(identity, message, now_ns)
        case Ready(mapped, why_unguided, left_to_cpu):
            return Prepared(identity, mapped, now_ns, why_unguided, left_to_cpu)
        case Refused(reason):
            return Declined(identity, reason, now_ns)
        case Leaving():
            return LeaveWanted(identity, now_ns)
    return None
