"""The network that a GGUF file describes: its sizes and the choices of its architecture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxsplit.errors import ExportError, shown
from onnxsplit.export.gguf.header import Header
from onnxsplit.export.gguf.rotary import RotaryScaling, read_scaling, rotary_tables
from onnxsplit.tensors import Array

_MOST_LAYERS = 4096
_MOST_WIDTH = 1 << 20
_LOCAL_BASE = 10_000.0  # of Gemma 3's layers with a window
_LEAST_BASE = 1.001  # of a rotary embedding; at 1, all pairs of a head turn at the same speed
_LAYERS_27B = {"gemma2": 46, "gemma3": 62}  # the sizes whose attention is scaled by the width

_REFUSED_FIELDS = {  # fields that change the network, by what they are
    "expert_count": "a mixture of experts",
    "expert_used_count": "a mixture of experts",
    "attention.kv_lora_rank": "latent attention",
    "attention.max_alibi_bias": "ALiBi",
    "attention.clamp_kqv": "clamped queries, keys and values",
    "attention.shared_kv_layers": "caches that layers share",
    "attention.temperature_scale": "a temperature of attention",
    "ssm.state_size": "a state space",
    "residual_scale": "scaled residuals",
    "embedding_scale": "a scaled embedding",
    "logit_scale": "scaled scores",
    "attention.scale": "a scale of attention",
}


@dataclass(frozen=True)
class Architecture:
    """What the networks of an architecture have in common.

    Attributes:
        model_type: the name that transformers gives it.
        class_name: the class in transformers.
        interleaved: whether the rotary embedding pairs neighbours, and not the two halves of a head.
        gelu: whether the hidden layer has GELU in place of SiLU.
        scaled: whether the embedding is scaled by the root of the width.
        pattern: of this many layers in a row, all but the last have a window; 1 for no windows.
    """

    model_type: str
    class_name: str
    interleaved: bool = False
    gelu: bool = False
    scaled: bool = False
    pattern: int = 1


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "gemma": Architecture("gemma", "GemmaForCausalLM", gelu=True, scaled=True),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", gelu=True, scaled=True, pattern=2),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", gelu=True, scaled=True, pattern=6),
}


@dataclass(frozen=True)
class DecoderNetwork:
    """A decoder: its sizes, and the choices of its architecture.

    Attributes:
        name: the name of the architecture in the file.
        architecture: its choices.
        layers: number of layers.
        width: numbers of a hidden state.
        heads: heads of queries.
        groups: heads of keys and values.
        head: numbers of a head.
        hidden: numbers of the hidden layer.
        vocabulary: number of tokens.
        context: the longest sequence.
        epsilon: what norms add to the mean square.
        scale: what products of queries and keys are multiplied with.
        attention_cap: the products are kept within it by tanh; 0 for no cap.
        score_cap: the same for the scores.
        windows: for each layer, how many positions it looks back on, its own included; None for all.
        base: base of the rotary embedding.
        local_base: the same in layers with a window.
        scaling: how its speeds are changed for longer contexts.
    """

    name: str
    architecture: Architecture
    layers: int
    width: int
    heads: int
    groups: int
    head: int
    hidden: int
    vocabulary: int
    context: int
    epsilon: float
    scale: float
    attention_cap: float
    score_cap: float
    windows: tuple[int | None, ...]
    base: float
    local_base: float
    scaling: RotaryScaling

    def rotary(self, layer: int, positions: Array) -> tuple[Array, Array]:
        """Cosines and sines of a layer's rotary embedding at some positions, float32 [positions, head / 2]."""
        if self.has_local_rotary(layer):
            return rotary_tables(self.head, self.local_base, positions, RotaryScaling())
        return rotary_tables(self.head, self.base, positions, self.scaling)

    def has_local_rotary(self, layer: int) -> bool:
        """Whether a layer has a rotary embedding of its own because it has a window, as in Gemma 3."""
        return self.name == "gemma3" and self.windows[layer] is not None


def read_network(header: Header, vocabulary: int, factors: Callable[[int], Array | None]) -> DecoderNetwork:
    """Read the network of a file.

    Args:
        header: the header of the file.
        vocabulary: number of tokens.
        factors: returns the file's own factors of the rotary embedding, for their number; None where there are none.

    Raises:
        ExportError: the architecture is not known, or has something that is not exported.
    """
    name = header.text("general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ExportError(f"{header.path} has the architecture {shown(name)}; exported are {known}")
    _refuse(header, name)
    whole, number = header.whole, header.number
    layers = whole(f"{name}.block_count", least=1, most=_MOST_LAYERS)
    width = whole(f"{name}.embedding_length", least=1, most=_MOST_WIDTH)
    heads = whole(f"{name}.attention.head_count", least=1, most=width)
    groups = whole(f"{name}.attention.head_count_kv", heads, least=1, most=heads)
    head = whole(f"{name}.attention.key_length", width // heads, least=2, most=_MOST_WIDTH)
    for field in ("attention.value_length", "rope.dimension_count"):
        if (found := whole(f"{name}.{field}", head)) != head:
            raise ExportError(
                f"{header.path}: {name}.{field} is {found}, but keys have {head} numbers; both must be equal"
            )
    if heads % groups:
        raise ExportError(f"{header.path}: {heads} heads cannot share {groups} heads of keys")
    if head % 16:
        raise ExportError(f"{header.path} has heads of {head} numbers; ONNX Runtime's attention needs a multiple of 16")
    context = whole(f"{name}.context_length", least=2, most=1 << 20)
    large = _LAYERS_27B.get(name) == layers
    caps = (50.0, 30.0) if name == "gemma2" else (0.0, 0.0)
    return DecoderNetwork(
        name=name,
        architecture=ARCHITECTURES[name],
        layers=layers,
        width=width,
        heads=heads,
        groups=groups,
        head=head,
        hidden=whole(f"{name}.feed_forward_length", least=1, most=_MOST_WIDTH),
        vocabulary=vocabulary,
        context=context,
        epsilon=number(f"{name}.attention.layer_norm_rms_epsilon"),
        scale=1 / math.sqrt(width / heads if large else head),
        attention_cap=number(f"{name}.attn_logit_softcapping", caps[0]),
        score_cap=number(f"{name}.final_logit_softcapping", caps[1]),
        windows=_windows(header, name, layers),
        base=number(f"{name}.rope.freq_base", 10_000.0, least=_LEAST_BASE),
        local_base=number(f"{name}.rope.freq_base_swa", _LOCAL_BASE, least=_LEAST_BASE),
        scaling=read_scaling(header, name, factors(head // 2)),
    )


def _refuse(header: Header, name: str) -> None:
    for field, what in _REFUSED_FIELDS.items():
        value = header.fields.get(f"{name}.{field}")
        if value is not None and not (isinstance(value, int | float) and value == 0):
            raise ExportError(f"{header.path} has {what} ({name}.{field} is {shown(value)}), which is not exported")
    if not header.flag(f"{name}.attention.causal", True):
        raise ExportError(f"{header.path} is an encoder ({name}.attention.causal is false); only decoders are exported")


def _windows(header: Header, name: str, layers: int) -> tuple[int | None, ...]:
    """The window of each layer."""
    window = header.whole(f"{name}.attention.sliding_window", 4096 if name == "gemma2" else 0)
    pattern = header.fields.get(f"{name}.attention.sliding_window_pattern", ARCHITECTURES[name].pattern)
    if not window:
        return (None,) * layers
    if isinstance(pattern, np.ndarray) and pattern.dtype == bool and len(pattern) >= layers:
        return tuple(window if local else None for local in pattern[:layers].tolist())
    if not isinstance(pattern, int) or pattern < 1:
        raise ExportError(
            f"{header.path}: {name}.attention.sliding_window_pattern is {shown(pattern)}, which is not known"
        )
    if pattern == 1 and name != "gemma3":  # Mistral's first models: all layers
        return (window,) * layers
    return tuple(None if (layer + 1) % pattern == 0 else window for layer in range(layers))
