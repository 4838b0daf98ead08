"""A chain of stages: each stage runs on tensors from the caller and from earlier stages."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from onnxsplit.custom_ops import Library
from onnxsplit.npz import load_npz, save_npz
from onnxsplit.plan import Level
from onnxsplit.tensors import Array
from onnxsplit.timed import TimedModel
from onnxsplit.timed_worker import InPlace


@dataclass(frozen=True)
class StageFile:
    """A stage file and how its session is opened.

    Attributes:
        path: the ONNX file.
        inputs: names of the tensors that the stage reads.
        outputs: names of the tensors that the stage writes.
        threads: threads of the session.
        level: graph optimisation level.
        provider: execution provider.
        custom_ops: libraries of custom ops that the session loads.
        in_place: pairs of an output and the input in whose memory it is written.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    threads: int
    level: Level
    provider: str = "cpu"
    custom_ops: tuple[Library, ...] = ()
    in_place: InPlace = ()

    def timed(self, inputs: Path) -> TimedModel:
        """The stage in a process of its own, with the inputs in an ``.npz`` file."""
        return TimedModel(
            self.path,
            inputs,
            threads=self.threads,
            level=self.level,
            provider=self.provider,
            custom_ops=self.custom_ops,
            in_place=self.in_place,
        )


@dataclass(frozen=True)
class StageOnProvider:
    """How a stage for another provider than the CPU was verified.

    Attributes:
        stage: the number of the stage.
        provider: its provider in the plan.
        ran_on: the provider that it ran on; ``cpu`` if this host lacks that of the plan.
        problem: why this host lacks it; None if it has it.
        left_to_cpu: the ops that its provider left to the CPU: their number by op type.
    """

    stage: int
    provider: str
    ran_on: str
    problem: str | None
    left_to_cpu: Mapping[str, int]


RunStage = Callable[[StageFile, Mapping[str, Array]], Mapping[str, Array]]
"""Runs one stage on its inputs and returns its outputs."""


def run_chain(
    stages: Sequence[StageFile], inputs: Mapping[str, Array], wanted: Collection[str], run_stage: RunStage
) -> dict[str, Array]:
    """Run stages in order, each on inputs of the model and outputs of earlier stages.

    A stage runs only if it writes a wanted tensor or one that a later stage reads. A tensor is dropped after the last
    stage that reads it, unless it is wanted.

    Args:
        stages: the stages in topological order.
        inputs: the inputs of the model.
        wanted: the tensors to return: inputs of the model or outputs of stages.
        run_stage: runs one stage.

    Returns:
        The wanted tensors by name.
    """
    values = dict(inputs)
    for index, stage in enumerate(stages):
        read_later = {name for later in stages[index + 1 :] for name in later.inputs}.union(wanted)
        if not read_later.isdisjoint(stage.outputs):
            values.update(run_stage(stage, {name: values[name] for name in stage.inputs}))
        values = {name: array for name, array in values.items() if name in read_later}
    return {name: values[name] for name in wanted}


class StageProcesses:
    """Runs stages in processes of their own; a context manager and a :data:`RunStage`.

    Args:
        keep: True keeps each stage loaded for its next run; False ends its process after every run, so that one stage
            at a time is in memory.
    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._stack = ExitStack()
        self._scratch = Path()
        self._loaded: dict[StageFile, TimedModel] = {}

    def __enter__(self) -> StageProcesses:
        self._scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxsplit-")))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, stage: StageFile, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run one stage.

        Raises:
            ModelError: the stage does not load, or does not run on these inputs.
        """
        feed = self._scratch / "in.npz"
        save_npz(feed, inputs)
        if not self._keep:
            with stage.timed(feed) as model:
                return self._outputs(model)
        loaded = self._loaded.get(stage)
        if loaded is None:
            loaded = self._loaded[stage] = self._stack.enter_context(stage.timed(feed))
        else:
            loaded.feed(feed)
        return self._outputs(loaded)

    def _outputs(self, model: TimedModel) -> Mapping[str, Array]:
        model.run(0.0)
        file = self._scratch / "out.npz"
        model.save_outputs(file)
        return load_npz(file)
