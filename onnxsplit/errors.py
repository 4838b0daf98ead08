"""The errors of the offline half.

    OnnxsplitError
    ├── MissingDependency       an optional package is not installed
    ├── ModelError              a model cannot be read or does not run
    │   └── ModelRefused        ONNX Runtime does not load the model
    │       └── CustomOpsError  a library of custom ops is missing, is another build, or does not load
    ├── InputError              the tensors or numbers that the user gave do not fit the model
    ├── PartitionError          the model cannot be cut as asked
    ├── ClusterError            a cluster file cannot be used
    ├── PlanError               a plan directory cannot be used
    ├── ProviderError           an execution provider is unknown, missing, or does not load
    └── ExportError             a model could not be exported, or the exported model gives other results

Every message names the thing, what was found, what is allowed, and what to do. The command line prints the message
alone and exits with 1. The runtime's errors (:mod:`runtime.errors`) extend this tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class OnnxsplitError(Exception):
    """Base of every error that this project raises on purpose; catch it to catch all of them."""


class MissingDependency(OnnxsplitError):
    """An optional package is needed for what was asked, and it is not installed.

    The user sees it when something needs ONNX Runtime, an exporter needs its framework, or ``--simplify`` needs
    onnxsim. The message names the extra to install.
    """


class ModelError(OnnxsplitError):
    """A model file is missing, damaged or unsafe, or ONNX Runtime cannot run it.

    The user sees it when a model is opened, profiled, exported or verified, and when a stage fails on its inputs.
    """


class ModelRefused(ModelError):
    """ONNX Runtime does not load the model: it lacks the IR version, an opset, an op or a type of the model.

    The user sees it when costs are measured, and when a node starts. ``--costs analytic`` cuts such a model.
    """


class CustomOpsError(ModelRefused):
    """A library of custom ops is missing, is another build than the plan names, or does not load.

    The user sees it when ``--custom-ops`` names a file that cannot be used, or leaves out one that the plan needs.
    """


class InputError(OnnxsplitError):
    """Tensors do not fit the model (names, types, ranks or dimensions), or a file of tensors cannot be read or written.

    The user sees it when ``--inputs``, ``--dim`` or a request is checked. It also reports numbers that are out of
    range.

    Args:
        message: what is wrong.
        option: the name of the option that has a wrong value; empty where it is something else.
    """

    def __init__(self, message: str = "", *, option: str = "") -> None:
        super().__init__(message)
        self.option = option


class PartitionError(OnnxsplitError):
    """The model cannot be cut as asked.

    The user sees it when options contradict each other, when a tensor cannot be cut, when no cut keeps every limit,
    and when the stage files cannot be written.
    """


class ClusterError(OnnxsplitError):
    """A cluster file is missing, is not valid TOML, or contradicts itself, or no device of the cluster can be used.

    The user sees it when ``--cluster`` is read. The message lists every violation.
    """


class PlanError(OnnxsplitError):
    """A plan directory is missing, damaged, incomplete, unsafe, or newer than this version.

    The user sees it when a plan is loaded, served or verified, and when a new plan cannot be written where it should
    go. The message lists every violation.
    """


class ProviderError(OnnxsplitError):
    """An execution provider is unknown, not part of the installed ONNX Runtime, or does not load.

    The user sees it when ``--provider`` is read and when a session is opened. The message says what is missing.
    """


class ExportError(OnnxsplitError):
    """A model could not be exported, or the exported model gives other results than its framework.

    The user sees it only from ``onnxsplit export``.
    """


_CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}, "\ufffd")


def shown(value: object, most: int = 80) -> str:
    """The ``repr`` of a value for a message, at most ``most`` characters long, so that no input makes a message large.

    A value whose ``repr`` fails is shown by its type, such as ``<int>`` for a number of thousands of digits.
    """
    try:
        text = repr(value[: most + 1] if isinstance(value, str | bytes | list | tuple) else value)
    except Exception:  # a repr may raise any error; that of an int with thousands of digits does
        text = f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[:most]}..."


def in_one_line(error: Exception) -> str:
    """The message of an error of this project; for any other error, its type and its message in one line."""
    if isinstance(error, OnnxsplitError):
        return str(error)
    return f"{type(error).__name__}: {one_line(error, 600)}"


def without_controls(text: str) -> str:
    """Text without characters that control a terminal: what a server or a file says may be printed nowhere else."""
    return text.translate(_CONTROLS)


def one_line(error: BaseException, most: int | None = None) -> str:
    """The message of an error in one line, cut after ``most`` characters."""
    return " ".join(str(error).split())[:most]


@contextmanager
def without_panics(failure: Callable[[BaseException], Exception]) -> Iterator[None]:
    """Replace any error of a library that is written in Rust: its panics are not even an ``Exception``.

    Args:
        failure: makes the error that is raised instead.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise failure(error) from error
