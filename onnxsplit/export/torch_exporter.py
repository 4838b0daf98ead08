"""PyTorch modules, through PyTorch's own exporter (the one on ``torch.export``)."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from onnxsplit.errors import ExportError, MissingDependency
from onnxsplit.export import TOLERANCE, Exported, Recipe
from onnxsplit.session import host_cores, open_session
from onnxsplit.verify import distance


def load_recipe(file: Path, name: str, parameters: Mapping[str, Any]) -> Recipe:
    """Run a recipe file's function.

    Raises:
        ExportError: there is no such file or function, or it did not return a recipe.
    """
    if not file.is_file():
        raise ExportError(f"no such recipe: {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"{file} needs the module {error.name!r}; for PyTorch: pip install 'onnxsplit[torch]'"
        ) from error
    build = getattr(module, name, None)
    if not callable(build):
        raise ExportError(f"{file} has no function {name!r}; name one with {file}:FUNCTION")
    try:
        recipe = build(**parameters)
    except TypeError as error:
        raise ExportError(f"{file}:{name}: {error}") from error
    if not isinstance(recipe, Recipe):
        raise ExportError(f"{file}:{name} returned a {type(recipe).__name__}, expected an onnxsplit.export.Recipe")
    return recipe


def export_recipe(recipe: Recipe, out: Path, *, check: bool) -> Exported:
    """Export a recipe's module and compare. The file appears whole or not at all; above 2 GB with external data.

    Raises:
        MissingDependency: PyTorch or its exporter is not installed.
        ExportError: the export failed, or ONNX Runtime's outputs differ by more than the tolerance.
    """
    try:
        import onnxscript  # noqa: F401  PyTorch's exporter needs it
        import torch
    except ModuleNotFoundError as error:
        raise MissingDependency(f"exporting from PyTorch needs {error.name}: pip install 'onnxsplit[torch]'") from error
    torch.set_num_threads(host_cores())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports torchvision missing to those who want none
    network = recipe.network.eval()
    if not out.absolute().parent.is_dir():
        raise ExportError(f"the folder {out.absolute().parent} does not exist; create it or choose another with -o")
    with tempfile.TemporaryDirectory(prefix=".onnxsplit-", dir=out.absolute().parent) as folder:
        file = Path(folder) / out.name
        with torch.no_grad(), warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            try:
                program: Any = torch.onnx.export(
                    network,
                    tuple(recipe.inputs.values()),
                    input_names=list(recipe.inputs),
                    output_names=list(recipe.outputs),
                    dynamic_shapes=_dynamic_shapes(torch, recipe),
                    dynamo=True,
                    verbose=False,
                )
                _keep_names(program, recipe)
                program.save(str(file))
            except Exception as error:  # PyTorch's exporter raises whatever its parts raise
                raise ExportError(f"PyTorch could not export the network: {str(error)[:600]}") from error
        differences = _differences(torch, recipe, file) if check else {}
        far = {name: d for name, d in differences.items() if not d <= TOLERANCE}
        if far:
            listed = ", ".join(f"{name}: {difference:.1e}" for name, difference in far.items())
            raise ExportError(
                f"the exported model differs from PyTorch by more than {TOLERANCE:.0e} of the scale ({listed}); "
                "nothing was written. Export with --no-check to look at it"
            )
        for part in sorted(Path(folder).iterdir(), key=lambda part: part == file):
            part.replace(out.parent / part.name)
    return Exported(out, differences)


def _dynamic_shapes(torch: Any, recipe: Recipe) -> tuple[dict[int, Any] | None, ...] | None:
    if not recipe.dynamic_axes:
        return None
    return tuple(
        dict.fromkeys(recipe.dynamic_axes.get(name, {}), torch.export.Dim.DYNAMIC) or None for name in recipe.inputs
    )


def _keep_names(program: Any, recipe: Recipe) -> None:
    """Give the free dimensions the recipe's names instead of the exporter's (``s77``)."""
    names: dict[str, str] = {}
    for value in program.model.graph.inputs:
        for axis, name in recipe.dynamic_axes.get(value.name, {}).items():
            names[str(value.shape[axis])] = name
    renamed = {value for node in program.model.graph for value in node.outputs}
    for value in (*program.model.graph.inputs, *renamed):
        for axis, dimension in enumerate(value.shape or ()):
            if str(dimension) in names:
                value.shape[axis] = names[str(dimension)]


def _differences(torch: Any, recipe: Recipe, file: Path) -> dict[str, float]:
    with torch.no_grad():
        expected = recipe.network(*recipe.inputs.values())
    expected = expected if isinstance(expected, tuple | list) else (expected,)
    inputs = {name: tensor.numpy() for name, tensor in recipe.inputs.items()}
    found = open_session(file, threads=host_cores()).run(inputs)
    return {name: distance(found[name], tensor.numpy()) for name, tensor in zip(recipe.outputs, expected, strict=True)}
