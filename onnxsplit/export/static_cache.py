"""Decoders of ``transformers`` whose cache has a fixed size: TensorScatter writes the new positions into it (opset 24).

    input_ids      [batch, sequence]                the new tokens
    write_indices  [batch]                          the length of each row before the step
    past_key_values.N.key, .value  [batch, heads, capacity, width of a head]
    -> logits, and present.N.key, .value of the same shape as the past

Rows may have different lengths. A runtime may give one buffer to past and present: then a step copies nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from onnxsplit.errors import ExportError
from onnxsplit.export.decoder_cache import argument

OPSET = 24
"""The first version of the standard operators with TensorScatter."""


def check(model: Any, opset: int | None) -> None:
    """Check that a decoder can have such a cache.

    Raises:
        ExportError: the opset has no TensorScatter, or the network needs another mask or other positions.
    """
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    without = "leave --static-cache out"
    if opset is not None and opset < OPSET:
        raise ExportError(f"--static-cache needs --opset {OPSET} or later; {opset} was given")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ExportError(f"{name} takes no position_ids, which a cache of a fixed size needs; {without}")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or (not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None)):
        found = ", ".join(sorted(kinds)) or "sliding_attention"
        raise ExportError(f"{name} has layers of the kind {found}, whose cache does not keep all positions; {without}")


def network(torch: Any, model: Any) -> Any:
    """The module to export: takes ``input_ids``, ``write_indices`` and the cache's tensors, layer by layer."""
    from transformers.cache_utils import DynamicCache

    write = _scatter(torch)

    def buffers(past: tuple[Any, ...], start: Any) -> Any:
        """A cache whose update writes into its tensors instead of making them longer."""
        made: Any = DynamicCache([(past[i], past[i + 1]) for i in range(0, len(past), 2)])

        def update(keys: Any, values: Any, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
            held = made.layers[layer]
            held.keys, held.values = write(held.keys, keys, start), write(held.values, values, start)
            return held.keys, held.values

        made.update = update
        return made

    class Decoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, write_indices: Any, *past: Any) -> Any:
            places = write_indices[:, None] + torch.arange(input_ids.shape[1])
            mask = torch.arange(past[0].shape[2]) <= places[:, None, :, None]
            held = buffers(past, write_indices)
            words = {"attention_mask": mask, "position_ids": places, argument(model): held}
            logits = self.model(input_ids, use_cache=True, return_dict=True, **words).logits
            return (logits, *(tensor for layer in held.layers for tensor in (layer.keys, layer.values)))

    return Decoder()


@cache
def _scatter(torch: Any) -> Any:
    """TensorScatter as an operator of PyTorch: writes ``update`` into a copy of ``buffer``, from ``start``."""

    def write(buffer: Any, update: Any, start: Any) -> Any:
        written = buffer.clone()
        for row, first in enumerate(start.tolist()):
            written[row, :, first : first + update.shape[2]] = update[row]
        return written

    operator = torch.library.custom_op(
        "onnxsplit::tensor_scatter",
        write,
        mutates_args=(),
        schema="(Tensor buffer, Tensor update, Tensor start) -> Tensor",
    )
    operator.register_fake(lambda buffer, update, start: torch.empty_like(buffer))  # noqa: ARG005  named by the schema
    return operator


def translations(torch: Any) -> Mapping[Any, Any]:
    """How PyTorch's exporter writes the operator."""
    from onnxscript.values import Opset

    operators = Opset("", OPSET)

    def tensor_scatter(buffer: Any, update: Any, start: Any) -> Any:
        return operators.TensorScatter(buffer, update, start, axis=2)

    _scatter(torch)
    return {torch.ops.onnxsplit.tensor_scatter.default: tensor_scatter}
