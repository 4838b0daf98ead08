"""A stage's session, opened as the plan says, with its outputs written where they are to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxsplit.custom_ops import Library, needed_libraries
from onnxsplit.errors import ModelError, PlanError
from onnxsplit.plan import Plan
from onnxsplit.plan_files import check_file
from onnxsplit.session import open_session
from onnxsplit.tensors import Array, dtype_name
from runtime.memory.outgoing import OutputShapes
from runtime.node.weights import shared_copy
from runtime.wire.messages.control import Assign

_SIGNATURES = 256


class StageRunner:
    """Executes one stage of a plan.

    A shape of an output is *proven* for inputs of some shapes when a run on such inputs gave it. Where a later run
    contradicts (shapes that depend on data), that output is never bound again.

    Args:
        plan: the plan.
        folder: where the stage's files are.
        assign: the stage, and with what to run it.
        home: where to profile into.
        threads: threads of the session; the plan's number when 0.
        custom_ops: libraries of custom ops that this process may load.

    Raises:
        PlanError: the stage's files are not as the plan says.
        CustomOpsError: the stage needs a library that is not among them, or that does not load.
        ModelError, ProviderError, MissingDependency: the session does not open.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        assign: Assign,
        *,
        home: Path,
        threads: int = 0,
        custom_ops: Sequence[Library] = (),
    ) -> None:
        stage = plan.stages[assign.stage]
        libraries = needed_libraries(custom_ops, plan, assign.stage)
        problems = [problem for entry in stage.files for problem in check_file(folder, entry)]
        if problems:
            raise PlanError(f"the plan {folder} was changed: {'; '.join(problems)}. Copy it again")
        packed = shared_copy(folder, stage, libraries) if assign.share_weights and assign.provider == "cpu" else None
        self._session = open_session(
            packed or folder / stage.file,
            threads=threads or assign.threads or stage.threads,
            level="disabled" if packed else stage.optimization_level,
            provider=assign.provider,
            profile_prefix=home / f"profile-{assign.stage}.{assign.replica}" if assign.profile else None,
            custom_ops=libraries,
        )
        self._profiled = assign.profile
        self._inputs = stage.inputs
        self._proven: dict[tuple[tuple[int, ...], ...], OutputShapes] = {}
        self._unbound = {name for name in stage.outputs if name in stage.inputs}

    def close(self) -> None:
        """Write the profile, if there is one."""
        if self._profiled:
            self._session.end_profiling()

    def proven(self, inputs: Mapping[str, Array]) -> OutputShapes:
        """The outputs whose type and shape are proven for inputs of these shapes."""
        return self._proven.get(self._signature(inputs), {})

    def run(self, inputs: Mapping[str, Array], into: Mapping[str, Array]) -> Mapping[str, Array]:
        """Execute the stage once.

        Args:
            inputs: by name.
            into: arrays for outputs that are :meth:`proven`; where one of them is not the array returned, it was not
                written.

        Returns:
            All outputs; ``into`` itself where they are all in it.

        Raises:
            ModelError: ONNX Runtime could not execute it.
        """
        if not self._session.bindable:
            return self._session.run(inputs)
        try:
            outputs = self._session.run_into(inputs, into)
        except ModelError:
            if not into:
                raise
            outputs = self._session.run_into(inputs, {})
            wrong = {name for name, array in into.items() if outputs[name].shape != array.shape}
            self._unbound |= wrong or set(into)
            self._proven.clear()
        if outputs is not into:
            self._learn(inputs, outputs)
        return outputs

    def _learn(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        if len(self._proven) >= _SIGNATURES:
            self._proven.clear()
        self._proven[self._signature(inputs)] = {
            name: (dtype, array.shape)
            for name, array in outputs.items()
            if name not in self._unbound and (dtype := dtype_name(array.dtype)) is not None
        }

    def _signature(self, inputs: Mapping[str, Array]) -> tuple[tuple[int, ...], ...]:
        return tuple(inputs[name].shape for name in self._inputs)
