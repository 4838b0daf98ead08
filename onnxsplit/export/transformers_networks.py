"""The kinds of networks in ``transformers``, each as PyTorch's exporter takes it: positional tensors in, a tuple out.

The kinds are encoders, decoders (with or without a key/value cache), encoder-decoder pairs, and vision networks.
Decoders with a cache read ``past_key_values.LAYER.key`` and ``.value``, and write ``present.LAYER.key`` and ``.value``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from onnxsplit.export import static_cache
from onnxsplit.export.conversion import Conversion, ExportOptions
from onnxsplit.export.decoder_cache import argument, cache_tensors, returned
from onnxsplit.export.pytorch import answers, program_writer

_SIZES = ({"batch": 2, "sequence": 5, "past": 3, "encoder": 7}, {"batch": 3, "sequence": 2, "past": 4, "encoder": 6})
_OPSET_WITH_ATTENTION = 23
DynamicAxes = dict[int, str]


def kind_of(model: Any) -> str:
    """The kind of a network: a key of :data:`BUILDERS`."""
    if model.config.is_encoder_decoder:
        return "pair"
    if model.main_input_name == "pixel_values":
        return "vision"
    name = type(model).__name__
    return "decoder" if name.endswith(("ForCausalLM", "LMHeadModel")) else "encoder"


def _conversion(
    torch: Any,
    network: Any,
    make: Callable[[Mapping[str, int]], dict[str, Any]],
    axes: Mapping[str, DynamicAxes],
    outputs: Sequence[str],
    options: ExportOptions,
    *,
    part: str | None = None,
    many: int | None = None,
    **words: Any,
) -> Conversion:
    """The conversion of a wrapped network.

    Args:
        torch: PyTorch.
        network: the wrapper.
        make: returns inputs by name, for sizes of free dimensions.
        axes: names of free axes of inputs and outputs.
        outputs: names of the outputs.
        options: options of the export.
        part: name of the part, if there are several models.
        many: position of the first input that the wrapper takes as ``*arguments``.
        words: further arguments of ``torch.onnx.export``.
    """
    import transformers

    first = make(_SIZES[0])
    shapes: list[Any] = [dict(axes.get(name, {})) for name in first]
    dynamic = tuple(shapes) if many is None else (*shapes[:many], tuple(shapes[many:]))

    write = program_writer(
        torch,
        network,
        tuple(first.values()),
        opset=options.opset,
        input_names=list(first),
        output_names=list(outputs),
        dynamic_shapes=dynamic,
        **words,
    )
    return Conversion(
        framework=f"transformers {transformers.__version__}, PyTorch {torch.__version__}",
        write=write,
        samples=[{name: tensor.numpy() for name, tensor in make(sizes).items()} for sizes in _SIZES],
        reference=answers(torch, network, first, outputs),
        part=part,
        axes=axes,
    )


def _ids(torch: Any, config: Any, *shape: int) -> Any:
    return torch.randint(0, max(2, getattr(config, "vocab_size", 2)), shape)


def _mask(torch: Any, batch: int, length: int, column: int = -1) -> Any:
    """A mask that hides one position of the first row, so that a network that ignores its mask is noticed."""
    mask = torch.ones((batch, length), dtype=torch.int64)
    mask[0, column] = 0
    return mask


def _encoder(torch: Any, model: Any, options: ExportOptions) -> list[Conversion]:
    """An encoder: takes tokens and a mask, returns all tensors that the network returns."""
    config, takes = model.config, inspect.signature(model.forward).parameters
    names = ["input_ids", *(name for name in ("attention_mask",) if name in takes)]
    if "token_type_ids" in takes and getattr(config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    more = {"use_cache": False} if "use_cache" in takes else {}

    def make(sizes: Mapping[str, int]) -> dict[str, Any]:
        shape = sizes["batch"], sizes["sequence"]
        every = {
            "input_ids": _ids(torch, config, *shape),
            "attention_mask": _mask(torch, *shape),
            "token_type_ids": torch.randint(0, max(1, getattr(config, "type_vocab_size", 1)), shape),
        }
        return {name: every[name] for name in names}

    with torch.no_grad():
        given = model(**make(_SIZES[0]), return_dict=True, **more)
    outputs = [name for name, value in given.items() if torch.is_tensor(value)]

    class Encoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> Any:
            every = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
            results = self.model(**{name: every[name] for name in names}, return_dict=True, **more)
            return tuple(results[name] for name in outputs)

    free: DynamicAxes = {0: "batch", 1: "sequence"}
    axes = dict.fromkeys(names, free) | {
        name: ({0: "batch", 1: "sequence"} if given[name].shape[1:2] == (_SIZES[0]["sequence"],) else {0: "batch"})
        for name in outputs
    }
    return [_conversion(torch, Encoder(), make, axes, outputs, options)]


def _vision(torch: Any, model: Any, options: ExportOptions) -> list[Conversion]:
    """A vision network: takes images, returns all tensors that the network returns."""
    config = model.config
    side = getattr(config, "image_size", 224)
    height, width = side if isinstance(side, list | tuple) else (side, side)

    def make(sizes: Mapping[str, int]) -> dict[str, Any]:
        return {"pixel_values": torch.randn(sizes["batch"], getattr(config, "num_channels", 3), height, width)}

    with torch.no_grad():
        given = model(**make(_SIZES[0]), return_dict=True)
    outputs = [name for name, value in given.items() if torch.is_tensor(value)]

    class Vision(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            results = self.model(pixel_values=pixel_values, return_dict=True)
            return tuple(results[name] for name in outputs)

    axes: dict[str, DynamicAxes] = {name: {0: "batch"} for name in ("pixel_values", *outputs)}
    return [_conversion(torch, Vision(), make, axes, outputs, options)]


def _decoder(torch: Any, model: Any, options: ExportOptions) -> list[Conversion]:
    """A decoder: takes tokens, a mask, positions and the cache; returns scores of the next token and the cache."""
    _gather_experts(model)
    if options.static_cache or (options.opset or 0) >= _OPSET_WITH_ATTENTION:
        _fuse_attention(model)
    if options.static_cache:
        return [_static_decoder(torch, model, options)]
    text, takes = model.config.get_text_config(decoder=True), inspect.signature(model.forward).parameters
    positions = "position_ids" in takes
    cached = options.cache
    tensors = cache_tensors(torch, model) if cached else []
    names = ["input_ids", "attention_mask", *(["position_ids"] if positions else [])]

    def make(sizes: Mapping[str, int]) -> dict[str, Any]:
        batch, sequence = sizes["batch"], sizes["sequence"]
        past = sizes["past"] if cached else 0
        every = {
            "input_ids": _ids(torch, text, batch, sequence),
            "attention_mask": _mask(torch, batch, past + sequence, column=0 if past else -1),
            "position_ids": torch.arange(past, past + sequence).expand(batch, sequence).contiguous(),
        }
        cache = {f"past_key_values.{one.name}": torch.randn(batch, one.heads, past, one.width) for one in tensors}
        return {name: every[name] for name in names} | cache

    network = _causal(torch, model, positions=positions, cached=cached)
    free: DynamicAxes = {0: "batch", 1: "sequence"}
    mask: DynamicAxes = {0: "batch", 1: "total_sequence" if cached else "sequence"}
    axes: dict[str, DynamicAxes] = {"input_ids": free, "attention_mask": mask, "position_ids": free, "logits": free}
    axes |= {f"past_key_values.{one.name}": {0: "batch", 2: "past_sequence"} for one in tensors}
    axes |= {f"present.{one.name}": {0: "batch", 2: "total_sequence"} for one in tensors}
    outputs = ["logits", *(f"present.{one.name}" for one in tensors)]
    return [_conversion(torch, network, make, axes, outputs, options, many=len(names) if cached else None)]


def _gather_experts(model: Any) -> None:
    """Have a mixture of experts gather the weights of the chosen ones for each token; other ways cannot be exported."""
    with suppress(AttributeError, ValueError):  # raised by older versions, and by networks that have one way only
        model.set_experts_implementation("batched_mm")


def _fuse_attention(model: Any) -> None:
    """Use PyTorch's fused attention, which becomes the op Attention, if the network can."""
    with suppress(ValueError):  # raised by networks without it, which keep theirs
        model.set_attn_implementation("sdpa")


def _static_decoder(torch: Any, model: Any, options: ExportOptions) -> Conversion:
    """A decoder whose cache has a fixed size."""
    static_cache.check(model, options.opset)
    text = model.config.get_text_config(decoder=True)
    tensors = cache_tensors(torch, model)

    def make(sizes: Mapping[str, int]) -> dict[str, Any]:
        batch, sequence, past = sizes["batch"], sizes["sequence"], sizes["past"]
        capacity = past + sequence + 2
        controls = {
            "input_ids": _ids(torch, text, batch, sequence),
            "write_indices": past - torch.arange(batch) % past,  # another length for each row
        }
        cache = {f"past_key_values.{one.name}": torch.randn(batch, one.heads, capacity, one.width) for one in tensors}
        return controls | cache

    free: DynamicAxes = {0: "batch", 1: "sequence"}
    axes: dict[str, DynamicAxes] = {"input_ids": free, "logits": free, "write_indices": {0: "batch"}}
    names = [f"{end}.{one.name}" for end in ("past_key_values", "present") for one in tensors]
    axes |= {name: {0: "batch", 2: "capacity"} for name in names}
    return _conversion(
        torch,
        static_cache.network(torch, model),
        make,
        axes,
        ["logits", *(f"present.{one.name}" for one in tensors)],
        replace(options, opset=options.opset or static_cache.OPSET),
        many=2,
        custom_translation_table=static_cache.translations(torch),
    )


def _causal(torch: Any, model: Any, *, positions: bool, cached: bool) -> Any:
    """A decoder whose cache is a flat list of tensors: key and value of each layer."""
    from transformers.cache_utils import DynamicCache

    def called(arguments: tuple[Any, ...], past: tuple[Any, ...]) -> Any:
        words = {"input_ids": arguments[0], "attention_mask": arguments[1]}
        if positions:
            words["position_ids"] = arguments[2]
        if not cached:
            return model(**words, use_cache=False, return_dict=True).logits
        cache = DynamicCache([(past[i], past[i + 1]) for i in range(0, len(past), 2)])
        results = model(**words, use_cache=True, return_dict=True, **{argument(model): cache})
        after = returned(model, results)
        return (results.logits, *(tensor for layer in after.layers for tensor in (layer.keys, layer.values)))

    class Decoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

    class WithPositions(Decoder):
        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
            return called((input_ids, attention_mask, position_ids), past)

    class Without(Decoder):
        def forward(self, input_ids: Any, attention_mask: Any, *past: Any) -> Any:
            return called((input_ids, attention_mask), past)

    class WithPositionsAlone(Decoder):
        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any) -> Any:
            return called((input_ids, attention_mask, position_ids), ())

    class WithoutAlone(Decoder):
        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return called((input_ids, attention_mask), ())

    if cached:
        return WithPositions() if positions else Without()
    return WithPositionsAlone() if positions else WithoutAlone()


def _pair(torch: Any, model: Any, options: ExportOptions) -> list[Conversion]:
    """Two models: an encoder, and a decoder that reads its output."""
    from transformers.modeling_outputs import BaseModelOutput

    config = model.config
    encoder = model.get_encoder()
    width = getattr(config, "d_model", None) or config.hidden_size

    class Encoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    class Decoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, encoder_hidden_states: Any, encoder_attention_mask: Any) -> Any:
            return self.model(
                decoder_input_ids=input_ids,
                attention_mask=encoder_attention_mask,
                encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
                use_cache=False,
            ).logits

    def encoded(sizes: Mapping[str, int]) -> dict[str, Any]:
        shape = sizes["batch"], sizes["encoder"]
        return {"input_ids": _ids(torch, config, *shape), "attention_mask": _mask(torch, *shape)}

    def decoded(sizes: Mapping[str, int]) -> dict[str, Any]:
        shape = sizes["batch"], sizes["encoder"]
        return {
            "input_ids": _ids(torch, config, sizes["batch"], sizes["sequence"]),
            "encoder_hidden_states": torch.randn(*shape, width),
            "encoder_attention_mask": _mask(torch, *shape),
        }

    source: DynamicAxes = {0: "batch", 1: "encoder_sequence"}
    target: DynamicAxes = {0: "batch", 1: "sequence"}
    one: dict[str, DynamicAxes] = dict.fromkeys(("input_ids", "attention_mask", "last_hidden_state"), source)
    two: dict[str, DynamicAxes] = {"input_ids": target, "logits": target}
    two |= dict.fromkeys(("encoder_hidden_states", "encoder_attention_mask"), source)
    return [
        _conversion(torch, Encoder(), encoded, one, ["last_hidden_state"], options, part="encoder"),
        _conversion(torch, Decoder(), decoded, two, ["logits"], options, part="decoder"),
    ]


BUILDERS: Mapping[str, Callable[[Any, Any, ExportOptions], Sequence[Conversion]]] = {
    "pair": _pair,
    "decoder": _decoder,
    "vision": _vision,
    "encoder": _encoder,
}
"""Makes the conversions of a network of each kind, from PyTorch, the network and the options of the export."""
