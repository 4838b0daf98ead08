"""PyTorch: recipes, modules and saved programs, by PyTorch's own exporter, which is based on ``torch.export``."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from onnxsplit.errors import ExportError, MissingDependency
from onnxsplit.export.conversion import Conversion, ExportOptions, Recipe
from onnxsplit.export.examples import flat, mapped, resized, varied
from onnxsplit.export.sources import Source, refuse_code
from onnxsplit.export.specs import samples
from onnxsplit.session import host_cores
from onnxsplit.tensors import Array

EXTRA = "pip install 'onnxsplit[torch]'"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def convert(source: Source, options: ExportOptions) -> Sequence[Conversion]:
    """The conversion of a saved program or a saved module.

    Raises:
        ExportError: the source is not trusted, or cannot be loaded or exported.
        MissingDependency: PyTorch or onnxscript is not installed.
    """
    torch = require_torch()
    if source.kind == "exported-program":
        why = "loading it unpickles and evaluates its content (PyTorch warns of that, too)"
        refuse_code(source, why, trust=options.trust)
        return [_from_program(torch, source, options)]
    refuse_code(source, "loading it runs code that it contains", trust=options.trust)
    return [_from_module(torch, source, options)]


def require_torch() -> Any:
    """Import PyTorch and what its exporter needs.

    Raises:
        MissingDependency: PyTorch or onnxscript is not installed.
    """
    try:
        import onnxscript  # noqa: F401  PyTorch's exporter needs it
        import torch
    except ModuleNotFoundError as error:
        raise MissingDependency(f"exporting from PyTorch needs {error.name}: {EXTRA}") from error
    torch.set_num_threads(host_cores())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of a missing torchvision, which is not needed
    return torch


def recipe_of(torch: Any, network: Any, source: Source, options: ExportOptions) -> Recipe:
    """Make a recipe from a module or function, and the inputs that the user named.

    Raises:
        ExportError: no inputs were named, or the network does not run on them.
    """
    if not options.inputs:
        raise ExportError(
            f"{source.text} does not say which inputs it takes; name each argument with --input, as in "
            "--input x=float32[batch,3,224,224]"
        )
    if not isinstance(network, torch.nn.Module):
        network = _Function(torch, network)
    first = next(samples(options.inputs))
    try:
        inputs = {name: torch.from_numpy(array) for name, array in first.items()}
    except TypeError as error:
        raise ExportError(f"PyTorch cannot make such inputs from arrays: {str(error).partition('.')[0]}") from error
    network = network.eval()
    with torch.no_grad():
        try:
            given = network(*inputs.values())
        except Exception as error:  # the network may raise any error
            raise ExportError(f"{source.text} does not run on the inputs given: {str(error)[:300]}") from error
    return Recipe(
        network=network,
        inputs=inputs,
        outputs=_names(given),
        dynamic_axes={spec.name: spec.axes for spec in options.inputs if spec.axes},
    )


def _names(given: Any) -> tuple[str, ...]:
    if isinstance(given, dict):
        return tuple(given)
    count = len(given) if isinstance(given, tuple | list) else 1
    return ("output",) if count == 1 else tuple(f"output_{number}" for number in range(count))


def _Function(torch: Any, function: Callable[..., Any]) -> Any:  # noqa: N802  named like a class
    """A module that calls a function."""

    class Function(torch.nn.Module):  # type: ignore[misc]
        def forward(self, *arguments: Any) -> Any:
            return function(*arguments)

    return Function()


# Export by PyTorch's exporter


def of_recipe(
    torch: Any, recipe: Recipe, options: ExportOptions, *, write: Callable[[Path], None] | None = None
) -> Conversion:
    """The conversion of a recipe's module.

    Args:
        torch: PyTorch.
        recipe: the module and how to call it.
        options: options of the export.
        write: writes the model to a path; PyTorch's exporter does when None.

    Raises:
        ExportError: an example input is not a tensor.
    """
    network = recipe.network.eval()
    inputs = _own(torch, recipe.inputs)
    first = {name: tensor.numpy() for name, tensor in flat(inputs).items()}
    reference = answers(torch, network, inputs, recipe.outputs)

    write = write or program_writer(
        torch,
        network,
        tuple(inputs.values()),
        opset=options.opset,
        input_names=list(first),
        output_names=list(recipe.outputs),
        dynamic_shapes=_dynamic_shapes(network, recipe),
    )
    return Conversion(
        framework=f"PyTorch {torch.__version__}",
        write=write,
        samples=_samples(first, recipe.dynamic_axes, reference) if options.check else (first,),
        reference=reference,
        axes=recipe.dynamic_axes,
    )


def _own(torch: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the inputs: PyTorch's exporter would take a tensor that occurs twice for one input.

    Raises:
        ExportError: something is not a tensor.
    """

    def own(name: str, leaf: Any) -> Any:
        try:
            return torch.as_tensor(leaf).detach().clone(memory_format=torch.contiguous_format)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ExportError(
                f"the example input {name!r} is a {type(leaf).__name__}; expected a tensor, or a list, tuple or "
                "dictionary of tensors. Constants belong in the network"
            ) from error

    return mapped(inputs, own)


def _samples(
    first: Mapping[str, Array],
    axes: Mapping[str, Mapping[int, str]],
    reference: Callable[[Mapping[str, Array]], Mapping[str, Array]],
) -> Sequence[Mapping[str, Array]]:
    """The given examples, then random ones with other sizes of free dimensions."""
    other = resized(first, axes)
    random = varied(other, bounds=first)
    try:
        reference(random)
    except Exception:  # a network may require more than bounds, and may raise any error
        return first, other
    return first, random


def answers(
    torch: Any, network: Callable[..., Any], inputs: Mapping[str, Any], outputs: Iterable[str]
) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """A function that returns PyTorch's own outputs by name, for inputs by name.

    It passes copies of the inputs, since a network may overwrite its arguments.

    Args:
        torch: PyTorch.
        network: the network to call.
        inputs: examples of its arguments, in order; only their structure is used.
        outputs: names of the outputs.
    """

    def reference(sample: Mapping[str, Array]) -> dict[str, Array]:
        arguments = mapped(inputs, lambda name, _: torch.from_numpy(sample[name].copy()))
        with torch.no_grad():
            results = network(*arguments.values())
        return dict(zip(outputs, (tensor.numpy() for tensor in _flat(results)), strict=True))

    return reference


def _flat(results: Any) -> list[Any]:
    """The tensors that a network returned, in order."""
    if isinstance(results, dict):
        return [tensor for value in results.values() for tensor in _flat(value)]
    if isinstance(results, tuple | list):
        return [tensor for value in results for tensor in _flat(value)]
    return [results]


def program_writer(
    torch: Any, network: Any, arguments: tuple[Any, ...], *, opset: int | None, **words: Any
) -> Callable[[Path], None]:
    """A function that exports a network with PyTorch's exporter and writes it to a file.

    It raises ExportError when the network cannot be exported; the message names the operator and its place.

    Args:
        torch: PyTorch.
        network: a module, or a saved program.
        arguments: example arguments of a module; none for a program, which has its own.
        opset: version of the standard operators; the exporter's choice when None.
        words: further arguments of ``torch.onnx.export``.
    """
    arguments = arguments and (*arguments, {})  # PyTorch takes a dictionary at the end for arguments by keyword

    def write(file: Path) -> None:
        with torch.no_grad(), _silence():
            try:
                program = torch.onnx.export(
                    network, arguments, dynamo=True, verbose=False, opset_version=opset, **words
                )
            except Exception as error:  # PyTorch's exporter raises errors of any type
                raise ExportError(f"PyTorch could not export the network: {_reason(error)}") from error
        program.save(str(file))

    return write


@contextmanager
def _silence() -> Iterator[None]:
    """Keep PyTorch from printing and logging, which it does at length before it raises an error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    """The message of the first cause, with the place in the model if it is known."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    texts = [" ".join(_COLOURS.sub("", str(one)).split()) for one in chain if str(one).strip()] or [
        type(error).__name__
    ]
    where = next(
        (text.partition(". See the stack")[0] for text in texts if text.startswith("Error when translating")), ""
    )
    return f"{texts[-1][:500]} {where[:300]}".strip()


def _dynamic_shapes(network: Any, recipe: Recipe) -> tuple[Any, ...] | None:
    """Free dimensions by argument, as PyTorch's exporter takes them; those of ``*arguments`` are one tuple."""
    if not recipe.dynamic_axes:
        return None
    named = mapped(recipe.inputs, lambda name, _: dict(recipe.dynamic_axes.get(name, {})) or None)
    shapes = list(named.values())
    parameters = list(inspect.signature(network.forward).parameters.values())
    many = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_POSITIONAL), None)
    return tuple(shapes) if many is None else (*shapes[:many], tuple(shapes[many:]))


# Saved by PyTorch


def _from_program(torch: Any, source: Source, options: ExportOptions) -> Conversion:
    try:
        program = torch.export.load(source.path)
    except Exception as error:  # PyTorch raises errors of any type
        raise ExportError(f"PyTorch cannot load {source.text}: {str(error)[:300]}") from error
    module, inputs_of = program.module(), torch.utils._pytree.tree_unflatten

    def network(*tensors: Any) -> Any:
        arguments, words = inputs_of(list(tensors), program.call_spec.in_spec)
        return module(*arguments, **words)

    inputs, free = _placeholders(program)
    given = _examples(torch, program, inputs)
    with torch.no_grad():
        outputs = _names(network(*given.values()))

    names = {"input_names": list(inputs), "output_names": list(outputs)}
    write = program_writer(torch, program, (), opset=options.opset, **names)
    reference = answers(torch, network, inputs, outputs)
    first = {name: tensor.numpy() for name, tensor in given.items()}
    return Conversion(
        framework=f"PyTorch {torch.__version__}",
        write=write,
        samples=_samples(first, {}, reference) if options.check else (first,),
        reference=reference,
        axes=free | {name: {0: "batch"} for name in outputs if any(0 in axes for axes in free.values())},
    )


def _placeholders(program: Any) -> tuple[dict[str, Any], dict[str, dict[int, str]]]:
    """The user's inputs of a program by name, as fake tensors, and names for their free dimensions.

    A saved program does not keep names of dimensions: the first axis is called ``batch``, others INPUT_AXIS.
    """
    wanted = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"}
    inputs = {node.name: node.meta["val"] for node in program.graph.nodes if node.name in wanted and "val" in node.meta}
    free = {
        name: {
            axis: "batch" if axis == 0 else f"{name}_{axis}"
            for axis, size in enumerate(value.shape)
            if not isinstance(size, int)
        }
        for name, value in inputs.items()
    }
    return inputs, {name: axes for name, axes in free.items() if axes}


def _examples(torch: Any, program: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that the program was saved with, or made-up ones: floats are random, integers are zero."""
    saved = torch.utils._pytree.tree_leaves(program.example_inputs)
    if len(saved) == len(inputs) and all(torch.is_tensor(leaf) for leaf in saved):
        return _own(torch, dict(zip(inputs, saved, strict=True)))
    return {name: _example(torch, value) for name, value in inputs.items()}


def _example(torch: Any, value: Any) -> Any:
    sizes = [size if isinstance(size, int) else 3 for size in value.shape]
    if value.dtype.is_floating_point:
        return torch.randn(sizes, dtype=value.dtype)
    return torch.zeros(sizes, dtype=value.dtype)


def _from_module(torch: Any, source: Source, options: ExportOptions) -> Conversion:
    """The conversion of TorchScript or of a pickled module; both run code when they are loaded."""
    assert source.path is not None
    try:
        with zipfile.ZipFile(source.path) as archive:
            scripted = any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        scripted = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            network = (
                torch.jit.load(source.path)
                if scripted
                else torch.load(source.path, weights_only=False, map_location="cpu")
            )
        except Exception as error:  # PyTorch raises errors of any type
            raise ExportError(f"PyTorch cannot load {source.text}: {str(error)[:300]}") from error
    if isinstance(network, Mapping):
        raise ExportError(
            f"{source.text} holds weights without a network; write a recipe that loads them into their network"
        )
    if not isinstance(network, torch.nn.Module):
        raise ExportError(f"{source.text} holds a {type(network).__name__}, expected a PyTorch module")
    recipe = recipe_of(torch, network, source, options)
    if not scripted:
        return of_recipe(torch, recipe, options)
    return _from_script(torch, recipe, options)


def _from_script(torch: Any, recipe: Recipe, options: ExportOptions) -> Conversion:
    """The conversion of TorchScript, by the older exporter: the newer one needs Python code."""

    def write(file: Path) -> None:
        axes = {name: dict(axes) for name, axes in recipe.dynamic_axes.items()}
        first = {0: "batch"} if any(0 in one for one in axes.values()) else {}
        with torch.no_grad(), _silence():
            try:
                torch.onnx.export(
                    recipe.network,
                    tuple(recipe.inputs.values()),
                    str(file),
                    dynamo=False,
                    opset_version=options.opset or 18,
                    input_names=list(recipe.inputs),
                    output_names=list(recipe.outputs),
                    dynamic_axes=axes | {name: first for name in recipe.outputs if first},
                )
            except Exception as error:  # as above
                raise ExportError(f"PyTorch could not export the network: {_reason(error)}") from error

    return of_recipe(torch, recipe, options, write=write)
