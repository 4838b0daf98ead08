"""Models of other frameworks to ONNX: one converter a file behind one contract, imported when it is used.

A converter writes the model and returns an :class:`Exported`: what it wrote, and how far ONNX Runtime's outputs are
from the framework's own on the same inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxsplit.errors import ExportError

TOLERANCE = 1e-3
"""Largest difference to the framework that passes, over an output's scale."""


@dataclass(frozen=True)
class Recipe:
    """What a recipe's ``build()`` returns: a network and how to call it.

    Attributes:
        network: the network; for PyTorch a module in evaluation mode.
        inputs: example inputs by name, in the order of the network's arguments.
        outputs: names of the outputs, in the order in which the network returns them.
        dynamic_axes: input -> axis -> name of the free dimension.
    """

    network: Any
    inputs: Mapping[str, Any]
    outputs: tuple[str, ...]
    dynamic_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the model file.
        differences: output -> largest difference to the framework, over the output's scale; empty when not compared.
    """

    path: Path
    differences: Mapping[str, float]


def export(
    source: str, out: str | Path, *, parameters: Mapping[str, Any] | None = None, check: bool = True
) -> Exported:
    """Export a model.

    Args:
        source: ``recipe.py`` or ``recipe.py:NAME``: a Python file with a function (``build`` when no name is given)
            that returns a :class:`Recipe`. It is run, so it must be a file you trust.
        out: the model file to write.
        parameters: keyword arguments of that function.
        check: compare ONNX Runtime's outputs with the framework's.

    Raises:
        ExportError: the source is none of these, the export failed, or the outputs differ.
        MissingDependency: the framework is not installed.
    """
    file, _, name = source.partition(":")
    if not file.endswith(".py"):
        raise ExportError(f"cannot export {source!r}: expected a recipe, FILE.py or FILE.py:FUNCTION")
    from onnxsplit.export.torch_exporter import export_recipe, load_recipe

    recipe = load_recipe(Path(file), name or "build", dict(parameters or {}))
    return export_recipe(recipe, Path(out), check=check)
