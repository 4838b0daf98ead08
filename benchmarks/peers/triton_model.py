"""The model that Triton's Python backend loads for a stage; it runs a session on one request after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton
from peer import Plan, Runner


class TritonPythonModel:
    """The stage that the model's configuration names."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the session."""
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.run = Runner(Plan.read(Path(given["plan"])).stages[int(given["stage"])])
        stage = self.run.stage
        self.inputs = [(name, row["name"]) for name, row in zip(stage.inputs, config["input"], strict=True)]
        self.outputs = [(name, row["name"]) for name, row in zip(stage.outputs, config["output"], strict=True)]
        self.scalars = json.loads(given["scalars"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests in turn."""
        return [triton.InferenceResponse(self.answer(request)) for request in requests]

    def answer(self, request: Any) -> list[Any]:
        """Return one request's tensors; tensors of rank 0 arrive with rank 1."""
        tensors = {name: triton.get_input_tensor_by_name(request, alias).as_numpy() for name, alias in self.inputs}
        made = self.run.made({name: a.reshape(()) if name in self.scalars else a for name, a in tensors.items()})
        return [triton.Tensor(alias, np.atleast_1d(made[name])) for name, alias in self.outputs]
