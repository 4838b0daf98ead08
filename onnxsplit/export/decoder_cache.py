"""The key/value cache of a decoder of ``transformers``: its tensors, as the decoder itself makes them in a short run.

Configurations do not say it: some heads share keys (multi-query), keys and values of others differ in width (latent
attention), and what recurrent layers keep are no keys and values at all.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from onnxsplit.errors import ExportError


@dataclass(frozen=True)
class CacheTensor:
    """A tensor of the cache, [batch, heads, positions, width].

    Attributes:
        name: layer and part, such as ``0.key``.
        heads: number of heads.
        width: numbers of a head.
    """

    name: str
    heads: int
    width: int


def argument(model: Any) -> str:
    """The name under which a decoder takes and returns its cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def returned(model: Any, results: Any) -> Any:
    """The cache among a decoder's results; None where it returns none."""
    found = getattr(results, argument(model), None)
    return found if found is not None else getattr(results, "past_key_values", None)


def cache_tensors(torch: Any, model: Any) -> list[CacheTensor]:
    """The tensors of a decoder's cache, layer by layer.

    Raises:
        ExportError: the decoder keeps something else between steps, or nothing.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    with torch.no_grad():
        found = returned(model, model(input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=True))
    layers = list(getattr(found, "layers", ()))
    others = sorted(
        {type(layer).__name__ for layer in layers} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    )
    if not layers or others:
        kept = ", ".join(others) or (
            type(found).__name__ if found is not None else "something else than past_key_values"
        )
        raise ExportError(
            f"{type(model).__name__} does not keep keys and values alone between steps, but {kept}, and such a cache "
            "is not exported; try --no-cache, which leaves the cache out"
        )
    parts = [
        (f"{place}.{part}", tensor)
        for place, layer in enumerate(layers)
        for part, tensor in (("key", layer.keys), ("value", layer.values))
    ]
    return [CacheTensor(name, tensor.shape[1], tensor.shape[3]) for name, tensor in parts]
