"""Warm-up: requests that a model answers before it counts as ready, so that no client waits for what runs first.

First runs allocate memory, choose kernels and fill caches. Every replica gets its share, because the requests are in
flight together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnxsplit.errors import InputError, OnnxsplitError
from onnxsplit.npz import load_npz
from onnxsplit.plan import Plan
from onnxsplit.plan_files import example_file
from onnxsplit.tensors import Array
from runtime.errors import LaunchFailed
from runtime.pipeline import Pipeline

_REQUEST_S = 600.0  # the most time of one request, among them slow first runs on a GPU
_TEXT_TOKENS = 2  # a prompt's run, and a step


@dataclass(frozen=True)
class Warmup:
    """The warm-up of every model.

    Attributes:
        requests: How many requests with the plan's example inputs; for a plan with a decoder, as many short texts.
        files: Files with inputs by name. Each warms the models whose inputs these are, with as many requests, and with
            at least one.
    """

    requests: int = 0
    files: Mapping[Path, Mapping[str, Array]] = field(default_factory=dict)

    @classmethod
    def read(cls, words: tuple[str, ...]) -> Warmup:
        """The warm-up that the words of ``--warmup`` ask for: numbers, and names of files.

        Raises:
            InputError: A file cannot be read.
        """
        numbers = [int(word) for word in words if word.isdecimal()]
        files = {Path(word): load_npz(Path(word)) for word in words if not word.isdecimal()}
        return cls(max(numbers, default=0), files)

    def check(self, plans: Mapping[str, Plan]) -> None:
        """Refuse files that are the inputs of no model.

        Raises:
            InputError: It names the file, its inputs, and those of the models.
        """
        for file, inputs in self.files.items():
            if not any(_fits(inputs, plan) for plan in plans.values()):
                takes = "; ".join(f"{name} takes {', '.join(plan.inputs)}" for name, plan in plans.items())
                raise InputError(
                    f"--warmup {file} holds {', '.join(inputs)}, which are the inputs of no model: {takes}"
                )

    def run(self, name: str, folder: Path, pipeline: Pipeline) -> int:
        """Send the requests, and wait until all are answered; blocks.

        Args:
            name: The model, for messages.
            folder: Its plan directory.
            pipeline: Its pipeline.

        Returns:
            The number of requests.

        Raises:
            LaunchFailed: A request failed.
        """
        plan, sets = pipeline.plan, [inputs for inputs in self.files.values() if _fits(inputs, pipeline.plan)]
        texts = self.requests if plan.decoder is not None else 0
        if self.requests and not texts and plan.example_inputs is not None:
            sets.append(load_npz(example_file(folder, plan)))
        try:
            for _ in range(texts):
                pipeline.generate([0], max_tokens=_TEXT_TOKENS, timeout=_REQUEST_S).result()
            requests = (inputs for inputs in sets for _ in range(max(1, self.requests)))
            answers = sum(1 for _ in pipeline.map(requests, timeout=_REQUEST_S))
        except OnnxsplitError as error:
            raise LaunchFailed(f"a warm-up request of model {name!r} failed: {error}") from error
        return texts + answers


def _fits(inputs: Mapping[str, Array], plan: Plan) -> bool:
    """Whether a file's tensors are the inputs of a plan, by their names."""
    return set(plan.inputs) - set(plan.defaults) <= set(inputs) <= set(plan.inputs)
