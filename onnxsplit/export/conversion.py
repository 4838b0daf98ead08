"""What a converter takes and gives: recipes, options and conversions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxsplit.custom_ops import Library, find_libraries
from onnxsplit.export.specs import InputSpec
from onnxsplit.progress import Say, silent
from onnxsplit.tensors import Array

TOLERANCE = 1e-3
"""Largest difference to the framework that passes, over an output's scale."""


@dataclass(frozen=True)
class Recipe:
    """What a recipe's function returns: a network and how to call it.

    Attributes:
        network: the network: a PyTorch module in evaluation mode, or a function of JAX arrays.
        inputs: example inputs by name, in the order of the network's arguments; free dimensions larger than 1. An
            argument of PyTorch may be a list, a tuple or a dictionary; what is in it becomes an input each, named by
            the way to it: ``cache.0.key``.
        outputs: names of the outputs, in the order in which the network returns them.
        dynamic_axes: input -> axis -> name of the free dimension; axes of one name have one size.
    """

    network: Any
    inputs: Mapping[str, Any]
    outputs: tuple[str, ...]
    dynamic_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What can be asked of an export.

    Attributes:
        opset: of the standard operators; the converter's choice when None.
        inputs: what the model takes, where the source does not say.
        check: compare ONNX Runtime's outputs with the framework's.
        trust: let the source run code, where loading it does.
        simplify: have the model simplified (onnxsim).
        cache: decoders take and give their key/value cache; only the logits when False.
        offline: ask no hub; what was fetched before will do.
        parameters: keyword arguments of a recipe's function.
        custom_ops: libraries of custom ops that the model needs, as ``partition`` takes them; comparing loads them.
        say: told what is being done.
        scratch: a folder for what lives as long as the export.
    """

    opset: int | None = None
    inputs: Sequence[InputSpec] = ()
    check: bool = True
    trust: bool = False
    simplify: bool = False
    cache: bool = True
    offline: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)
    custom_ops: object = ()
    say: Say = silent
    scratch: Path = Path()

    @property
    def libraries(self) -> tuple[Library, ...]:
        """The libraries of custom ops.

        Raises:
            CustomOpsError: one cannot be read.
        """
        return find_libraries(self.custom_ops)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A model, ready to be written.

    Attributes:
        framework: name and version, for messages and the model's metadata.
        write: writes the model to a path, large ones with external data beside it.
        samples: inputs to compare on, by name; the sizes of free dimensions differ from one to the next.
        reference: the framework's own outputs for such inputs, by the ONNX model's names.
        part: what of the source it is, where that becomes several models.
        axes: tensor -> axis -> name of the free dimension, where the converter has none, or one of its own making.
        jumps: outputs that may jump at a threshold (trees): up to this share of rows may differ.
        about: more for the model's metadata.
    """

    framework: str
    write: Callable[[Path], None]
    samples: Sequence[Mapping[str, Array]]
    reference: Callable[[Mapping[str, Array]], Mapping[str, Array]]
    part: str | None = None
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    jumps: float = 0.0
    about: Mapping[str, str] = field(default_factory=dict)
