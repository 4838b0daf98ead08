"""GGUF files of the llama family: a decoder with a cache, its tokenizer, and NumPy's outputs to compare with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from onnxsplit.errors import ExportError, MissingDependency
from onnxsplit.export.conversion import TOLERANCE, Conversion, ExportOptions
from onnxsplit.export.gguf.graph import DecoderGraph
from onnxsplit.export.gguf.header import Header, read_header
from onnxsplit.export.gguf.model_file import StreamedModel
from onnxsplit.export.gguf.network import DecoderNetwork, read_network
from onnxsplit.export.gguf.reference import NumpyDecoder
from onnxsplit.export.gguf.weights import Form, GGUFWeights, form_of
from onnxsplit.export.sources import Source
from onnxsplit.tensors import Array

BLOCKS_TOLERANCE = 0.25
"""The same as :data:`TOLERANCE` for weights in blocks: ONNX Runtime multiplies them with activations of 8 bits."""

ROUNDED_TOLERANCE = 1.0
"""The same for weights that were rounded to 4 bits."""

_SENTENCES = "The quick brown fox jumps over the lazy dog.", "Water boils at 100 degrees, but not on a mountain."
_PROMPT = 7  # the most tokens of a sentence that the outputs are compared on, before one more


def convert(source: Source, options: ExportOptions) -> Sequence[Conversion]:
    """The conversion of a GGUF file.

    Raises:
        ExportError: the file is damaged, or its network has something that is not exported.
        MissingDependency: ``gguf`` or ``tokenizers`` is not installed.
    """
    assert source.path is not None
    header = read_header(source.path)
    _refuse_part(header)
    try:
        from onnxsplit.export.gguf.text_files import text_files
        from onnxsplit.export.gguf.tokenizer import read_tokenizer
    except ImportError as error:
        raise MissingDependency("exporting GGUF files needs tokenizers: pip install 'onnxsplit[gguf]'") from error
    weights = GGUFWeights(header)
    network = _network(header, weights)
    notes: list[str] = []
    tokenizer = read_tokenizer(header, notes.append)
    if tokenizer is not None:
        _check_tokens(header, network)
    decoder, tokens = NumpyDecoder(network, weights), _prompts(tokenizer, network)

    def write(file: Path) -> None:
        model = StreamedModel(file, weights)
        DecoderGraph(model, network, weights, options.weights).build()
        if unread := sorted(header.tensors.keys() - weights.used):
            raise ExportError(
                f"{header.path} has {len(unread)} tensors that the architecture {network.name} does not have here "
                f"({', '.join(unread[:3])}), so its network is not exported; nothing was written"
            )
        model.save(header.text("general.name", "") or network.name)

    @cache
    def outputs() -> dict[str, Array]:
        return _checked(header, decoder.run(tokens))

    def reference(sample: Mapping[str, Array]) -> dict[str, Array]:
        past = sample["attention_mask"].shape[1] - sample["input_ids"].shape[1]
        return _part(outputs(), past, past + sample["input_ids"].shape[1])

    kinds = Counter(one.type for one in header.tensors.values() if len(one.shape) > 1)
    forms = {form_of(kind, options.weights) for kind in kinds}
    license_name = header.text("general.license", "")
    return [
        Conversion(
            framework=f"GGUF {network.name} ({', '.join(f'{count} {kind}' for kind, count in kinds.most_common())})",
            write=write,
            samples=_samples(tokens, network, outputs()) if options.check else [],
            reference=reference,
            tolerance=_tolerance(forms),
            about={"license": license_name} if license_name else {},
            files=text_files(header, network, tokenizer),
            notes=notes,
        )
    ]


def _check_tokens(header: Header, network: DecoderNetwork) -> None:
    if (count := len(header.texts("tokenizer.ggml.tokens"))) > network.vocabulary:
        raise ExportError(
            f"{header.path} is damaged: its tokenizer has {count} tokens, but its embedding {network.vocabulary}; "
            "fetch or convert it again"
        )


def _checked(header: Header, outputs: dict[str, Array]) -> dict[str, Array]:
    """Outputs whose scores are numbers; NaN would be equal to the NaN of the model."""
    if not np.isfinite(outputs["logits"]).all():
        raise ExportError(
            f"the weights in {header.path} give scores that are no numbers, so it is damaged; fetch or convert it again"
        )
    return outputs


def _refuse_part(header: Header) -> None:
    if (parts := header.whole("split.count", 0)) > 1:
        raise ExportError(
            f"{header.path} is one of {parts} parts of a model; join them first: llama-gguf-split --merge FIRST-PART "
            "WHOLE.gguf"
        )


def _tolerance(forms: Set[Form]) -> float:
    if any(form.bits == 4 and not form.exact for form in forms):
        return ROUNDED_TOLERANCE
    return BLOCKS_TOLERANCE if any(form.bits for form in forms) else TOLERANCE


def _network(header: Header, weights: GGUFWeights) -> DecoderNetwork:
    def factors(size: int) -> Array | None:
        if "rope_freqs.weight" not in weights:
            return None
        found = weights.vector("rope_freqs.weight", size)
        if not ((found > 0) & np.isfinite(found)).all():
            raise ExportError(f"{header.path}: the tensor rope_freqs.weight must hold positive numbers")
        return found

    return read_network(header, weights.entry("token_embd.weight").shape[0], factors)


def _prompts(tokenizer: Any, network: DecoderNetwork) -> Array:
    """The first tokens of two sentences; random ones for a vocabulary that cannot write them."""
    count = min(_PROMPT + 1, network.context)
    tokens = [tokenizer.encode(text).ids[:count] for text in _SENTENCES] if tokenizer is not None else []
    if tokens and all(len(row) == count and max(row) < network.vocabulary for row in tokens):
        return np.array(tokens, np.int64)
    return np.random.default_rng(0).integers(0, network.vocabulary, (len(_SENTENCES), count))


def _part(outputs: Mapping[str, Array], first: int, last: int) -> dict[str, Array]:
    """The outputs of a run that reads the tokens from ``first`` to ``last`` on the cache of those before."""
    caches = {name: one[:, :, :last] for name, one in outputs.items() if name != "logits"}
    return {"logits": outputs["logits"][:, first:last], **caches}


def _samples(tokens: Array, network: DecoderNetwork, outputs: Mapping[str, Array]) -> list[dict[str, Array]]:
    """Two prompts from an empty cache, and then one more token of each."""
    prompt = tokens.shape[1] - 1
    empty = np.zeros((len(tokens), network.groups, 0, network.head), np.float32)
    samples = []
    for first, last in ((0, prompt), (prompt, prompt + 1)):
        caches = {
            f"past_key_values.{layer}.{part}": outputs[f"present.{layer}.{part}"][:, :, :first] if first else empty
            for layer in range(network.layers)
            for part in ("key", "value")
        }
        mask = np.ones((len(tokens), last), np.int64)
        samples.append({"input_ids": tokens[:, first:last], "attention_mask": mask, **caches})
    return samples
