"""Python code: what a file or module names is run, and what it gives tells the framework."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from onnxsplit.errors import ExportError, MissingDependency, OnnxsplitError, one_line
from onnxsplit.export.conversion import Conversion, ExportOptions, Recipe
from onnxsplit.export.pytorch import EXTRA, of_recipe, recipe_of, require_torch
from onnxsplit.export.sources import Source


def convert(source: Source, options: ExportOptions) -> Sequence[Conversion]:
    """A recipe, a module, a function, or an estimator."""
    return [_from_code(source, options)]


def _from_code(source: Source, options: ExportOptions) -> Conversion:
    found = _made(_loaded(source), source, options)
    if isinstance(found, Recipe) and options.inputs:
        raise ExportError(f"{source.text} says itself what it takes (a Recipe); leave out --input")
    if isinstance(found, Recipe) and not _is_jax(found.network):
        return of_recipe(require_torch(), found, options)
    if _is_jax(found.network if isinstance(found, Recipe) else found):
        from onnxsplit.export import jax

        return jax.convert(found, source, options)
    if _is_a("sklearn.base", "BaseEstimator", found):
        from onnxsplit.export import sklearn

        return sklearn.of_estimator(found, options)
    torch = require_torch()
    if isinstance(found, torch.nn.Module) or callable(found):
        return of_recipe(torch, recipe_of(torch, found, source, options), options)
    raise ExportError(
        f"{source.text} gave a {type(found).__name__}; expected an onnxsplit.export.Recipe, a module of PyTorch, a "
        "function of tensors or JAX arrays, or an estimator of scikit-learn"
    )


def _loaded(source: Source) -> Any:
    """The object that the source names.

    Raises:
        ExportError: there is none.
        MissingDependency: the code needs what is not installed.
    """
    assert source.name is not None
    try:
        if source.path is None:
            module = importlib.import_module(source.text.rpartition(":")[0])
        else:
            if not source.path.is_file():
                raise ExportError(f"no such recipe: {source.path}")
            spec = importlib.util.spec_from_file_location(source.path.stem, source.path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.path.insert(0, str(source.path.resolve().parent))  # recipes import what stands beside them
            try:
                spec.loader.exec_module(module)
            finally:
                sys.path.pop(0)
    except ModuleNotFoundError as error:
        raise MissingDependency(f"{source.text} needs the module {error.name!r}; for PyTorch: {EXTRA}") from error
    except Exception as error:  # whatever the code raises
        raise _broken(source, error) from error
    found = getattr(module, source.name, None)
    if found is None:
        raise ExportError(
            f"{source.text} has no function {source.name!r}; name one with {source.path or 'module'}:FUNCTION"
        )
    return found


def _made(found: Any, source: Source, options: ExportOptions) -> Any:
    """What a function returns that makes a model; the object itself when it is one."""
    makes = inspect.isclass(found) or (
        inspect.isfunction(found) and (options.parameters or source.name == "build" or not _required(found))
    )
    if not makes:
        if options.parameters:
            raise ExportError(f"{source.text} is a {type(found).__name__}, not a function that makes a model: no --set")
        return found
    try:
        made = found(**options.parameters)
    except ModuleNotFoundError as error:
        raise MissingDependency(f"{source.text} needs the module {error.name!r}; for PyTorch: {EXTRA}") from error
    except OnnxsplitError:
        raise
    except Exception as error:  # whatever the code raises
        raise _broken(source, error) from error
    if made is None or isinstance(made, int | float | str):
        raise ExportError(
            f"{source.text} returned a {type(made).__name__}, expected an onnxsplit.export.Recipe or a model"
        )
    return made


def _broken(source: Source, error: Exception) -> ExportError:
    """Code that raises: what, and where."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (place.filename, place.lineno)
    words = error.msg if isinstance(error, SyntaxError) else one_line(error, 300)
    return ExportError(f"{source.text} raises {type(error).__name__} at {where[0]}:{where[1]}: {words}")


def _required(function: Callable[..., Any]) -> list[str]:
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]


def _is_jax(found: Any) -> bool:
    """Whether it is made of JAX: a function whose module has JAX, a jitted one, a module of flax."""
    if "jax" not in sys.modules:
        return False
    origin = type(found).__module__.split(".")[0]
    function = inspect.unwrap(found) if callable(found) else found
    names = {getattr(v, "__name__", "") for v in getattr(function, "__globals__", {}).values() if inspect.ismodule(v)}
    return origin in ("jax", "jaxlib", "flax") or any(name.split(".")[0] in ("jax", "flax") for name in names)


def _is_a(module: str, name: str, found: Any) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(found, kind)
