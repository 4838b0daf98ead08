"""``transformers``: configurations, folders and repositories; encoders, decoders with and without cache, pairs, vision.

Networks are exported with eager attention, since the fused one has another result for rows that are masked whole and
no form at all for some networks. Decoders take ``past_key_values.N.key|value`` and give ``present.N.key|value``.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxsplit.errors import ExportError, MissingDependency, one_line
from onnxsplit.export import hub, onnx_file
from onnxsplit.export.conversion import Conversion, ExportOptions
from onnxsplit.export.pytorch import answers, exported, require_torch
from onnxsplit.export.sources import Source, recognise
from onnxsplit.files import read_regular

_EXTRA = "pip install 'onnxsplit[transformers]'"
_MOST_CONFIG_BYTES = 64 << 20
_SIZES = ({"batch": 2, "sequence": 5, "past": 3, "encoder": 7}, {"batch": 3, "sequence": 2, "past": 4, "encoder": 6})
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WORDS = (".json", ".txt", ".model", ".md", ".jinja")  # of a folder, files that are no weights
DynamicAxes = dict[int, str]


def convert(source: Source, options: ExportOptions) -> Sequence[Conversion]:
    """A configuration, a folder, or a repository."""
    about: dict[str, str] = {}
    if source.kind == "hub":
        path, revision = hub.fetched(source, options)
        about["onnxsplit.revision"] = revision
        if source.file is not None:
            return [_with(conversion, about) for conversion in onnx_file.convert(recognise(str(path)), options)]
    else:
        assert source.path is not None
        path = source.path
    torch = require_torch()
    is_random = _has_random_weights(path, fetched=source.kind == "hub")
    model = _model(torch, path, is_random=is_random)
    kind = _kind(model)
    options.say(f"{type(model).__name__}: {kind}")
    build = {"pair": _pair, "decoder": _decoder, "vision": _vision, "encoder": _encoder}[kind]
    try:
        made = build(torch, model, options)
    except Exception as error:  # transformers raises whatever its parts raise
        raise ExportError(
            f"{type(model).__name__} was taken for a network of the kind {kind!r} and does not run as one: "
            f"{one_line(error, 300)}. A recipe can say how it is called (docs/export.md)"
        ) from error
    more = ", random weights" if is_random else ""
    return [_with(replace(one, framework=one.framework + more), about) for one in made]


def _with(conversion: Conversion, about: Mapping[str, str]) -> Conversion:
    return replace(conversion, about={**conversion.about, **about})


def _has_random_weights(path: Path, *, fetched: bool) -> bool:
    """Whether a network has to make its weights up: a configuration alone has none.

    Raises:
        ExportError: there are weights that are not read, or some are missing.
    """
    if not path.is_dir():
        return True
    files = {file.name for file in path.iterdir()}
    if any(name.endswith(".safetensors") for name in files):
        return False
    if found := sorted(name for name in files if name.endswith(_PICKLED)):
        raise ExportError(
            f"{path} has its weights in a pickled file ({found[0]}), whose loading could run code; convert them to "
            "model.safetensors (save_pretrained of transformers does)"
        )
    strange = sorted(name for name in files if not name.startswith(".") and not name.endswith(_WORDS))
    if strange or fetched or any(name.endswith(".index.json") for name in files):
        raise ExportError(
            f"{path} has no weights in *.safetensors{f', but {strange[0]}' if strange else ''}; save them so "
            "(save_pretrained of transformers does), or name its config.json for random weights"
        )
    return True


def _model(torch: Any, path: Path, *, is_random: bool) -> Any:
    """The network of a folder with weights, or of a configuration.

    Raises:
        ExportError: it needs code of its own, or cannot be loaded.
        MissingDependency: transformers is not installed.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency(f"exporting from transformers needs it: {_EXTRA}") from error
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = _config(transformers, path)
            name = (config.architectures or [None])[0]
            kind = getattr(transformers, name, None) if name else None
            if name and kind is None:
                raise ExportError(f"this transformers ({transformers.__version__}) has no {name}; install a newer one")
            if not is_random:
                make = kind or transformers.AutoModel
                return make.from_pretrained(
                    path, local_files_only=True, use_safetensors=True, trust_remote_code=False,
                    attn_implementation="eager", dtype=torch.float32,
                ).eval()  # fmt: skip
            torch.manual_seed(0)
            make = kind._from_config if kind is not None else transformers.AutoModel.from_config
            return make(config, attn_implementation="eager").eval().float()
    except ExportError:
        raise
    except Exception as error:  # transformers raises whatever its parts raise
        raise ExportError(f"transformers cannot load {path}: {one_line(error, 400)}") from error


def _config(transformers: Any, path: Path) -> Any:
    if path.is_dir():
        return transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    content = json.loads(read_regular(path, most_bytes=_MOST_CONFIG_BYTES))
    if "auto_map" in content:
        raise ExportError(f"{path} names code of its own (auto_map), which is not run")
    return transformers.AutoConfig.for_model(**content)


def _kind(model: Any) -> str:
    if model.config.is_encoder_decoder:
        return "pair"
    if model.main_input_name == "pixel_values":
        return "vision"
    name = type(model).__name__
    return "decoder" if name.endswith(("ForCausalLM", "LMHeadModel")) else "encoder"


# Networks, as PyTorch's exporter and ONNX want them: positional tensors in, a tuple out


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
) -> Conversion:
    """A conversion of a wrapped network.

    Args:
        torch: PyTorch.
        network: the wrapper.
        make: inputs by name, for sizes.
        axes: free axes of inputs and outputs.
        outputs: names.
        options: of the export.
        part: of several models.
        many: the first of the inputs that the wrapper takes as ``*arguments``.
    """
    import transformers

    first = make(_SIZES[0])
    shapes: list[Any] = [dict(axes.get(name, {})) for name in first]
    dynamic = tuple(shapes) if many is None else (*shapes[:many], tuple(shapes[many:]))

    def write(file: Path) -> None:
        program = exported(
            torch,
            network,
            tuple(first.values()),
            opset=options.opset,
            input_names=list(first),
            output_names=list(outputs),
            dynamic_shapes=dynamic,
        )
        program.save(str(file))

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
    """A mask that hides one place of the first row: with ones alone, what is done with a mask would not show."""
    mask = torch.ones((batch, length), dtype=torch.int64)
    mask[0, column] = 0
    return mask


def _encoder(torch: Any, model: Any, options: ExportOptions) -> list[Conversion]:
    """Tokens and a mask in; all tensors that the network gives out."""
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
            found = self.model(**{name: every[name] for name in names}, return_dict=True, **more)
            return tuple(found[name] for name in outputs)

    free: DynamicAxes = {0: "batch", 1: "sequence"}
    axes = dict.fromkeys(names, free) | {
        name: ({0: "batch", 1: "sequence"} if given[name].shape[1:2] == (_SIZES[0]["sequence"],) else {0: "batch"})
        for name in outputs
    }
    return [_conversion(torch, Encoder(), make, axes, outputs, options)]


def _vision(torch: Any, model: Any, options: ExportOptions) -> list[Conversion]:
    """Pictures in; all tensors that the network gives out."""
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
            found = self.model(pixel_values=pixel_values, return_dict=True)
            return tuple(found[name] for name in outputs)

    axes: dict[str, DynamicAxes] = {name: {0: "batch"} for name in ("pixel_values", *outputs)}
    return [_conversion(torch, Vision(), make, axes, outputs, options)]


def _decoder(torch: Any, model: Any, options: ExportOptions) -> list[Conversion]:
    """Tokens, a mask and positions in, and the cache; scores of the next token out, and the cache."""
    config, takes = model.config, inspect.signature(model.forward).parameters
    text = config.get_text_config(decoder=True)
    layers, heads = text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    positions = "position_ids" in takes
    cached = options.cache
    tensors = [f"{layer}.{what}" for layer in range(layers) for what in ("key", "value")] if cached else []
    names = ["input_ids", "attention_mask", *(["position_ids"] if positions else [])]

    def make(sizes: Mapping[str, int]) -> dict[str, Any]:
        batch, sequence = sizes["batch"], sizes["sequence"]
        past = sizes["past"] if cached else 0
        every = {
            "input_ids": _ids(torch, text, batch, sequence),
            "attention_mask": _mask(torch, batch, past + sequence, column=0 if past else -1),
            "position_ids": torch.arange(past, past + sequence).expand(batch, sequence).contiguous(),
        }
        cache = {f"past_key_values.{name}": torch.randn(batch, heads, past, width) for name in tensors}
        return {name: every[name] for name in names} | cache

    network = _causal(torch, model, positions=positions, cached=cached)
    free: DynamicAxes = {0: "batch", 1: "sequence"}
    mask: DynamicAxes = {0: "batch", 1: "total_sequence" if cached else "sequence"}
    axes: dict[str, DynamicAxes] = {"input_ids": free, "attention_mask": mask, "position_ids": free, "logits": free}
    axes |= {f"past_key_values.{name}": {0: "batch", 2: "past_sequence"} for name in tensors}
    axes |= {f"present.{name}": {0: "batch", 2: "total_sequence"} for name in tensors}
    outputs = ["logits", *(f"present.{name}" for name in tensors)]
    return [_conversion(torch, network, make, axes, outputs, options, many=len(names) if cached else None)]


def _causal(torch: Any, model: Any, *, positions: bool, cached: bool) -> Any:
    """A decoder whose cache is flat tensors: key and value of each layer."""
    from transformers.cache_utils import DynamicCache

    argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def called(arguments: tuple[Any, ...], past: tuple[Any, ...]) -> Any:
        words = {"input_ids": arguments[0], "attention_mask": arguments[1]}
        if positions:
            words["position_ids"] = arguments[2]
        if not cached:
            return model(**words, use_cache=False, return_dict=True).logits
        cache = DynamicCache([(past[i], past[i + 1]) for i in range(0, len(past), 2)])
        found = model(**words, use_cache=True, return_dict=True, **{argument: cache})
        after = getattr(found, argument, None)
        after = after if after is not None else found.past_key_values
        return (found.logits, *(tensor for layer in after.layers for tensor in (layer.keys, layer.values)))

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
    """Two models: an encoder, and a decoder that reads what it gives."""
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
