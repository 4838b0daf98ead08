"""The rotary position embedding: cosines and sines of all positions, and how they change for longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from onnxsplit.errors import ExportError, shown
from onnxsplit.export.gguf.header import Header
from onnxsplit.tensors import Array

_LEAST_TURNS = 1e-3  # within the first context, for yarn


@dataclass(frozen=True, eq=False)
class RotaryScaling:
    """How the speeds of the rotary embedding are changed.

    Attributes:
        kind: ``none``, ``linear`` (all speeds are divided) or ``yarn`` (Peng et al. 2023: the slow ones are divided).
        factor: by what they are divided.
        original: the context that the model was trained on first; for ``yarn``.
        fast: from this many turns within that context, speeds are kept; for ``yarn``.
        slow: up to this many turns, speeds are divided; for ``yarn``.
        strength: what cosines and sines are multiplied with; for ``yarn``.
        factors: the file's own factor for each speed, as for Llama 3; None for none.
    """

    kind: str = "none"
    factor: float = 1.0
    original: int = 0
    fast: float = 32.0
    slow: float = 1.0
    strength: float = 1.0
    factors: Array | None = None


def read_scaling(header: Header, name: str, factors: Array | None) -> RotaryScaling:
    """Read how a file changes the rotary embedding.

    Raises:
        ExportError: in a way that is not known.
    """
    field = f"{name}.rope.scaling"
    kind = header.text(f"{field}.type", "none")
    linear = header.number(f"{name}.rope.scale_linear", 1.0)  # an older name
    factor = header.number(f"{field}.factor", linear)
    if kind == "none" and f"{field}.type" not in header.fields and factor != 1:
        kind = "linear"
    if kind not in ("none", "linear", "yarn") or header.number(f"{field}.alpha", 0.0):
        raise ExportError(f"{header.path}: {field}.type is {shown(kind)}; exported are none, linear and yarn")
    if kind == "none" or factor in (0, 1):
        return RotaryScaling(factors=factors)
    if kind == "linear":
        return RotaryScaling(kind, factor, factors=factors)
    if header.number(f"{field}.yarn_log_multiplier", 0.0) or header.number(f"{field}.yarn_ext_factor", 1.0) != 1:
        raise ExportError(f"{header.path}: its {field}.yarn_... fields are not exported")
    own = header.number(f"{field}.yarn_attn_factor", header.number(f"{field}.attn_factor", 1.0))
    return RotaryScaling(
        kind,
        factor,
        header.whole(f"{field}.original_context_length", header.whole(f"{name}.context_length"), least=1),
        header.number(f"{field}.yarn_beta_fast", 32.0, least=_LEAST_TURNS),
        header.number(f"{field}.yarn_beta_slow", 1.0, least=_LEAST_TURNS),
        own * (1 + 0.1 * math.log(factor)),
        factors,
    )


def rotary_tables(head: int, base: float, positions: Array, scaling: RotaryScaling) -> tuple[Array, Array]:
    """Cosines and sines at some positions, float32 [positions, head / 2]."""
    speed = base ** (-np.arange(0, head, 2) / head)
    if scaling.factors is not None:
        speed = speed / scaling.factors
    if scaling.kind == "linear":
        speed = speed / scaling.factor
    elif scaling.kind == "yarn":
        first, last = (_pair(turns, head, base, scaling.original) for turns in (scaling.fast, scaling.slow))
        low, high = max(0, math.floor(first)), min(head - 1, math.ceil(last))
        divided = ((np.arange(head // 2) - low) / max(0.001, high - low)).clip(0, 1)
        speed = speed * (1 - divided) + speed / scaling.factor * divided
    angle = positions[:, None] * speed[None]
    cosines, sines = (scaling.strength * part(angle) for part in (np.cos, np.sin))
    return cosines.astype(np.float32), sines.astype(np.float32)


def _pair(turns: float, head: int, base: float, length: int) -> float:
    """The pair of a head that turns this often within a length."""
    return head * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))
