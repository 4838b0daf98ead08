"""Example inputs: different ones are made up until the model runs on them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from onnxsplit.custom_ops import Library
from onnxsplit.errors import InputError, ModelError
from onnxsplit.model.dimensions import bind, with_formulas
from onnxsplit.model.example_inputs import dimension_choices, guesses
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.graph_io import defaults
from onnxsplit.model.in_memory import runnable
from onnxsplit.model.source import SourceModel
from onnxsplit.npz import save_npz
from onnxsplit.plan import TensorSpec
from onnxsplit.tensors import Array
from onnxsplit.timed import TimedModel


@dataclass(frozen=True)
class Example:
    """Inputs that the model ran on, and the sizes of its free dimensions in them."""

    inputs: Mapping[str, Array]
    dims: Mapping[str, int]


class ModelProcess:
    """A whole model in a process of its own, which stays loaded for other inputs; a context manager.

    The model runs at the optimisation level ``basic``.

    Args:
        source: the model.
        threads: threads of the session.
        provider: execution provider.
        custom_ops: libraries of custom ops that the session loads.
    """

    def __init__(
        self, source: SourceModel, *, threads: int, provider: str = "cpu", custom_ops: Sequence[Library] = ()
    ) -> None:
        self._source, self._threads, self._provider, self._custom_ops = source, threads, provider, custom_ops
        self._stack = ExitStack()
        self._feed = Path()
        self._model: TimedModel | None = None

    def __enter__(self) -> ModelProcess:
        self._feed = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxsplit-"))) / "in.npz"
        self._file = self._stack.enter_context(runnable(self._source))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def feed(self, inputs: Mapping[str, Array]) -> None:
        """Take inputs for the next run; the model is loaded with the first ones.

        Raises:
            ModelError: the model does not load, or an input is missing.
        """
        save_npz(self._feed, inputs)
        if self._model is not None:
            self._model.feed(self._feed)
            return
        model = TimedModel(
            self._file.path,
            self._feed,
            threads=self._threads,
            level="basic",
            provider=self._provider,
            data_folder=self._file.data_folder,
            custom_ops=self._custom_ops,
        )
        self._model = self._stack.enter_context(model)

    def run(self) -> None:
        """Run the model once.

        Raises:
            ModelError: the model does not run on its inputs.
        """
        assert self._model is not None
        self._model.run(0.0)


def find_example(
    graph: OpGraph,
    specs: Mapping[str, TensorSpec],
    fixed: Mapping[str, int],
    *,
    threads: int,
    provider: str,
    say: Callable[[str], None],
    custom_ops: Sequence[Library] = (),
) -> Example:
    """Make up inputs until the model runs on them. An input with a default gets its default.

    Args:
        graph: the model.
        specs: types and shapes of its inputs.
        fixed: sizes of free dimensions that are given.
        threads: threads of the session.
        provider: execution provider.
        say: called with the sizes that are tried.
        custom_ops: libraries of custom ops that the model needs.

    Raises:
        InputError: the model ran on none of the inputs; the message carries the first failure.
        ModelError: ONNX Runtime does not load the model.
    """
    failures: list[str] = []
    kept = defaults(graph.source)
    with ModelProcess(graph.source, threads=threads, provider=provider, custom_ops=custom_ops) as model:
        for dims in dimension_choices(specs, fixed):
            say("trying inputs" + (f" with {_dims_text(dims)}" if dims else ""))
            for inputs in guesses(graph, specs, bind(specs, dims), kept):
                model.feed(inputs)
                try:
                    model.run()
                    return Example(inputs, with_formulas(specs, dims))
                except ModelError as error:
                    failures.append(f"with {_dims_text(dims)}: {error}")
    raise InputError(
        f"the model ran on none of {len(failures)} made-up inputs; {failures[0]}. "
        "Give an example with --inputs FILE.npz, or sizes with --dim NAME=N"
    )


def _dims_text(dims: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in dims.items()) or "its fixed dimensions"
