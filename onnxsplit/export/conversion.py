"""The types that all converters share: recipes, options and conversions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from onnxsplit.custom_ops import Library, find_libraries
from onnxsplit.export.specs import InputSpec
from onnxsplit.progress import Say, silent
from onnxsplit.tensors import Array

TOLERANCE = 1e-3
"""Largest difference to the framework's output that is accepted, relative to the output's scale."""

Precision = Literal["auto", "4", "8", "float"]
"""How weights are written: in the form nearest to the source's, in blocks of 4 or 8 bits, or as float32."""


@dataclass(frozen=True)
class Recipe:
    """A network and how to call it; a recipe's function returns one.

    Attributes:
        network: a PyTorch module in evaluation mode, or a function of JAX arrays.
        inputs: example inputs by name, in the order of the network's arguments. Free dimensions are larger than 1. An
            argument of a PyTorch module may be a list, a tuple or a dictionary: each tensor in it becomes an input that
            is named after its path, such as ``cache.0.key``.
        outputs: names of the outputs, in the order in which the network returns them.
        dynamic_axes: for each input, the names of its free dimensions by axis; axes of one name have one size.
    """

    network: Any
    inputs: Mapping[str, Any]
    outputs: tuple[str, ...]
    dynamic_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        opset: version of the standard operators; the converter's choice when None.
        inputs: inputs of the model, if the source does not declare them.
        check: compare ONNX Runtime's outputs with the framework's.
        trust: allow the source to run code when it is loaded.
        simplify: simplify the model with onnxsim.
        cache: give decoders their key/value cache as inputs and outputs; without, they only return logits.
        static_cache: give decoders a cache of a fixed size that they write into, instead of one that grows (opset 24).
        weights: how the weights of a GGUF file are written.
        offline: use only files that were fetched before; do not contact the hub.
        parameters: keyword arguments of a recipe's function.
        custom_ops: libraries of custom ops that the model needs, as ``partition`` takes them; comparing loads them.
        say: called with each step.
        scratch: a folder for files that are removed after the export.
    """

    opset: int | None = None
    inputs: Sequence[InputSpec] = ()
    check: bool = True
    trust: bool = False
    simplify: bool = False
    cache: bool = True
    static_cache: bool = False
    weights: Precision = "auto"
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
    """A model that is ready to be written.

    Attributes:
        framework: name and version of the framework, for messages and the model's metadata.
        write: writes the model to a path; a large model gets external data beside it.
        samples: sets of inputs by name to compare on; free dimensions have another size in each set.
        reference: returns the framework's own outputs for a set of inputs, by the ONNX model's names.
        part: name of the part, if the source becomes several models.
        axes: for each tensor, names of free dimensions by axis, which replace those that the converter makes up.
        jumps: share of rows that may differ, since outputs of trees jump at thresholds.
        about: further entries of the model's metadata.
        tolerance: largest difference of the outputs that is accepted, relative to their scale.
        files: files of text that belong beside the model, by name.
        notes: what of the source was not taken over as it was.
    """

    framework: str
    write: Callable[[Path], None]
    samples: Sequence[Mapping[str, Array]]
    reference: Callable[[Mapping[str, Array]], Mapping[str, Array]]
    part: str | None = None
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    jumps: float = 0.0
    about: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = TOLERANCE
    files: Mapping[str, bytes] = field(default_factory=dict)
    notes: Sequence[str] = ()
