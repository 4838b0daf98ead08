"""JAX: functions of arrays, jitted ones, modules of flax, through jax2onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxsplit.errors import ExportError, MissingDependency, one_line
from onnxsplit.export import finish
from onnxsplit.export.conversion import Conversion, ExportOptions, Recipe
from onnxsplit.export.examples import flat, varied
from onnxsplit.export.sources import Source
from onnxsplit.export.specs import InputSpec, samples
from onnxsplit.tensors import Array, dtype_name

_EXTRA = "pip install 'onnxsplit[jax]'"
_OPSET = 18


def convert(found: Any, source: Source, options: ExportOptions) -> Conversion:
    """A function, or a recipe with one.

    Raises:
        ExportError: what it takes is not known, or it cannot be converted.
        MissingDependency: jax2onnx is not installed.
    """
    try:
        import jax
        import jax2onnx
    except ImportError as error:
        raise MissingDependency(f"exporting from JAX needs {error.name}: {_EXTRA}") from error
    outputs: tuple[str, ...] = ()
    function, specs = found, list(options.inputs)
    bounds: dict[str, Array] = {}
    if isinstance(found, Recipe):
        if nested := flat(found.inputs).keys() - found.inputs.keys():
            raise ExportError(
                f"{source.text}: {min(nested)!r} lies inside an argument, and jax2onnx takes arrays alone; write a "
                "function that takes each array as an argument of its own"
            )
        function, outputs = found.network, found.outputs
        bounds = {name: np.asarray(array) for name, array in found.inputs.items()}
        specs = [
            InputSpec(
                name,
                dtype_name(array.dtype) or "float32",
                tuple(found.dynamic_axes.get(name, {}).get(axis, size) for axis, size in enumerate(array.shape)),
            )
            for name, array in bounds.items()
        ]
    if not specs:
        raise ExportError(
            f"{source.text} does not say what it takes; say it, an --input for each argument: "
            "--input x=float32[batch,8]"
        )
    given = [varied(sample, bounds or sample, seed=number) for number, sample in enumerate(samples(specs))]
    try:
        shown = function(*given[0].values())
    except Exception as error:  # whatever the function raises
        reason = one_line(error, 300)
        raise ExportError(f"{source.text} does not run on the inputs given: {reason}") from error
    leaves = jax.tree_util.tree_leaves(shown)
    names = outputs or _names(shown, len(leaves))

    def write(file: Path) -> None:
        shapes = [jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in specs]
        try:
            proto = jax2onnx.to_onnx(
                function,
                inputs=shapes,
                opset=options.opset or _OPSET,
                model_name=source.name or "model",
                input_names=[spec.name for spec in specs],
                output_names=list(names),
            )
        except Exception as error:  # jax2onnx raises whatever its parts raise
            raise ExportError(f"jax2onnx could not convert the function: {one_line(error, 500)}") from error
        del proto.graph.value_info[:]  # some of it is out of date; shapes are inferred where they are needed
        finish.save(proto, file)

    def reference(sample: Mapping[str, Array]) -> dict[str, Array]:
        found = jax.tree_util.tree_leaves(function(*(sample[spec.name] for spec in specs)))
        return {name: np.asarray(leaf) for name, leaf in zip(names, found, strict=True)}

    return Conversion(
        framework=f"JAX {jax.__version__}",
        write=write,
        samples=given,
        reference=reference,
        axes={spec.name: spec.axes for spec in specs if spec.axes},
    )


def _names(shown: Any, count: int) -> Sequence[str]:
    """The keys of a dictionary, in JAX's order, which is sorted."""
    if isinstance(shown, dict) and len(shown) == count:
        return sorted(shown)
    return ["output"] if count == 1 else [f"output_{number}" for number in range(count)]
