"""What can be asked of a cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from onnxsplit.errors import PartitionError
from onnxsplit.numbers import MOST_BYTES, MOST_ROUNDS, MOST_SECONDS, as_int, real_problem, whole_problem
from onnxsplit.partitioner import Parallel
from onnxsplit.plan import MOST_NODES, Objective

Strategy = Literal["layer", "network", "task"]

_MOST_GAP = 10.0
_CURRENT_NAMES = {"cut": "also_cut", "keep": "no_cut"}


def by_current_name(options: Mapping[str, Any], note: Callable[[str, str], None]) -> dict[str, Any]:
    """Options by their current names. This version still accepts former names; their values are added.

    Args:
        options: the attributes of :class:`CutOptions`, also by former names.
        note: called with the former and the current name of each former name that has a value.
    """
    current = dict(options)
    for former, name in _CURRENT_NAMES.items():
        values = current.pop(former, ())
        if values:
            note(former, name)
            current[name] = [*current.get(name, ()), *values]
    return current


@dataclass(frozen=True, kw_only=True)
class CutOptions:
    """How to cut.

    Attributes:
        stages: number of stages; ``auto`` for the fewest that fit ``max_memory``; as many as devices when None (of a
            cluster, as many as help).
        devices: number of devices of this host, for ``parallel`` data and hybrid; the GPUs found, else 2, when None.
        strategy: ``network`` cuts anywhere, branches may run side by side; ``layer`` slices the model's own order;
            ``task`` gives each output, or group of outputs, a part of its own behind a shared backbone.
        tasks: groups of outputs for ``task``; each output by itself when empty.
        parallel: ``model``: a device a stage; ``data``: the whole model on every device; ``hybrid``: devices are
            divided into stages and replicas.
        objective: what is to be small: the slowest stage, the time of one request, or the largest need of memory.
        cluster: a cluster file.
        max_memory: bytes that no stage may exceed, by estimate.
        cut_at: tensors to cut exactly at, instead of choosing.
        also_cut: tensors that must be cut, wherever else a cut is.
        no_cut: tensors that must not be cut.
        together: patterns of op names; ops that match one stay together.
        place: pattern of op names -> a device of the cluster; matching ops run only there.
        provider: as ``--provider``: one for all, ``auto``, or by stage; a cluster names its own.
        rounds: how often, at most, the real stages are run and the cut is corrected; 0 for never.
        gap: stop searching when the cut is proven to be within this share of the best.
        time_limit: seconds that one search may take.
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
    rounds: int = 3
    gap: float = 0.0
    time_limit: float = 10.0

    def __post_init__(self) -> None:
        """Take NumPy's integers for Python's."""
        for name in ("stages", "devices", "max_memory", "rounds"):
            object.__setattr__(self, name, as_int(getattr(self, name)))

    def check(self) -> None:
        """Refuse numbers out of range and what contradicts itself.

        Raises:
            PartitionError: naming the option, or the contradiction.
        """
        self._check_numbers()
        if self.stages == "auto" and self.max_memory is None:
            raise PartitionError("the fewest stages that fit need a limit: give --max-memory SIZE with --stages auto")
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
            raise PartitionError(f"--parallel {self.parallel} goes with --strategy network, not {self.strategy}")
        if self.place and self.cluster is None:
            raise PartitionError("--place names a device of a cluster; give --cluster FILE")

    def _check_numbers(self) -> None:
        problems = [
            self.stages not in (None, "auto") and whole_problem("--stages", self.stages, 1, MOST_NODES),
            self.devices is not None and whole_problem("--devices", self.devices, 1, MOST_NODES),
            self.max_memory is not None and whole_problem("--max-memory", self.max_memory, 1, MOST_BYTES),
            whole_problem("--rounds", self.rounds, 0, MOST_ROUNDS),
            real_problem("--gap", self.gap, _MOST_GAP, zero=True),
            real_problem("--time-limit", self.time_limit, MOST_SECONDS),
        ]
        found = [problem for problem in problems if problem]
        if found:
            raise PartitionError("; ".join(found))
