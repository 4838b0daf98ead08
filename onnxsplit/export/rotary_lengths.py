"""Rotary embeddings of ``transformers`` that turn at other speeds in longer texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxsplit.errors import ExportError


def notes_of(model: Any) -> tuple[str, ...]:
    """What is to be said about a decoder's rotary embedding.

    Raises:
        ExportError: it is computed anew in longer texts, which a graph cannot do.
    """
    found = [note for one in _parameters(model) if (note := _note(type(model).__name__, one)) is not None]
    return tuple(dict.fromkeys(found))


def _parameters(model: Any) -> list[Mapping[str, Any]]:
    """The parameters of the embedding; of each kind of layer, where these differ."""
    config = model.config.get_text_config(decoder=True)
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [one for one in (found, *found.values()) if isinstance(one, Mapping)]


def _note(name: str, parameters: Mapping[str, Any]) -> str | None:
    kind = parameters.get("rope_type")
    if kind == "dynamic":
        raise ExportError(
            f"{name} computes its rotary embedding anew in longer texts (rope_type 'dynamic'), which is not exported; "
            "give it another rope_type in config.json, such as 'yarn'"
        )
    if kind != "longrope":
        return None
    length = parameters.get("original_max_position_embeddings")
    return (
        f"{name} turns its rotary embedding at other speeds beyond {length} positions (longrope): keys of the cache "
        "keep the speeds that they had, and all rows of a run take those of the longest; keep texts shorter to get "
        "the scores of transformers"
    )
