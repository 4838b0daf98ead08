"""The options of cutting a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from onnxsplit.effort import EFFORT_NAMES, EFFORTS, EffortName, TimeBudget
from onnxsplit.errors import PartitionError, shown
from onnxsplit.numbers import MOST_BYTES, MOST_ROUNDS, MOST_SECONDS, as_int, real_problem, whole_problem
from onnxsplit.partitioner import Parallel
from onnxsplit.plan import Objective
from onnxsplit.plan_base import MOST_NODES
from onnxsplit.plan_borders import BorderChoice

Strategy = Literal["layer", "network", "task"]

_MOST_GAP = 10.0
_CHOICES = {
    "strategy": get_args(Strategy),
    "parallel": get_args(Parallel),
    "objective": get_args(Objective),
    "effort": EFFORT_NAMES,
    "border": get_args(BorderChoice),
}

#: The current name of each option that had another name before.
CURRENT_NAMES = {"cut": "also_cut", "keep": "no_cut"}


def by_current_name(options: Mapping[str, Any], note: Callable[[str, str], None]) -> dict[str, Any]:
    """Options by their current names. This version still accepts former names; their values are added.

    Args:
        options: the attributes of :class:`CutOptions`, also by former names.
        note: called with the former and the current name of each former name that has a value.
    """
    current = dict(options)
    for former, name in CURRENT_NAMES.items():
        values = current.pop(former, ())
        if values:
            note(former, name)
            current[name] = [*current.get(name, ()), *values]
    return current


class CutArguments(TypedDict, total=False):
    """The attributes of :class:`CutOptions`, for editors and type checkers."""

    stages: int | Literal["auto"] | None
    devices: int | None
    strategy: Strategy
    tasks: Sequence[Sequence[str]]
    parallel: Parallel
    objective: Objective
    cluster: str | Path | None
    max_memory: int | None
    cut_at: Sequence[str]
    also_cut: Sequence[str]
    no_cut: Sequence[str]
    together: Sequence[str]
    place: Mapping[str, str]
    provider: str
    effort: EffortName
    rounds: int | None
    gap: float
    time_limit: float | None
    border: BorderChoice
    tolerance: float | None


@dataclass(frozen=True, kw_only=True)
class CutOptions:
    """How a model is cut.

    Attributes:
        stages: the number of stages; ``auto`` for the fewest that fit ``max_memory``; None for one on each device (with
            a cluster, as many as help).
        devices: the number of devices of this host, for ``parallel`` data and hybrid; None for the GPUs of this host,
            or 2 without GPUs.
        strategy: ``network`` cuts anywhere, and branches may run in parallel; ``layer`` slices the model's own order;
            ``task`` gives each output, or group of outputs, a part of its own behind a shared backbone.
        tasks: groups of outputs for ``task``; empty for each output by itself.
        parallel: ``model``: one device for each stage; ``data``: the whole model on every device; ``hybrid``: devices
            are divided into stages and replicas.
        objective: the value to minimise: ``throughput`` the time of the slowest stage, ``latency`` the time of one
            request, ``memory`` the largest memory of a stage.
        cluster: path of a cluster file.
        max_memory: the largest estimated memory of a stage in bytes.
        cut_at: tensors to cut at, instead of a search.
        also_cut: tensors that must be cut, besides those that the search chooses.
        no_cut: tensors that must not be cut.
        together: patterns of op names; all ops that match one pattern stay together.
        place: a device of the cluster by pattern of op names; matching ops run on that device only.
        provider: execution provider, as ``--provider`` takes it: one for all stages, ``auto``, or one by stage. A
            cluster names its own.
        effort: how much time the plan may take: ``quick``, ``normal`` or ``thorough``.
        rounds: the largest number of rounds in which the real stages run and the cut is corrected; 0 for none, None for
            that of the effort.
        gap: the search stops when the cut is proven to be within this share of the best one.
        time_limit: the longest time of one search in seconds; None for that of the effort.
        border: the form in which float32 tensors cross between stages: ``float32`` as they are; ``float16`` or
            ``int8`` (8-bit integers with a scale for each block of 64); ``auto`` for the form of each that is fastest
            on its link and keeps the model's outputs within ``tolerance`` on the example inputs.
        tolerance: the largest error that narrower borders may cause, relative to the scale of each output; None for
            0.001.
    """

    stages: int | Literal["auto"] | None = None
    devices: int | None = None
    strategy: Strategy = "network"
    tasks: Sequence[Sequence[str]] = ()
    parallel: Parallel = "model"
    objective: Objective = "throughput"
    cluster: str | Path | None = None
    max_memory: int | None = None
    cut_at: Sequence[str] = ()
    also_cut: Sequence[str] = ()
    no_cut: Sequence[str] = ()
    together: Sequence[str] = ()
    place: Mapping[str, str] = field(default_factory=dict)
    provider: str = "auto"
    effort: EffortName = "normal"
    rounds: int | None = None
    gap: float = 0.0
    time_limit: float | None = None
    border: BorderChoice = "float32"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        """Turn integers of NumPy into Python's."""
        for name in ("stages", "devices", "max_memory", "rounds"):
            object.__setattr__(self, name, as_int(getattr(self, name)))

    @property
    def budget(self) -> TimeBudget:
        """The time that the plan may take."""
        budget = EFFORTS[self.effort]
        return replace(
            budget,
            rounds=budget.rounds if self.rounds is None else self.rounds,
            slow_rounds=budget.slow_rounds if self.rounds is None else self.rounds,
            search_s=budget.search_s if self.time_limit is None else self.time_limit,
        )

    def check(self) -> None:
        """Refuse numbers that are out of range and options that contradict each other.

        Raises:
            PartitionError: names the options, and what is allowed.
        """
        self._check_names()
        self._check_numbers()
        if self.tolerance is not None and self.border == "float32":
            raise PartitionError(
                "--tolerance is for narrow borders; add --border auto, int8 or float16, or leave out --tolerance"
            )
        if self.stages == "auto" and self.max_memory is None:
            raise PartitionError("--stages auto needs a memory limit: add --max-memory SIZE")
        if self.cut_at and (self.stages is not None or self.max_memory is not None or self.cluster is not None):
            raise PartitionError("--cut-at decides the stages; leave out --stages, --max-memory and --cluster")
        if self.cut_at and (self.strategy != "network" or self.parallel != "model" or self.also_cut):
            raise PartitionError("--cut-at decides the cut; leave out --strategy, --parallel and --also-cut")
        if self.devices is not None and self.cluster is not None:
            raise PartitionError("--cluster names the devices; leave out --devices")
        if self.stages == "auto" and (self.cluster is not None or self.parallel != "model"):
            raise PartitionError("--stages auto counts devices that are alike; leave out --cluster and --parallel")
        if self.parallel == "data" and self.stages not in (None, 1):
            raise PartitionError(
                f"--parallel data runs the whole model on every device: one stage, not {self.stages}. Give --devices N"
            )
        if self.devices is not None and self.parallel == "model" and self.stages not in (None, self.devices):
            raise PartitionError(
                f"{self.stages} stages on {self.devices} devices leave some without work; give --parallel hybrid "
                "to run replicas on them"
            )
        if self.tasks and self.strategy != "task":
            raise PartitionError("--task names groups of outputs for --strategy task; add that")
        if self.strategy != "network" and self.parallel != "model":
            raise PartitionError(f"--parallel {self.parallel} needs --strategy network, not {self.strategy}")
        if self.place and self.cluster is None:
            raise PartitionError("--place names a device of a cluster; give --cluster FILE")

    def _check_names(self) -> None:
        """Refuse words that are none of those allowed, and a text where a list of names belongs."""
        for option, allowed in _CHOICES.items():
            value = getattr(self, option)
            if not isinstance(value, str) or value not in allowed:
                raise PartitionError(f"--{option} must be one of {', '.join(allowed)}, not {shown(value)}")
        for option in ("tasks", "cut_at", "also_cut", "no_cut", "together"):
            value = getattr(self, option)
            if isinstance(value, str | bytes) or not isinstance(value, Sequence):
                raise PartitionError(f"{option} must be a list of names, as in ['relu_1'], not {shown(value)}")

    def _check_numbers(self) -> None:
        checks = [
            self.stages not in (None, "auto") and whole_problem("--stages", self.stages, 1, MOST_NODES),
            self.devices is not None and whole_problem("--devices", self.devices, 1, MOST_NODES),
            self.max_memory is not None and whole_problem("--max-memory", self.max_memory, 1, MOST_BYTES),
            self.rounds is not None and whole_problem("--rounds", self.rounds, 0, MOST_ROUNDS),
            real_problem("--gap", self.gap, _MOST_GAP, zero=True),
            self.time_limit is not None and real_problem("--time-limit", self.time_limit, MOST_SECONDS),
            self.tolerance is not None and real_problem("--tolerance", self.tolerance, 1.0),
        ]
        problems = [problem for problem in checks if problem]
        if problems:
            raise PartitionError("; ".join(problems))
