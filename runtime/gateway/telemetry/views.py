"""The documents that the page gets: the plans once, then the past, and then the state of each second."""

from __future__ import annotations

from msgspec import Struct

from runtime.gateway.models.version import Version
from runtime.gateway.telemetry.history import Point
from runtime.gateway.telemetry.timeline import Timeline


class NodeView(Struct, frozen=True):
    """A node. Counts and times are those of the last minute unless they say otherwise.

    Attributes:
        per_s: Requests per second.
        now_per_s: Requests per second of the last second.
        p99_ns: 99th percentile of the time from arrival to departure; 0 without requests.
        run_ns: Mean time in the session; 0 without requests.
        queue: Outstanding requests now.
        utilisation: Share of the last second in which the session ran.
        output_bytes_per_s: Bytes of outputs per second.
        restarts: Processes that were lost since the model was loaded.
        failures: Requests that could not be executed.
    """

    stage: int
    replica: int
    pid: int | None
    host: str | None
    state: str
    per_s: float
    now_per_s: float
    p99_ns: int
    run_ns: int
    queue: float
    utilisation: float
    output_bytes_per_s: float
    restarts: int
    failures: int


class TextView(Struct, frozen=True):
    """The texts of a model. Rates and medians are those of the last minute; a median without values is 0."""

    running: int
    waiting: int
    tokens_per_s: float
    first_token_ns: int
    gap_ns: int
    cache_bytes: int
    cache_usage: float
    rows_per_step: float
    replays: int


class FailureView(Struct, frozen=True):
    """Requests of the last minute that failed for one reason, and what the caller of the last one was told."""

    count: int
    last: str


class LossView(Struct, frozen=True):
    """The last loss of a node or link: when, in milliseconds since the epoch, and what happened."""

    at_ms: int
    story: str


class RecutView(Struct, frozen=True):
    """How the plan of a model was changed, and what would be gained by another change.

    Attributes:
        phase: What is being done: steady, planning, loading, warming, swapped, proving or ended.
        last: What became of the last change; empty before the first.
        advice: What another cut would gain, or why nothing is known; empty where that is not watched.
    """

    phase: str
    last: str
    advice: str


class ModelView(Struct, frozen=True):
    """A version of a model. Rates and percentiles are those of the last minute.

    Attributes:
        reason: Why it takes no requests; empty when it does.
        per_s: Answered requests per second.
        answered: Answered requests.
        p50_ns: Median of their times; 0 without any.
        p99_ns: 99th percentile of their times; 0 without any.
        last_ms: Time of the last answer, in milliseconds since the epoch; 0 without one.
        failures: Failed requests by reason; only reasons that occurred.
        waiting: Requests that wait for the pipeline now.
        inside: Executions in the pipeline now.
        retries: Attempts that were repeated since the model was loaded.
        losses: Processes of nodes that were lost since the model was loaded.
        loss: The last loss of a node or link.
        now: The last second, as a point of a chart.
        bin: The last ten seconds that are over, as a point of a chart.
        slowest: A number that changes whenever the slowest requests do.
        generation: The number of the plan whose nodes these are; 0 where the model is not loaded.
        recut: Changes of the plan; None where there was none and none is watched for.
    """

    name: str
    version: str
    state: str
    reason: str
    ready: bool
    per_s: float
    answered: int
    p50_ns: int
    p99_ns: int
    last_ms: int
    failures: dict[str, FailureView]
    waiting: int
    inside: int
    retries: int
    losses: int
    loss: LossView | None
    nodes: tuple[NodeView, ...]
    text: TextView | None
    now: Point
    bin: Point | None
    slowest: int
    generation: int
    recut: RecutView | None


class View(Struct, frozen=True):
    """The server at one time. ``astray`` are requests of the last minute for models that are not here."""

    at_ms: int
    ready: bool
    astray: FailureView | None
    models: tuple[ModelView, ...]


class ModelHistory(Struct, frozen=True):
    """The past of a version of a model.

    Attributes:
        minute: A point for each of the last seconds.
        hour: A point for each ten seconds of the last hour.
        nodes: Requests per second of each node in each of the last seconds, by stage and replica as in ``1.0``.
    """

    name: str
    version: str
    minute: tuple[Point, ...]
    hour: tuple[Point, ...]
    nodes: dict[str, tuple[float, ...]]


class ModelSlowest(Struct, frozen=True):
    """The slowest requests of a version of a model in the last minute, the slowest first."""

    name: str
    version: str
    requests: tuple[Timeline, ...]


class StageView(Struct, frozen=True):
    """What does not change of a stage while its plan runs.

    Attributes:
        predicted_ns: Time of a request that the plan predicts.
        replicas: The range within which the load decides about its nodes, as text; empty where their number is fixed.
    """

    index: int
    predicted_ns: int
    replicas: str = ""


class EdgeView(Struct, frozen=True, rename={"source": "from", "target": "to"}):
    """Bytes that one request moves from one stage to another, according to the plan; -1 stands for the caller."""

    source: int
    target: int
    bytes: int


class PlanView(Struct, frozen=True):
    """The part of a version that does not change while a plan of it runs.

    ``estimated`` says that the predictions rest on arithmetic, not on measured times. ``generation`` is the number of
    the plan, as in :class:`ModelView`.
    """

    name: str
    version: str
    generation: int
    estimated: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stages: tuple[StageView, ...]
    edges: tuple[EdgeView, ...]


def plan_view(version: Version) -> PlanView:
    """The plan of a version, for the page."""
    running = version.running
    plan = running.plan if running is not None else version.plan
    replicas = running.coordinator.replicas() if running is not None else ()
    ranges = {s.stage: f"{s.least}–{s.most}" for s in replicas if s.least < s.most}  # noqa: RUF001
    edges: dict[tuple[int, int], int] = {}
    for stage in plan.stages:
        if set(stage.inputs) & set(plan.inputs):
            edges[-1, stage.index] = 0
        if set(stage.outputs) & set(plan.outputs):
            edges[stage.index, -1] = 0
    edges |= plan.edges()
    return PlanView(
        name=version.model,
        version=version.number,
        generation=running.number if running is not None else 0,
        estimated=plan.costs.source == "analytic",
        inputs=plan.inputs,
        outputs=plan.outputs,
        stages=tuple(
            StageView(stage.index, stage.predicted_time_ns, ranges.get(stage.index, "")) for stage in plan.stages
        ),
        edges=tuple(EdgeView(source, target, size) for (source, target), size in edges.items()),
    )
