"""Checks requests against a plan's model: names, types and shapes, defaults, and outputs that no stage computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from onnxsplit.errors import InputError, shown
from onnxsplit.npz import load_npz
from onnxsplit.plan import Plan
from onnxsplit.plan_files import default_files
from onnxsplit.tensors import Array, check_inputs
from runtime.requests.microbatch import batch_axes, split
from runtime.requests.request import OutputSelection

_REMEMBERED = 256  # cached sets of requested outputs


class RequestCheck:
    """The requests that a plan's model accepts.

    Args:
        folder: the plan directory.
        plan: its plan.
        rows: rows along the batch axis that run as one; 0 never splits a request.

    Attributes:
        specs: type and shape of each input of the model.
        required: the inputs of the model without a default.
        former: tensors that an earlier plan of the pipeline has sent between stages.
    """

    def __init__(self, folder: Path, plan: Plan, rows: int) -> None:
        self.specs = {name: (plan.tensors[name].dtype, plan.tensors[name].shape) for name in plan.inputs}
        self.required = tuple(name for name in plan.inputs if name not in plan.defaults)
        self.former: frozenset[str] = frozenset()
        self._plan = plan
        self._rows = rows
        self._constants = {
            name: load_npz(folder / origin.file.name)[name]
            for name, origin in plan.passthrough.items()
            if origin.file is not None
        }
        self._defaults = {name: load_npz(file)[name] for name, file in default_files(folder, plan).items()}
        self._refused = plan.refused_inputs()
        self._selections: dict[tuple[str, ...], OutputSelection] = {}

    def named(self, inputs: object) -> object:
        """A NumPy array alone with its name, if the model has one input; anything else as it is."""
        if type(inputs) is np.ndarray and len(self.required) == 1:
            return {self.required[0]: inputs}
        return inputs

    def check(self, inputs: Mapping[str, Array], outputs: tuple[str, ...] | None = None) -> OutputSelection:
        """Check a request's inputs and outputs, all outputs of the model when None; returns how these are obtained.

        Raises:
            InputError: inputs or names do not fit the model.
        """
        selection = self.select(outputs if outputs is not None else self._plan.outputs)
        check_inputs(inputs, self.specs, selection.optional, refused=self._refused)
        return selection

    def select(self, wanted: tuple[str, ...]) -> OutputSelection:
        """How outputs are obtained, by their names; raises as :meth:`check`. What was found is remembered."""
        return self._selections.get(wanted) or self._select(wanted)

    def _select(self, wanted: tuple[str, ...]) -> OutputSelection:
        plan = self._plan
        stage_tensors = plan.producers()
        unknown = [name for name in wanted if name not in stage_tensors and name not in plan.outputs]
        if unknown or not wanted:
            what = f"output {shown(unknown[0])} is unknown" if unknown else "no output is requested"
            if not self.former.isdisjoint(unknown):
                what += " now: the model was cut elsewhere while it served"
            allowed = dict.fromkeys((*plan.outputs, *stage_tensors))
            raise InputError(f"{what}; allowed: {', '.join(allowed)}")
        read = {name for stage in plan.stages_for(wanted) for name in plan.stages[stage].inputs}
        read |= {o.input for n, o in plan.passthrough.items() if n in wanted and o.input is not None}
        computed = tuple(dict.fromkeys(name for name in wanted if name not in plan.passthrough))
        if len(self._selections) >= _REMEMBERED:
            self._selections.clear()
        selection = self._selections[wanted] = OutputSelection(
            names=wanted,
            computed=computed,
            passed=tuple(name for name in wanted if name in plan.passthrough),
            optional=frozenset(plan.inputs) - (read - plan.defaults.keys()),
            defaults=tuple(name for name in plan.defaults if name in read),
            axes=batch_axes(plan, computed),
        )
        return selection

    def prepare(
        self, inputs: Mapping[str, Array], selection: OutputSelection
    ) -> tuple[list[dict[str, Array]], dict[str, Array]]:
        """Fill in defaults, and split a request that is larger than a micro-batch.

        Returns:
            the inputs of each part, and the outputs that pass through. Without parts, no stage needs to run.
        """
        # That rows are independent was proven with the defaults: with other values they may not be.
        splits = self._rows and selection.axes is not None and self._defaults.keys().isdisjoint(inputs)
        arrays = {**{name: self._defaults[name] for name in selection.defaults}, **inputs}
        ready = {name: self._passed_through(name, arrays) for name in selection.passed}
        if not selection.computed:
            return [], ready
        axes = selection.axes or {}
        parts = split(arrays, axes, self._rows) if splits else [arrays]
        if len(parts) > 1:  # later parts enter after the caller's call has returned
            whole = {name: np.array(array) for name, array in arrays.items() if axes[name] is None}
            parts = [{n: whole[n] if n in whole else np.array(array) for n, array in part.items()} for part in parts]
        return parts, ready

    def _passed_through(self, name: str, inputs: Mapping[str, Array]) -> Array:
        origin = self._plan.passthrough[name]
        return np.array(inputs[origin.input] if origin.input is not None else self._constants[name])
