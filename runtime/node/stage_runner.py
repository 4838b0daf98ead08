"""Runs a stage's session, and lets it write its outputs into given arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from onnxsplit.custom_ops import Library, needed_libraries
from onnxsplit.errors import ModelError, PlanError
from onnxsplit.plan import Plan
from onnxsplit.plan_files import check_file
from onnxsplit.session import open_session
from onnxsplit.tensors import Array, dtype_name
from runtime.memory.layouts import OutputShapes
from runtime.node.weights import shared_copy
from runtime.wire.messages.control import Assign

_SIGNATURES = 256  # combinations of input shapes that are remembered


class StageRunner:
    """Executes one stage of a plan.

    The shape of an output is *proven* for certain input shapes when a run on such inputs has returned it. Outputs of
    proven shape are written into given arrays. When a later run contradicts, because the shape depends on data, that
    output is never written into a given array again.

    Args:
        plan: the plan.
        folder: the folder with the stage's files.
        assign: the stage, and how to run it.
        home: the folder for the profile.
        threads: threads of the session; the assigned or the plan's number when 0.
        custom_ops: libraries of custom ops that this process may load.

    Attributes:
        session: the stage's session.

    Raises:
        PlanError: the stage's files differ from the plan, or have other inputs and outputs than it says.
        CustomOpsError: the stage needs a library that is not among them, or that cannot be loaded.
        ModelError, ProviderError, MissingDependency: the session cannot be opened.
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
        self.session = open_session(
            packed or folder / stage.file,
            threads=threads or assign.threads or stage.threads,
            level="disabled" if packed else stage.optimization_level,
            provider=assign.provider,
            profile_prefix=home / f"profile-{assign.stage}.{assign.replica}" if assign.profile else None,
            custom_ops=libraries,
        )
        told = {name: plan.tensors[name].dtype for name in (*stage.inputs, *stage.outputs) if name in plan.tensors}
        _check_types(f"stage {assign.stage} of the plan {folder}", (*self.session.inputs, *self.session.outputs), told)
        self._profiled = assign.profile
        self._inputs = stage.inputs
        self._proven: dict[tuple[tuple[int, ...], ...], OutputShapes] = {}
        self._unbound = {name for name in stage.outputs if name in stage.inputs}

    def close(self) -> None:
        """Write the profile, if one was asked for."""
        if self._profiled:
            self.session.end_profiling()

    def proven(self, inputs: Mapping[str, Array]) -> OutputShapes:
        """Types and shapes of the outputs that are proven for inputs of these shapes."""
        return self._proven.get(self._signature(inputs), {})

    def run(self, inputs: Mapping[str, Array], into: Mapping[str, Array]) -> Mapping[str, Array]:
        """Execute the stage once.

        Args:
            inputs: the inputs by name.
            into: arrays to write outputs into that are :meth:`proven`. An output that is returned as another array was
                not written into them.

        Returns:
            All outputs by name; ``into`` itself when it holds all of them.

        Raises:
            ModelError: ONNX Runtime could not execute it.
        """
        if not self.session.bindable:
            return self.session.run(inputs)
        try:
            outputs = self.session.run_into(inputs, into)
        except ModelError:
            if not into:
                raise
            outputs = self.session.run_into(inputs, {})
            wrong = {name for name, array in into.items() if outputs[name].shape != array.shape}
            self._unbound |= wrong or set(into)
            self._proven.clear()
        if outputs is not into:
            self._learn(inputs, outputs)
        return outputs

    def bound(self, inputs: Mapping[str, Array], into: Mapping[str, Array]) -> Callable[[], None]:
        """A run of the stage on these arrays, for a session that is ``binds_once``; ``into`` holds all outputs.

        See :meth:`.Session.bound`.
        """
        return self.session.bound(inputs, into)

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


def _check_types(stage: str, ends: Iterable[tuple[str, str | None]], told: Mapping[str, str]) -> None:
    """Refuse a stage with other types than the plan says: arrays of these would be read beyond their ends."""
    for name, kind in ends:
        if kind is not None and told.get(name, kind) != kind:
            raise PlanError(
                f"{stage} has {name!r} of the type {kind}, and plan.json says {told[name]}; partition the model again"
            )
