"""The result of planning, which reports and annotated models show."""

from __future__ import annotations

from dataclasses import dataclass

from onnxsplit.partitioner import Partition
from onnxsplit.plan import Plan
from onnxsplit.planning.subject import Subject


@dataclass(frozen=True)
class PlanningResult:
    """A plan together with the model and the costs that it was made from.

    Attributes:
        plan: the plan.
        subject: the model.
        partition: the assignment of atoms to stages.
        op_ns: time of each op on a device of speed 1 in nanoseconds, on which the plan's figures are based.
    """

    plan: Plan
    subject: Subject
    partition: Partition
    op_ns: tuple[int, ...]

    def stage_of_ops(self) -> dict[int, int]:
        """The stage of every op; for an op that is copied into several stages, the first of them."""
        stage_of = {
            op: stage for ops, stage in zip(self.subject.atoms.ops, self.partition.stage_of, strict=True) for op in ops
        }
        graph = self.subject.graph
        for op in sorted(self.subject.atoms.copied, reverse=True):
            readers = [r for name in graph.ops[op].outputs for r in graph.readers.get(name, ()) if r in stage_of]
            if readers:
                stage_of[op] = min(stage_of[reader] for reader in readers)
        return stage_of
