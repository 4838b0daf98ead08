r"""How byte-level tokenizers split a text into words, by the names that GGUF files give the rules.

A rule is a list of patterns in the syntax of Oniguruma: each splits what the ones before it have left whole. The
patterns are those of the models' own ``tokenizer.json``. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    """Words with the sign before them, digits, and signs with the ends of lines after them."""
    return _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _ENDS


def _cased(digits: str, contractions: str) -> str:
    """As above, where a word ends before a capital letter."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    first = r"[^\r\n\p{L}\p{N}]?"
    words = f"{first}{upper}*{lower}+{contractions}|{first}{upper}+{lower}*{contractions}"
    return words + "|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _ENDS


_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"


@dataclass(frozen=True)
class SplitRule:
    """How a text is split.

    Attributes:
        patterns: the patterns; empty when the text is not split.
        whole: whether a word that is a token becomes this token, whatever the merges say.
        begins: whether the token that begins a text is added where the file does not say.
        normal: whether the text is brought into Unicode's form NFC first.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    begins: bool = False
    normal: bool = False


DEFAULT = SplitRule((_GPT2,))
_DIGITS = SplitRule((r"\p{N}", _GPT2))
_LLAMA3 = SplitRule((_words(r"\p{N}{1,3}"),), whole=True, begins=True)
_QWEN2 = SplitRule((_words(r"\p{N}"),), normal=True)
_GPT4O = SplitRule((_cased(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),))

RULES = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "exaone4", "mellum", "trillion"), DEFAULT),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), SplitRule(_LLAMA3.patterns)),
    **dict.fromkeys(("qwen2", "stablelm2", "hunyuan", "megrez", "deepseek-r1-qwen"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "tekken": SplitRule((_cased(r"\p{N}", ""),), whole=True, begins=True),
    "deepseek-v3": SplitRule(
        (
            r"\p{N}{1,3}",
            r"[一-龥\u3040-\u309f\u30a0-\u30ff]+",
            _SIGNS + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _ENDS,
        )
    ),
}
