"""The stages of a decoder's plan in plain ONNX Runtime, one after the other, as if they were one model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from onnxsplit.plan import Plan
from onnxsplit.session import open_session


class StageChain:
    """Takes the place of a session of the whole model. Each stage gets its own states, controls, and what crosses.

    Attributes:
        inputs: the states and controls of the plan.
        crossed: the names and shapes of the tensors that went from stage to stage in the last run.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        assert plan.decoder is not None
        self._plan, self._decoder = plan, plan.decoder
        self._sessions = [open_session(folder / stage.file, threads=1) for stage in plan.stages]
        self.inputs = tuple((name, plan.tensors[name].dtype) for name in plan.inputs)
        self.crossed: dict[str, tuple[int, ...]] = {}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run all stages once; returns the outputs of the model."""
        controls = {control.input for control in self._decoder.controls}
        outputs: dict[str, np.ndarray] = {}
        sent: dict[str, np.ndarray] = {}
        self.crossed = {}
        for stage, session in zip(self._plan.stages, self._sessions, strict=True):
            own = {state.past for state in self._decoder.states if state.stage == stage.index}
            self.crossed |= {name: sent[name].shape for name in stage.inputs if name in sent}
            given = {name: inputs[name] for name in stage.inputs if name in own | controls}
            found = session.run({**given, **{name: sent[name] for name in stage.inputs if name in sent}})
            presents = self._decoder.presents()
            sent |= {name: array for name, array in found.items() if name not in presents}
            outputs |= found
        return outputs
