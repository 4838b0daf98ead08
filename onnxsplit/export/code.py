"""Python code: a recipe's function is run, and the type of the returned object determines the framework."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from onnxsplit.errors import ExportError, MissingDependency, OnnxsplitError, one_line
from onnxsplit.export.conversion import Conversion, ExportOptions, Recipe
from onnxsplit.export.pytorch import EXTRA, of_recipe, recipe_of, require_torch
from onnxsplit.export.sources import Source

_MOST_NAMES = 10  # functions of a file in a message


def convert(source: Source, options: ExportOptions) -> Sequence[Conversion]:
    """The conversion of a recipe, module, function or estimator that the source names.

    Raises:
        ExportError: the code fails, or returns something else.
        MissingDependency: the framework or its converter is not installed.
    """
    return [_from_code(source, options)]


def _from_code(source: Source, options: ExportOptions) -> Conversion:
    made = _made(_loaded(source), source, options)
    if isinstance(made, Recipe) and options.inputs:
        raise ExportError(f"{source.text} is a Recipe, which has its own inputs; leave out --input")
    if isinstance(made, Recipe) and not _is_jax(made.network):
        return of_recipe(require_torch(), made, options)
    if _is_jax(made.network if isinstance(made, Recipe) else made):
        from onnxsplit.export import jax

        return jax.convert(made, source, options)
    if _is_a("sklearn.base", "BaseEstimator", made):
        from onnxsplit.export import sklearn

        return sklearn.of_estimator(made, options)
    torch = require_torch()
    if isinstance(made, torch.nn.Module) or callable(made):
        return of_recipe(torch, recipe_of(torch, made, source, options), options)
    raise ExportError(
        f"{source.text} returned a {type(made).__name__}; expected an onnxsplit.export.Recipe, a PyTorch module, a "
        "function of tensors or JAX arrays, or an estimator of scikit-learn"
    )


def _loaded(source: Source) -> Any:
    """The object that the source names.

    Raises:
        ExportError: there is no such object, or the code fails.
        MissingDependency: the code needs a module that is not installed.
    """
    assert source.name is not None
    if source.path is not None and not source.path.is_file():
        raise ExportError(f"no such file: {source.path}")
    try:
        if source.path is None:
            module = importlib.import_module(source.text.rpartition(":")[0])
        else:
            spec = importlib.util.spec_from_file_location(source.path.stem, source.path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.path.insert(0, str(source.path.resolve().parent))  # recipes may import modules beside them
            try:
                spec.loader.exec_module(module)
            finally:
                sys.path.pop(0)
    except ModuleNotFoundError as error:
        raise MissingDependency(f"{source.text} needs the module {error.name!r}; for PyTorch: {EXTRA}") from error
    except Exception as error:  # the code may raise any error
        raise _broken(source, error) from error
    named = getattr(module, source.name, None)
    if named is None:
        raise ExportError(f"{source.text} has no function {source.name!r}; {_others(source, module)}")
    return named


def _others(source: Source, module: ModuleType) -> str:
    """The functions and classes that a module defines, and how to name one, as text."""
    code = str(source.path) if source.path is not None else source.text.rpartition(":")[0]
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    names = [name for name, value in own.items() if inspect.isfunction(value) and not name.startswith("_")]
    names += [name for name, value in own.items() if inspect.isclass(value) and not name.startswith("_")]
    if not names:
        return f"it defines no function. Write one that returns the model, and name it: {code}:FUNCTION"
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    near = get_close_matches(str(source.name), names, n=1) or names
    command = f"onnxsplit export {shlex.quote(f'{code}:{near[0]}')}"
    return f"it has {', '.join(names[:_MOST_NAMES])}{more}. Name one: {command} -o model.onnx"


def _made(named: Any, source: Source, options: ExportOptions) -> Any:
    """The model that a function returns; the object itself when it is already a model."""
    makes = inspect.isclass(named) or (
        inspect.isfunction(named) and (options.parameters or source.name == "build" or not _required(named))
    )
    if not makes:
        if options.parameters:
            raise ExportError(
                f"{source.text} is a {type(named).__name__}, not a function that makes a model; leave out --set"
            )
        return named
    _check_parameters(named, source, options.parameters)
    try:
        made = named(**options.parameters)
    except ModuleNotFoundError as error:
        raise MissingDependency(f"{source.text} needs the module {error.name!r}; for PyTorch: {EXTRA}") from error
    except OnnxsplitError:
        raise
    except Exception as error:  # the code may raise any error
        raise _broken(source, error) from error
    if made is None or isinstance(made, int | float | str):
        raise ExportError(
            f"{source.text} returned a {type(made).__name__}, expected an onnxsplit.export.Recipe or a model"
        )
    return made


def _check_parameters(named: Callable[..., Any], source: Source, given: Mapping[str, Any]) -> None:
    """Check that a function takes what ``--set`` gives.

    Raises:
        ExportError: it does not; the message lists what it takes.
    """
    try:
        inspect.signature(named).bind(**given)
    except TypeError as error:
        takes = ", ".join(inspect.signature(named).parameters) or "no arguments"
        raise ExportError(f"{source.text} cannot be called: {error}; it takes {takes} (--set NAME=VALUE)") from error
    except ValueError:  # a class of C code has no signature
        return


def _broken(source: Source, error: Exception) -> ExportError:
    """An error of a recipe's code, with its type and place."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (place.filename, place.lineno)
    words = error.msg if isinstance(error, SyntaxError) else one_line(error, 300)
    return ExportError(f"{source.text} raises {type(error).__name__} at {where[0]}:{where[1]}: {words}")


def _required(function: Callable[..., Any]) -> list[str]:
    """Names of the positional parameters without a default."""
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]


def _is_jax(given: Any) -> bool:
    """Whether an object is a function whose module imports JAX, a jitted function, or a module of flax."""
    if "jax" not in sys.modules:
        return False
    origin = type(given).__module__.split(".")[0]
    function = inspect.unwrap(given) if callable(given) else given
    names = {getattr(v, "__name__", "") for v in getattr(function, "__globals__", {}).values() if inspect.ismodule(v)}
    return origin in ("jax", "jaxlib", "flax") or any(name.split(".")[0] in ("jax", "flax") for name in names)


def _is_a(module: str, name: str, given: Any) -> bool:
    """Whether an object is an instance of a class, without importing the class."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(given, kind)
