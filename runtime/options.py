"""How a plan is to be run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from onnxsplit.errors import InputError, PlanError, shown
from onnxsplit.memory import free_memory_bytes
from onnxsplit.numbers import (
    MOST_ATTEMPTS,
    MOST_BYTES,
    MOST_INFLIGHT,
    MOST_SECONDS,
    MOST_SIZE,
    as_int,
    real_problem,
    whole_problem,
)
from onnxsplit.plan import MOST_NODES, MOST_THREADS, Plan
from runtime.timings import Timings, timings
from runtime.wire.messages.control import POLICIES, Policy

Mode = Literal["sync", "async"]

_ENOUGH_INFLIGHT = 1024
_WHOLE = {  # options that are whole numbers, with the least and the most
    "threads": (1, MOST_THREADS),
    "inflight": (1, MOST_INFLIGHT),
    "inflight_bytes": (1, MOST_BYTES),
    "attempts": (1, MOST_ATTEMPTS),
    "micro_batch": (0, MOST_SIZE),
}
_SHARE_OF_MEMORY = 4  # a quarter of what is free


_FLAGS = ("shared_memory", "elastic", "insecure", "trace", "trace_ops")


def _silent(_ready: int, _total: int) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to run a plan.

    Attributes:
        replicas: nodes of every stage: a number, or stage -> number; the plan's when None.
        mode: ``async`` keeps requests in flight in every stage; ``sync`` lets one in when the one before is out.
        provider: as ``--provider``; the plan's when None.
        threads: threads of every node's session; when None, this host's cores divided by the nodes that are started
            on it, or the plan's number for nodes started by hand.
        inflight: requests in flight at most, micro-batches counted one by one; when None, two a node, and more where
            links are long. ``sync`` has one.
        inflight_bytes: of the tensors of all requests in flight at most; a quarter of the free memory when None.
        micro_batch: rows along the batch axis that run as one; a larger request is split and put together again. The
            plan's own batch size when None; 0 never splits.
        shared_memory: let tensors cross in shared memory where processes share a host.
        share_weights: let the replicas of a stage on this host map one copy of its weights; None does where a stage
            has several.
        balance: how to choose among the replicas of a stage, at each hop: ``completion`` (where it is done first),
            ``resource``, ``task``, ``latency`` or ``round-robin``; see :mod:`runtime.balance.policies`.
        attempts: a request that killed so many nodes is given up; others are tried again as often as it takes. 1:
            nothing is tried again, and inputs are not held.
        timings: when a node counts as failed, and when it is started again.
        elastic: for nodes started by hand: take more of a stage than there are to be, for as long as they stay.
        keys: for nodes started by hand: folder of the keys that protect links by tcp (``onnxsplit keys new``);
            ``~/.config/onnxsplit/keys`` when None, if it is there.
        insecure: for nodes started by hand: plain links may leave this host.
        trace: record when each request was where, for :meth:`~runtime.pipeline.Pipeline.trace`.
        trace_ops: record ONNX Runtime's own profile of every stage too.
        start_timeout: seconds until all nodes must be ready; when None, two minutes for nodes that are started, and
            for ever for nodes started by hand.
        progress: told how many of all nodes are ready, whenever one more is.
        custom_ops: libraries of custom ops that nodes may load, each of which the plan must name: files, or
            ``onnxruntime-extensions``. Not for nodes that are started by hand, or by a launcher that is given: these
            are told of their own.
        abandoned: asked now and then while the nodes start; when it is true, the launch is given up. None never is.
    """

    replicas: int | Mapping[int, int] | None = None
    mode: Mode = "async"
    provider: str | None = None
    threads: int | None = None
    inflight: int | None = None
    inflight_bytes: int | None = None
    micro_batch: int | None = None
    shared_memory: bool = True
    share_weights: bool | None = None
    balance: Policy = "completion"
    attempts: int = 3
    timings: Timings = field(default_factory=Timings)
    elastic: bool = False
    keys: Path | None = None
    insecure: bool = False
    trace: bool = False
    trace_ops: bool = False
    start_timeout: float | None = None
    progress: Callable[[int, int], None] = _silent
    custom_ops: Sequence[str | Path] = ()
    abandoned: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        """Take NumPy's integers for Python's."""
        for name in ("replicas", *_WHOLE):
            object.__setattr__(self, name, as_int(getattr(self, name)))

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            InputError: naming the option, what was found and what is allowed.
        """
        if self.mode not in ("sync", "async"):
            raise InputError(f"mode {shown(self.mode)} is unknown; allowed: sync, async")
        if self.balance not in POLICIES:
            raise InputError(f"balance {shown(self.balance)} is unknown; allowed: {', '.join(POLICIES)}")
        problems = [
            *(
                f"{name} must be True or False, not {shown(getattr(self, name))}"
                for name in _FLAGS
                if not isinstance(getattr(self, name), bool)
            ),
            *(
                f"{name} must be a function, not {shown(getattr(self, name))}"
                for name in ("progress", "abandoned")
                if getattr(self, name) is not None and not callable(getattr(self, name))
            ),
        ]
        shared, given = self.share_weights, self.timings
        if shared not in (None, True, False):
            problems.append(f"share_weights must be True, False or None, not {shown(shared)}")
        if type(given) is not Timings:
            problems.append(f"timings must be runtime.timings.Timings, not {shown(given)}")
        if problems:
            raise InputError("; ".join(problems))
        self._check_numbers()

    def _check_numbers(self) -> None:
        problems = [
            whole_problem(name, getattr(self, name), least, most)
            for name, (least, most) in _WHOLE.items()
            if getattr(self, name) is not None or name == "attempts"
        ]
        if self.start_timeout is not None:
            problems.append(real_problem("start_timeout", self.start_timeout, MOST_SECONDS))
        found = [problem for problem in problems if problem]
        if found:
            raise InputError("; ".join(found))
        timings(asdict(self.timings))

    def counts(self, plan: Plan) -> tuple[int, ...]:
        """The number of nodes of every stage.

        Raises:
            PlanError: replicas of a stage that the plan does not have.
            InputError: a number of replicas that is none, is below one, or makes more nodes than a pipeline can have.
        """
        counts = {stage.index: stage.replicas for stage in plan.stages}
        if isinstance(self.replicas, Mapping):
            unknown = [stage for stage in self.replicas if stage not in counts]
            if unknown:
                raise PlanError(
                    f"replicas for stage {shown(unknown[0])}; the plan has the stages 0 to {len(counts) - 1}"
                )
            counts.update(self.replicas)
        elif self.replicas is not None:
            counts = dict.fromkeys(counts, self.replicas)
        for stage, count in counts.items():
            problem = whole_problem(f"replicas of stage {stage}", count, 1, MOST_NODES)
            if problem:
                raise InputError(problem)
        if sum(counts.values()) > MOST_NODES:
            raise InputError(
                f"the stages have {sum(counts.values())} replicas together; at most {MOST_NODES} nodes make a pipeline"
            )
        return tuple(int(counts[stage]) for stage in sorted(counts))


def enough_inflight(plan: Plan, replicas: Sequence[int]) -> int:
    """Requests in flight that keep all nodes busy: two a node, or half as many again as are under way at full rate.

    Those are throughput times latency (Little's law), as predicted; where links are long, they make up much of it.
    """
    predicted = plan.prediction
    under_way = -(-3 * predicted.latency_ns // (2 * max(1, predicted.bottleneck_ns)))
    return max(2 * max(1, sum(replicas)), min(under_way, _ENOUGH_INFLIGHT))


def memory_for_requests_bytes() -> int:
    """A quarter of the memory this host, or this container, has free, at least 64 MiB."""
    return max(64 << 20, free_memory_bytes() // _SHARE_OF_MEMORY)
