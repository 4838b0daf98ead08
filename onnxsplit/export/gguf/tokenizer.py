"""The tokenizer of a GGUF file as the library ``tokenizers`` reads it.

GGUF's kind ``gpt2`` is byte pair encoding on bytes, within words that a rule splits off. The kind ``llama`` is that of
SentencePiece: spaces are written as a sign, the pair whose token has the best score is joined first, and characters
without a token become bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from onnxsplit.errors import ExportError, one_line, shown
from onnxsplit.export.gguf.header import Header
from onnxsplit.export.gguf.split_rules import DEFAULT, RULES
from onnxsplit.progress import Say

_UNKNOWN, _CONTROL, _OWN = 2, 3, 4  # kinds of tokens: unknown, special, and added by the model's makers
_NO_TOKEN = 0xFFFFFFFF
_SPACE = "▁"
_MOST_PIECE = 512  # characters; every place where a piece can be cut in two is looked at


def read_tokenizer(header: Header, say: Say) -> Tokenizer | None:
    """The tokenizer of a file; None if the file has none, or one of a kind that cannot be written.

    Args:
        header: the header of the file.
        say: called with what could not be taken over.

    Raises:
        ExportError: the tokenizer is damaged.
    """
    kind = header.text("tokenizer.ggml.model", "none")
    if kind not in ("gpt2", "llama") or not header.texts("tokenizer.ggml.tokens"):
        say(f"no tokenizer.json is written, since the tokenizer in {header.path} is of the kind {shown(kind)}")
        return None
    try:
        tokenizer = _byte_pairs(header, say) if kind == "gpt2" else _pieces(header)
        _add_special(header, tokenizer)
    except ExportError:
        raise
    except Exception as error:  # the library raises errors of any type
        raise ExportError(f"the tokenizer in {header.path} is damaged: {one_line(error, 300)}") from error
    return tokenizer


def begins(header: Header) -> bool:
    """Whether a text begins with a token of its own."""
    kind, rule = header.text("tokenizer.ggml.model", "none"), header.text("tokenizer.ggml.pre", "default")
    default = kind == "llama" or RULES.get(rule, DEFAULT).begins
    return header.flag("tokenizer.ggml.add_bos_token", default) and special_token(header, "bos") is not None


def special_token(header: Header, name: str) -> int | None:
    """The number of a special token, ``bos`` for example; None where the file has none, or no tokens at all.

    Raises:
        ExportError: there is no token with this number.
    """
    field, count = f"tokenizer.ggml.{name}_token_id", len(header.texts("tokenizer.ggml.tokens"))
    value = header.fields.get(field)
    if not count or value is None or (isinstance(value, int) and value == _NO_TOKEN):
        return None
    return header.whole(field, most=count - 1)


def token_kinds(header: Header) -> list[int]:
    """The kind of each token; empty where the file does not say.

    Raises:
        ExportError: there is not one for each token.
    """
    kinds = header.fields.get("tokenizer.ggml.token_type", np.empty(0, np.int32))
    count = len(header.texts("tokenizer.ggml.tokens"))
    if not isinstance(kinds, np.ndarray) or len(kinds) not in (0, count):
        raise ExportError(f"{header.path}: tokenizer.ggml.token_type must have a number for each of {count} tokens")
    return [int(kind) for kind in kinds.tolist()]


def _vocabulary(header: Header) -> dict[str, int]:
    """The number of each token."""
    numbers: dict[str, int] = {}
    for number, text in enumerate(header.texts("tokenizer.ggml.tokens")):
        numbers.setdefault(text if text not in numbers else f"[twice {number}]", number)
    return numbers


def _byte_pairs(header: Header, say: Say) -> Tokenizer:
    name = header.text("tokenizer.ggml.pre", "default")
    rule = RULES.get(name, DEFAULT)
    if name not in RULES:
        say(f"the rule {shown(name)} that splits texts into words is not known; that of GPT-2 is used")
    numbers = _vocabulary(header)
    merges = [_merge(header, text) for text in header.texts("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=merges, ignore_merges=rule.whole))
    if rule.normal:
        tokenizer.normalizer = normalizers.NFC()
    splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merge(header: Header, text: str) -> tuple[str, str]:
    left, space, right = text.partition(" ")
    if not (left and space and right):
        raise ExportError(f"{header.path}: the merge {shown(text)} is not two tokens with a space between them")
    return left, right


def _pieces(header: Header) -> Tokenizer:
    numbers, kinds = _vocabulary(header), token_kinds(header)
    if (longest := max(map(len, numbers))) > _MOST_PIECE:
        raise ExportError(f"{header.path}: a token has {longest} characters; allowed are at most {_MOST_PIECE}")
    scores = header.fields.get("tokenizer.ggml.scores", np.empty(0, np.float32))
    if not isinstance(scores, np.ndarray) or len(scores) != len(numbers):
        raise ExportError(f"{header.path}: tokenizer.ggml.scores must have a number for each of {len(numbers)} tokens")
    unknown = special_token(header, "unknown")
    if unknown is None:
        unknown = kinds.index(_UNKNOWN) if _UNKNOWN in kinds else None
    word = None if unknown is None else header.texts("tokenizer.ggml.tokens")[unknown]
    bpe = models.BPE(vocab=numbers, merges=_merges(numbers, scores), unk_token=word, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    has_prefix = header.flag("tokenizer.ggml.add_space_prefix", True)
    changes: list[Any] = [normalizers.Prepend(_SPACE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*changes, normalizers.Replace(" ", _SPACE)])
    backward: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*backward, *([decoders.Strip(" ", 1, 0)] if has_prefix else [])])
    return tokenizer


def _merges(numbers: dict[str, int], scores: np.ndarray) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, those with the best score first."""
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for text, number in numbers.items():
        pairs = ((text[:place], text[place:]) for place in range(1, len(text)))
        found += [
            (-float(scores[number]), numbers[left], numbers[right], (left, right))
            for left, right in pairs
            if left in numbers and right in numbers
        ]
    return [pair for *_, pair in sorted(found)]


def _add_special(header: Header, tokenizer: Tokenizer) -> None:
    """Add the tokens that no text is split within, and those that begin and end a text."""
    tokens, kinds = header.texts("tokenizer.ggml.tokens"), token_kinds(header)
    for kind in (_CONTROL, _OWN):
        texts = [text for text, one in zip(tokens, kinds, strict=False) if one == kind and text]
        added = [AddedToken(text, special=kind == _CONTROL, normalized=_SPACE in text) for text in dict.fromkeys(texts)]
        (tokenizer.add_special_tokens if kind == _CONTROL else tokenizer.add_tokens)(added)
    first = special_token(header, "bos") if begins(header) else None
    last = special_token(header, "eos") if header.flag("tokenizer.ggml.add_eos_token", False) else None
    if first is None and last is None:
        return
    around = [None if number is None else (tokens[number], number) for number in (first, last)]
    before, after = ([] if one is None else [f"{one[0]}:0"] for one in around)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A:0", *after],
        pair=[*before, "$A:0", *after, *(f"{piece[:-1]}1" for piece in before), "$B:1", *(f"{p[:-1]}1" for p in after)],
        special_tokens=[one for one in dict.fromkeys(around) if one is not None],
    )
