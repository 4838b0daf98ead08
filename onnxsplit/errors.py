"""The errors of the offline half.

    OnnxsplitError
    ├── MissingDependency   an optional package is not installed; names the extra
    ├── ModelError          the model file cannot be used
    │   └── ModelRefused    ONNX Runtime will not load it
    │       └── CustomOpsError  a library of custom ops is missing, is another build, or does not load
    ├── InputError          tensors given by the user do not fit the model
    ├── PartitionError      the model cannot be cut as asked
    ├── ClusterError        a cluster file cannot be used
    ├── PlanError           a plan directory cannot be used
    ├── ProviderError       an execution provider is unknown, missing or fails to load
    └── ExportError         a model could not be exported, or came out different

Every message names the thing, what was found, what is allowed and what to do. The command line prints the
message alone and exits with 1. The runtime's errors (``runtime.errors``) extend this tree.
"""

from __future__ import annotations


class OnnxsplitError(Exception):
    """Base of every error this project raises on purpose."""


class MissingDependency(OnnxsplitError):
    """An optional package is needed for what was asked and is not installed."""


class ModelError(OnnxsplitError):
    """A model file is missing, damaged, unsafe or not something ONNX Runtime can run."""


class ModelRefused(ModelError):
    """ONNX Runtime will not load the model: its IR version, an opset, an op or a type is not one it has."""


class CustomOpsError(ModelRefused):
    """A library of custom ops is missing, is another build than the plan's, or does not load."""


class InputError(OnnxsplitError):
    """Tensors do not fit the model: names, types, ranks or dimensions, or a file that cannot be read."""


class PartitionError(OnnxsplitError):
    """The model cannot be cut as asked."""


class ClusterError(OnnxsplitError):
    """A cluster file is missing, is no TOML, or contradicts itself or the model."""


class PlanError(OnnxsplitError):
    """A plan directory is missing, damaged, newer than this version, or unsafe."""


class ProviderError(OnnxsplitError):
    """An execution provider is unknown, not part of the installed ONNX Runtime, or fails to load."""


class ExportError(OnnxsplitError):
    """A model could not be exported, or the exported model gives other results than its framework."""


def shown(value: object, most: int = 80) -> str:
    """A value as a message shows it: its ``repr``, cut where it is long, so that no input can make a message large."""
    try:
        text = repr(value[: most + 1] if isinstance(value, str | bytes | list | tuple) else value)
    except Exception:  # a value's own repr may raise anything; Python's does for numbers of thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[:most]}..."


def in_one_line(error: Exception) -> str:
    """The message of one of our own errors; of any other error, what it says in one line, with its type."""
    if isinstance(error, OnnxsplitError):
        return str(error)
    return f"{type(error).__name__}: {one_line(error, 600)}"


def one_line(error: BaseException, most: int | None = None) -> str:
    """What an error of another library says, in one line of at most so many characters."""
    return " ".join(str(error).split())[:most]
