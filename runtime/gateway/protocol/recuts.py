"""The JSON documents of changes of a model's plan. Pure."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from onnxsplit.numbers import LEAST_SPEED, MOST_SPEED
from runtime.gateway.protocol.documents import described

PlanName = Annotated[str, Meta(min_length=1, max_length=255), described(pattern="^[^/]+$")]


class RecutRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """A request to change the plan of a model. Without a plan, the model is planned anew from what was measured.

    Attributes:
        plan: Name of the new plan's directory, which lies beside that of the present plan on the server.
        devices: For planning anew: the speeds of devices or hosts, relative to when the plan was made. Without any,
            those that were measured.
    """

    plan: PlanName | None = None
    devices: dict[str, Annotated[float, Meta(ge=LEAST_SPEED, le=MOST_SPEED)]] = {}


class RecutSecondsDocument(Struct, frozen=True):
    """How long the steps of a change took, in seconds."""

    planning: float
    loading: float
    warming: float
    draining: float


class RecutDocument(Struct, frozen=True):
    """What became of a change.

    Attributes:
        old: The identity of the plan that ran before.
        new: The identity of the plan that was to replace it; that of the old one where no plan is better.
        kept: Whether the new plan runs now.
        predicted_gain: Throughput of the new plan over that of the old one, as predicted.
        measured_gain: The same as measured; null where too few requests came to tell.
        seconds: How long the steps took.
        why: Why the new plan is kept or not.
    """

    old: str
    new: str
    kept: bool
    predicted_gain: float | None
    measured_gain: float | None
    seconds: RecutSecondsDocument
    why: str


class GenerationDocument(Struct, frozen=True):
    """A plan of a model that has nodes now.

    Attributes:
        generation: 1 for the plan that the model was loaded with, and one more for each plan after it.
        plan: The identity of the plan.
        takes_requests: Whether new requests enter it.
        stages: The number of its stages.
        nodes: The number of its nodes.
        ready: The number of those that are ready.
        in_flight: The number of requests in it.
    """

    generation: int
    plan: str
    takes_requests: bool
    stages: int
    nodes: int
    ready: int
    in_flight: int


class Generations(Struct, frozen=True):
    """The plans of a model, and how its plan was changed.

    Attributes:
        name: The model.
        version: Its version.
        phase: What is being done about the plan: steady, planning, loading, warming, swapped or proving.
        generations: The plans that have nodes.
        recuts: How often a change ended in each way.
        last: What became of the last change; empty before the first.
        advice: What would be gained by another cut, or why nothing is known; empty where that is not watched.
        drift: Time of each device's stages over their usual time; empty where that is not watched.
    """

    name: str
    version: str
    phase: str
    generations: list[GenerationDocument]
    recuts: dict[str, int]
    last: str
    advice: str
    drift: dict[str, float]
