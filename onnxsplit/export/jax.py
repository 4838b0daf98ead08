"""JAX: functions of arrays, jitted or not, and modules of flax, exported by jax2onnx."""

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


def convert(given: Any, source: Source, options: ExportOptions) -> Conversion:
    """The conversion of a function of arrays, or of a recipe with one.

    Raises:
        ExportError: the function's inputs are not known, or it cannot be converted.
        MissingDependency: jax2onnx is not installed.
    """
    try:
        import jax
        import jax2onnx
    except ImportError as error:
        raise MissingDependency(f"exporting from JAX needs {error.name}: {_EXTRA}") from error
    outputs: tuple[str, ...] = ()
    function, specs = given, list(options.inputs)
    bounds: dict[str, Array] = {}
    if isinstance(given, Recipe):
        function, outputs = given.network, given.outputs
        specs, bounds = _recipe_inputs(given, source)
    if not specs:
        raise ExportError(
            f"{source.text} does not say which inputs it takes; name each argument with --input, as in "
            "--input x=float32[batch,8]"
        )
    inputs = [varied(sample, bounds or sample, seed=number) for number, sample in enumerate(samples(specs))]
    try:
        results = function(*inputs[0].values())
    except Exception as error:  # the function may raise any error
        reason = one_line(error, 300)
        raise ExportError(f"{source.text} does not run on the inputs given: {reason}") from error
    names = list(outputs or _names(results, len(jax.tree_util.tree_leaves(results))))

    def write(file: Path) -> None:
        try:
            proto = jax2onnx.to_onnx(
                function,
                inputs=[jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in specs],
                opset=options.opset or _OPSET,
                model_name=source.name or "model",
                input_names=[spec.name for spec in specs],
                output_names=names,
            )
        except Exception as error:  # jax2onnx raises errors of any type
            raise ExportError(f"jax2onnx could not convert the function: {one_line(error, 500)}") from error
        del proto.graph.value_info[:]  # some of it is out of date; shapes are inferred where they are needed
        finish.save(proto, file)

    def reference(sample: Mapping[str, Array]) -> dict[str, Array]:
        leaves = jax.tree_util.tree_leaves(function(*(sample[spec.name] for spec in specs)))
        return {name: np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)}

    return Conversion(
        framework=f"JAX {jax.__version__}",
        write=write,
        samples=inputs,
        reference=reference,
        axes={spec.name: spec.axes for spec in specs if spec.axes},
    )


def _recipe_inputs(recipe: Recipe, source: Source) -> tuple[list[InputSpec], dict[str, Array]]:
    """The inputs of a recipe's function, and the example arrays.

    Raises:
        ExportError: an argument is not an array.
    """
    if nested := flat(recipe.inputs).keys() - recipe.inputs.keys():
        raise ExportError(
            f"{source.text}: {min(nested)!r} lies inside an argument, but jax2onnx takes only arrays; write a "
            "function that takes each array as an argument of its own"
        )
    arrays = {name: np.asarray(array) for name, array in recipe.inputs.items()}
    specs = [
        InputSpec(
            name,
            dtype_name(array.dtype) or "float32",
            tuple(recipe.dynamic_axes.get(name, {}).get(axis, size) for axis, size in enumerate(array.shape)),
        )
        for name, array in arrays.items()
    ]
    return specs, arrays


def _names(results: Any, count: int) -> Sequence[str]:
    """Names of the outputs: the keys of a dictionary in JAX's order, which is sorted, or numbers."""
    if isinstance(results, dict) and len(results) == count:
        return sorted(results)
    return ["output"] if count == 1 else [f"output_{number}" for number in range(count)]
