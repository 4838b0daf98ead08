"""The part of a plan that says whether the cut pays."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from onnxsplit.plan_base import MOST_NODES, Count, PlanStruct, Rate, Threads


class WayToRun(PlanStruct, frozen=True, kw_only=True):
    """A way to run the model, and how fast it is.

    Attributes:
        kind: ``stages``: the plan; ``session``: the whole model in one ONNX Runtime session, called directly;
            ``replicas``: several nodes with the whole model each.
        count: the number of stages, sessions or replicas.
        threads: threads of each session.
        throughput_per_s: requests per second with many under way.
        latency_ns: time of one request alone.
        source: ``measured``: the sessions were run for it; ``predicted``: from times of other ways.
        fits: False when it needs more memory than the devices have.
    """

    kind: Literal["stages", "session", "replicas"]
    count: Annotated[int, msgspec.Meta(ge=0, le=MOST_NODES)]
    threads: Threads
    throughput_per_s: Rate
    latency_ns: Count
    source: Literal["measured", "predicted"]
    fits: bool = True


class Verdict(PlanStruct, frozen=True, kw_only=True):
    """Whether the cut pays: the plan beside other ways to run the model on the same devices.

    Attributes:
        text: one sentence or two.
        cut_pays: True when no other way that fits in memory is faster by more than 10 %.
        ways: the plan first, then the others.
    """

    text: str
    cut_pays: bool
    ways: tuple[WayToRun, ...]
