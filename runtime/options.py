"""The options of a run: how a plan is to be run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from onnxsplit.arguments import check_names, option_names
from onnxsplit.cluster import parse_size
from onnxsplit.errors import InputError, shown
from onnxsplit.memory import free_memory_bytes
from onnxsplit.numbers import (
    MOST_ATTEMPTS,
    MOST_BYTES,
    MOST_INFLIGHT,
    MOST_SECONDS,
    MOST_SIZE,
    as_int,
    is_whole,
    real_problem,
    whole_problem,
)
from onnxsplit.plan import Plan
from onnxsplit.plan_base import MOST_NODES, MOST_THREADS
from onnxsplit.plan_decoder import MOST_LENGTH
from runtime.balance.replicas import MOST_SCALE_S, ReplicaRange, Replicas, check_total, replica_ranges
from runtime.timings import Timings, timings
from runtime.wire.messages.control import POLICIES, Policy
from runtime.wire.messages.sequences import MOST_NEW_TOKENS, MOST_ROWS

Mode = Literal["sync", "async"]
Rebalance = Literal["off", "advise", "auto"]

_WAITING_NS = 10_000_000  # time that the requests of each node take together, if its stage is short
_MOST_FOR_A_NODE = 8
_ENOUGH_INFLIGHT = 1024
MOST_PORT = 65535
"""The largest number of a TCP port."""

MOST_REBALANCE_GAIN = 1000.0
"""The largest gain in percent from which a plan can be changed."""

_WHOLE = {  # options that are whole numbers, with their limits
    "threads": (1, MOST_THREADS),
    "inflight": (1, MOST_INFLIGHT),
    "inflight_bytes": (1, MOST_BYTES),
    "attempts": (1, MOST_ATTEMPTS),
    "micro_batch": (0, MOST_SIZE),
    "cache_bytes": (1, MOST_BYTES),
    "max_rows": (1, MOST_ROWS),
    "max_length": (2, MOST_LENGTH),
    "prefill_chunk": (1, MOST_NEW_TOKENS),
    "decode_groups": (1, MOST_ROWS),
}
_ALWAYS = ("attempts", "max_rows", "prefill_chunk")  # whole numbers that are never None
_SHARE_OF_MEMORY = 4  # a quarter of the free memory

_FLAGS = ("shared_memory", "exact_replay", "prefix_reuse", "elastic", "insecure", "trace", "trace_ops")


def _ignore_progress(_ready: int, _total: int) -> None:
    pass


class RunArguments(TypedDict, total=False):
    """The attributes of :class:`RunOptions`, for editors and type checkers."""

    replicas: Replicas
    scale_up_after: float
    scale_down_after: float
    mode: Mode
    provider: str | None
    threads: int | None
    inflight: int | None
    inflight_bytes: int | None
    micro_batch: int | None
    shared_memory: bool
    share_weights: bool | None
    balance: Policy
    attempts: int
    timings: Timings
    elastic: bool
    keys: Path | None
    ports: Sequence[int] | None
    insecure: bool
    trace: bool
    trace_ops: bool
    start_timeout: float | None
    progress: Callable[[int, int], None]
    custom_ops: Sequence[str | Path]
    abandoned: Callable[[], bool] | None
    cache_bytes: int | str | None
    max_rows: int
    max_length: int | None
    prefill_chunk: int
    decode_groups: int | None
    exact_replay: bool
    prefix_reuse: bool
    rebalance: Rebalance
    rebalance_gain: float


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to run a plan.

    Attributes:
        replicas: the number of nodes of every stage, or a number for each stage by its index. When None, the plan's
            numbers. A :class:`~runtime.balance.replicas.ReplicaRange` in place of a number lets the load decide, for
            nodes that are started on this host; see docs/running.md.
        scale_up_after: seconds for which requests must wait before a busy stage with a range gets another node.
        scale_down_after: seconds for which it must have had a node too many before it loses one.
        mode: ``async`` keeps requests in flight in every stage; ``sync`` has one request in the pipeline at a time.
        provider: the execution provider, as for ``--provider``. When None, the plan's.
        threads: threads of every node's session. When None, the cores of this host divided by the nodes that are
            started on it; for nodes that are started by hand, the plan's number.
        inflight: the most requests in flight, where each micro-batch counts. When None, two to eight for each node,
            and more where links are slow. ``sync`` has one.
        inflight_bytes: the most bytes of the tensors of all requests in flight. A quarter of the free memory when None.
        micro_batch: rows along the batch axis that run as one. A larger request is split, and its outputs are joined.
            The plan's batch size when None; 0 never splits.
        shared_memory: send tensors by shared memory between processes of one host.
        share_weights: whether the replicas of a stage on this host map one copy of its weights. When None, they do
            where a stage has several.
        balance: how to choose among the replicas of a stage, at each hop: ``completion`` (the shortest expected
            completion), ``resource``, ``task``, ``latency`` or ``round-robin``; see :mod:`runtime.balance.policies`.
        attempts: a request is refused after this many nodes were lost while they executed it. Attempts that end for
            other reasons are repeated as often as needed. With 1, nothing is repeated, and inputs are not held.
        timings: when a node counts as failed, and when it is started again.
        elastic: for nodes that are started by hand: accept more nodes of a stage than replicas, while they stay.
        keys: for nodes that are started by hand: the folder of the keys that protect links by tcp (``onnxsplit keys
            new``). When None, ``~/.config/onnxsplit/keys`` if it exists.
        ports: for nodes that are started by hand, and an address of tcp: the ports for results and for stage files, for
            firewalls. Any free ports when None.
        insecure: for nodes that are started by hand: whether unencrypted links may leave this host.
        trace: record the stages that each request passes, with times, for :meth:`~runtime.pipeline.Pipeline.trace`.
        trace_ops: also record ONNX Runtime's own profile of every stage.
        start_timeout: seconds in which all nodes must become ready. When None, two minutes for nodes that are started
            by the pipeline, and no limit for nodes that are started by hand.
        progress: called with the number of ready nodes and the number of all nodes whenever the former changes.
        custom_ops: libraries of custom ops that nodes may load, as files or ``onnxruntime-extensions``. The plan must
            name each of them. With nodes that are started by hand, or a launcher of the caller's, give the libraries to
            those instead.
        abandoned: called repeatedly while the nodes start. When it returns True, the launch is abandoned.
        cache_bytes: for a plan with a decoder: the most bytes of key/value caches and other states on each node, as a
            number or as text such as ``2G``. When None, a quarter of the free memory of this host divided by the
            number of nodes.
        max_rows: for a plan with a decoder: the most sequences at once on a chain of nodes.
        max_length: for a plan with a decoder: the most tokens of a sequence, prompt included. When None, the model's,
            or as many as ``cache_bytes`` has room for.
        prefill_chunk: for a plan with a decoder: the most tokens of a prompt that run at once.
        decode_groups: for a plan with a decoder: the number of groups of sequences that are in flight on a chain. When
            None, as many as stages, and one more where sequences of unequal length do not share a run.
        exact_replay: for a plan with a decoder whose scores depend on how tokens are divided into runs, such as models
            with activations of 8 bits: whether a replay repeats the steps of a sequence one by one, so that it goes on
            as if nothing had happened. Otherwise it reads the tokens in parts, which is faster.
        prefix_reuse: for a plan with a decoder whose states can be cut: whether a sequence begins with the states of
            another one whose text begins alike. Slots of sequences that have ended are kept for that, until others
            need the room. The tokens are the same.
        rebalance: whether the speeds of devices are watched: ``advise`` says what another cut of the model would gain
            (:attr:`~runtime.pipeline_control.PipelineControl.recuts`), and ``auto`` changes to it; see docs/recut.md.
        rebalance_gain: the predicted gain in percent from which the plan is changed.
    """

    replicas: Replicas = None
    scale_up_after: float = 3.0
    scale_down_after: float = 30.0
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
    ports: Sequence[int] | None = None
    insecure: bool = False
    trace: bool = False
    trace_ops: bool = False
    start_timeout: float | None = None
    progress: Callable[[int, int], None] = _ignore_progress
    custom_ops: Sequence[str | Path] = ()
    abandoned: Callable[[], bool] | None = None
    cache_bytes: int | str | None = None
    max_rows: int = 16
    max_length: int | None = None
    prefill_chunk: int = 128
    decode_groups: int | None = None
    exact_replay: bool = True
    prefix_reuse: bool = True
    rebalance: Rebalance = "off"
    rebalance_gain: float = 15.0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> RunOptions:
        """The options of a caller, checked.

        Raises:
            InputError: there is no option of one of the names, or one is invalid.
        """
        check_names(options, option_names(cls))
        wanted = cls(**options)
        wanted.check()
        return wanted

    def __post_init__(self) -> None:
        """Convert NumPy's integers to Python's, and sizes as text to bytes."""
        if isinstance(self.cache_bytes, str) and (size := parse_size(self.cache_bytes)) is not None:
            object.__setattr__(self, "cache_bytes", size)
        for name in ("replicas", *_WHOLE):
            object.__setattr__(self, name, as_int(getattr(self, name)))

    def check(self) -> None:
        """Refuse invalid options.

        Raises:
            InputError: it names the option, what was found and what is allowed.
        """
        if self.mode not in ("sync", "async"):
            raise InputError(f"mode {shown(self.mode)} is unknown; allowed: sync, async")
        if self.rebalance not in get_args(Rebalance):
            raise InputError(f"rebalance {shown(self.rebalance)} is unknown; allowed: {', '.join(get_args(Rebalance))}")
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
        if isinstance(self.cache_bytes, str):
            raise InputError(f"cache_bytes {shown(self.cache_bytes)} is not a size; write 512M or 2.5G, or a number")
        problems = [
            whole_problem(name, getattr(self, name), least, most)
            for name, (least, most) in _WHOLE.items()
            if getattr(self, name) is not None or name in _ALWAYS
        ]
        if self.start_timeout is not None:
            problems.append(real_problem("start_timeout", self.start_timeout, MOST_SECONDS))
        problems.append(real_problem("rebalance_gain", self.rebalance_gain, MOST_REBALANCE_GAIN))
        for name in ("scale_up_after", "scale_down_after"):
            problems.append(real_problem(name, getattr(self, name), MOST_SCALE_S))
        if self.ports is not None and not (
            isinstance(self.ports, list | tuple) and len(self.ports) == 2 and self.ports[0] != self.ports[1]
        ):
            problems.append(f"ports must be two different numbers, as in (5556, 5557), not {shown(self.ports)}")
        elif self.ports is not None:
            problems += [whole_problem("ports", port, 1, MOST_PORT) for port in self.ports]
        violations = [problem for problem in problems if problem]
        if violations:
            raise InputError("; ".join(violations))
        timings(asdict(self.timings))

    def ranges(self, plan: Plan) -> tuple[ReplicaRange, ...]:
        """The allowed numbers of nodes of every stage; see :func:`~runtime.balance.replicas.replica_ranges`.

        Raises:
            PlanError, InputError: as for that function.
        """
        return replica_ranges(self.replicas, [stage.replicas for stage in plan.stages])

    def counts(self, plan: Plan) -> tuple[int, ...]:
        """The number of nodes of every stage at the start. Raises as :meth:`ranges`."""
        return tuple(each.least for each in self.ranges(plan))

    def most_counts(self, plan: Plan) -> tuple[int, ...]:
        """The largest number of nodes of every stage. Raises as :meth:`ranges`."""
        return tuple(each.most for each in self.ranges(plan))


def enough_inflight(plan: Plan, replicas: Sequence[int], *, batches: int = 1) -> int:
    """The number of requests in flight that keeps all nodes busy, where one is at most ``batches`` of the plan's.

    It is two for each node, and more where stages are short: then a process that is late for a moment finds work, and
    the caller handles several answers when it wakes up. Where that is more, it is one and a half times the number
    under way at full rate, which is throughput times latency as predicted (Little's law). Slow links make the latency
    long.
    """
    predicted = plan.prediction
    stage_ns = max(1, predicted.bottleneck_ns)
    under_way = -(-3 * predicted.latency_ns // (2 * stage_ns))
    each = min(max(2, -(-_WAITING_NS // (stage_ns * batches))), _MOST_FOR_A_NODE)
    return max(each * max(1, sum(replicas)), min(under_way, _ENOUGH_INFLIGHT))


def memory_for_requests_bytes() -> int:
    """A quarter of the free memory of this host, or of this container; at least 64 MiB."""
    return max(64 << 20, free_memory_bytes() // _SHARE_OF_MEMORY)


def check_scale(ranges: Sequence[ReplicaRange], planned: Sequence[int], stage: object, replicas: object) -> None:
    """Check a stage and its new number of nodes.

    Args:
        ranges: the allowed numbers of nodes of every stage. A fixed number was only that of the start.
        planned: the numbers of nodes that the stages are to have now.
        stage: the index of the stage.
        replicas: its number of nodes.

    Raises:
        InputError: the plan has no such stage, the number is not allowed, or the pipeline would have too many nodes.
    """
    if not is_whole(stage) or not 0 <= stage < len(ranges):
        raise InputError(f"stage {shown(stage)} is unknown; the plan has the stages 0 to {len(ranges) - 1}")
    allowed = ReplicaRange(least=1, most=MOST_NODES) if ranges[stage].is_fixed else ranges[stage]
    if not is_whole(replicas) or not allowed.least <= replicas <= allowed.most:
        raise InputError(f"stage {stage} needs from {allowed.least} to {allowed.most} replicas, not {shown(replicas)}")
    together = [count if each.is_fixed else each.most for each, count in zip(ranges, planned, strict=True)]
    check_total([*together[:stage], replicas, *together[stage + 1 :]])
