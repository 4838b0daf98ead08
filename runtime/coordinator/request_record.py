"""What the coordinator knows of one unanswered request."""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.wire.messages.data import Visit


@dataclass(slots=True)
class OpenRequest:
    """An unanswered request.

    Attributes:
        wanted: the tensors that the caller gets.
        needed: the stages that must run for them.
        cost: in thousandths of an ordinary request.
        deadline_ns: its deadline; None for no deadline.
        missing: those of the wanted tensors that have not arrived in this attempt.
        attempt: the number of the last attempt; 0 before the first.
        waits: whether it waits for its next attempt.
        view: the view of the pipeline in which the attempt began.
        route: the replicas that the attempt passes.
        blamed: what happened to the nodes that were lost while they executed it.
        begun_ns: when the attempt began.
        visits: the visits of the attempt, by stage.
    """

    wanted: tuple[str, ...]
    needed: frozenset[int]
    cost: int
    deadline_ns: int | None
    missing: set[str]
    attempt: int = 0
    waits: bool = False
    view: int = 0
    route: tuple[int, ...] = ()
    blamed: list[str] = field(default_factory=list)
    begun_ns: int = 0
    visits: dict[int, Visit] = field(default_factory=dict)
