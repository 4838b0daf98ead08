"""A stage's session, opened as the plan says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from onnxsplit.errors import PlanError
from onnxsplit.plan import Plan, check_file, parse_plan, plan_id, read_plan_file
from onnxsplit.session import open_session
from onnxsplit.tensors import Array
from runtime.messages import Assign


class StageRunner:
    """Executes one stage of a plan.

    Args:
        folder: the plan directory.
        assign: the stage, and with what to run it.
        threads: threads of the session; the plan's number when 0.

    Raises:
        PlanError: the folder holds another plan than the assignment's, or the stage's files were changed.
        ModelError, ProviderError, MissingDependency: the session does not open.
    """

    def __init__(self, folder: Path, assign: Assign, *, threads: int = 0) -> None:
        text = read_plan_file(folder)
        if plan_id(text) != assign.plan_id:
            raise PlanError(f"{folder} holds another plan than the coordinator's; copy the coordinator's plan here")
        self.plan: Plan = parse_plan(text, where=folder)
        stage = self.plan.stages[assign.stage]
        problems = [problem for entry in stage.files for problem in check_file(folder, entry)]
        if problems:
            raise PlanError(f"the plan {folder} was changed: {'; '.join(problems)}. Copy it again")
        self._session = open_session(
            folder / stage.file,
            threads=threads or assign.threads or stage.threads,
            level=stage.optimization_level,
            provider=assign.provider,
        )

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Execute the stage once.

        Raises:
            ModelError: ONNX Runtime could not execute it.
        """
        return self._session.run(inputs)
