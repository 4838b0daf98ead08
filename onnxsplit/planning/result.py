"""A plan together with what it was made from: what reports and annotations show."""

from __future__ import annotations

from dataclasses import dataclass

from onnxsplit.partitioner import Partition
from onnxsplit.plan import Plan
from onnxsplit.planning.subject import Subject


@dataclass(frozen=True)
class PlanningResult:
    """A cut that was made.

    Attributes:
        plan: it.
        subject: the model.
        partition: atoms to stages.
        op_ns: times of the ops that the plan's figures go by, on a device of speed 1.
    """

    plan: Plan
    subject: Subject
    partition: Partition
    op_ns: tuple[int, ...]

    def stage_of_ops(self) -> dict[int, int]:
        """The stage of every op; of one that is copied, the first that holds it."""
        stage_of = {
            op: stage for ops, stage in zip(self.subject.atoms.ops, self.partition.stage_of, strict=True) for op in ops
        }
        graph = self.subject.graph
        for op in sorted(self.subject.atoms.copied, reverse=True):
            readers = [r for name in graph.ops[op].outputs for r in graph.readers.get(name, ()) if r in stage_of]
            if readers:
                stage_of[op] = min(stage_of[reader] for reader in readers)
        return stage_of
