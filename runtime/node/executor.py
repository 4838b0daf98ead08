"""Executes requests and steps of sequences on a stage's session."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from onnxsplit.custom_ops import Library
from onnxsplit.plan import Plan
from onnxsplit.providers import parse_provider
from onnxsplit.session import Session
from onnxsplit.tensors import Array
from runtime.errors import StageFailed
from runtime.memory.layouts import OutputShapes
from runtime.node.events import OutputsByTarget, Run
from runtime.node.guides import stage_guides
from runtime.node.sequence_runner import SequenceRunner
from runtime.node.stage_runner import StageRunner
from runtime.wire.messages.control import Assign
from runtime.wire.messages.sequences import Drawn


class Executor:
    """Executes one stage of a plan; the arguments are those of :class:`~runtime.node.stage_runner.StageRunner`.

    Raises:
        PlanError, CustomOpsError, ModelError, ProviderError, MissingDependency: as for ``StageRunner``.
        MemoryError: the system cannot reserve the room for the states of sequences; says what to do.
    """

    def __init__(
        self, plan: Plan, folder: Path, assign: Assign, *, home: Path, threads: int, custom_ops: Sequence[Library]
    ) -> None:
        with ThreadPoolExecutor(1) as beside:
            guides = beside.submit(stage_guides, plan, folder, assign.stage)
            self.runner = StageRunner(plan, folder, assign, home=home, threads=threads, custom_ops=custom_ops)
        self._guides = guides.result()
        self._sequences: SequenceRunner | None = None
        self._why_not = _why_no_steps(plan, assign, self.runner.session)
        if not self._why_not:
            session = self.runner.session
            self._sequences = SequenceRunner(
                plan, assign.stage, session, assign.slots, assign.length, guides=self._guides
            )

    def close(self) -> None:
        """Write the profile, if one was asked for."""
        self.runner.close()

    @property
    def runs_steps(self) -> bool:
        """Whether this stage runs steps of sequences."""
        return self._sequences is not None

    @property
    def left_to_cpu(self) -> dict[str, int]:
        """The ops of the stage that its provider left to the CPU: their number by op type."""
        return dict(Counter(kind for _, kind in self.runner.session.left_to_cpu or ()))

    @property
    def why_unguided(self) -> str:
        """Why no sequence can follow a grammar here; empty if it can, and at stages before the last."""
        return self._guides.why_not

    def proven(self, run: Run) -> OutputShapes:
        """Types and shapes of the outputs that :meth:`execute` may write into given arrays."""
        if run.placed is None:
            return self.runner.proven(run.inputs)
        return self._sequences.shapes(run.fragments[0].rows, _names(run.leaving)) if self._sequences is not None else {}

    def execute(self, run: Run, into: Mapping[str, Array]) -> tuple[Mapping[str, Array], tuple[Drawn, ...]]:
        """Execute the stage once.

        Args:
            run: the request or the step.
            into: arrays for the outputs that are :meth:`proven`. An output that is returned as another array was not
                written into them.

        Returns:
            The outputs; for a step, those that leave the node, and the tokens that were chosen.

        Raises:
            ModelError: ONNX Runtime could not execute it, or its scores are no numbers.
            InputError: the rows of a step cannot share a run.
            StageFailed: this stage runs no steps.
        """
        if run.placed is None:
            return self.runner.run(run.inputs, into), ()
        if self._sequences is None:
            raise StageFailed(f"no sequence can run here: {self._why_not}")
        rows = run.fragments[0].rows
        return self._sequences.run(rows, run.placed, run.inputs, into, _names(run.leaving))

    def clear(self, slots: tuple[int, ...]) -> None:
        """Forget the sequences in some slots, and give their memory back to the system."""
        if self._sequences is not None:
            self._sequences.clear(slots)


def _names(targets: OutputsByTarget) -> tuple[str, ...]:
    """The outputs that some target gets."""
    return tuple(dict.fromkeys(name for _, names in targets for name in names))


def _why_no_steps(plan: Plan, assign: Assign, session: Session) -> str:
    """Why a stage runs no steps of sequences; empty if it does."""
    if plan.decoder is None or not assign.slots:
        return "the plan has no decoder, or the node has no slots"
    if parse_provider(assign.provider).name != "CPUExecutionProvider":
        return f"states are kept in the host's memory, and this stage runs on {assign.provider}. Use --provider cpu"
    if not session.bindable:
        return "the stage reads or writes strings or sequences of tensors"
    return ""
