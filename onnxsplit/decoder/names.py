"""Pairs of an input and an output by their names, and the roles of inputs by their names.

Exporters name the two ends of a state alike, but for words that say before or after: ``past_key_values.0.key`` and
``present.0.key``, ``cache_k_0`` and ``cache_k_0_out``, ``h0`` and ``hn``. Here a name is split into its words, and the
words that say before or after are left out. An input and an output belong together where the remaining words are equal.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from onnxsplit.plan_decoder import Role

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_JOINED = {"hn": ("h", "n"), "cn": ("c", "n"), "kv": ("k", "v")}

_BEFORE = frozenset(["past", "prev", "previous", "old", "initial", "init", "in", "input"])
_AFTER = frozenset(["present", "new", "next", "out", "output", "updated", "final", "n", "y"])
_SURE = frozenset({"past", "present"})
_OF_STATES = frozenset(
    {"key", "keys", "value", "values", "k", "v", "cache", "caches", "state", "states", "hidden", "cell", "h", "c"}
    | {"conv", "ssm", "recurrent", "memory", "mem", "mems", "rnn", "lstm", "gru"}
)
_LAYERS_OF_CACHES = ("key", "values")  # of past_key_values.0.key
_MOST_PATTERNS = 64
_OF_ENCODERS = frozenset({"encoder", "cross"})

_ROLES: dict[str, Role] = {
    **dict.fromkeys(("input_ids", "token_ids", "tokens", "token", "input_tokens", "decoder_input_ids"), "tokens"),
    **dict.fromkeys(("attention_mask", "attn_mask", "att_mask", "padding_mask", "mask"), "mask"),
    **dict.fromkeys(
        ("position_ids", "positions", "position", "pos_ids", "pos", "cache_position", "cache_positions", "input_pos"),
        "positions",
    ),
    **dict.fromkeys(
        ("past_sequence_length", "past_seq_len", "past_seqlen", "past_length", "past_len", "past_lengths", "start_pos"),
        "past-length",
    ),
    **dict.fromkeys(("cache_length", "cache_len", "write_indices", "write_positions", "past_lens"), "past-length"),
    **dict.fromkeys(("total_sequence_length", "total_seq_len", "total_seqlen", "total_length"), "total-length"),
    **dict.fromkeys(
        ("current_sequence_length", "nonpad_kv_seqlen", "valid_lengths", "context_lengths"), "total-length"
    ),
    "seqlens_k": "last-index",
}
_FIXED = {"use_cache_branch": 1, "use_cache": 1, "num_logits_to_keep": 1, "logits_to_keep": 1}


@dataclass(frozen=True)
class NamedPairs:
    """What names say of a model's states.

    Attributes:
        pairs: the output of each input that has a partner.
        lonely_pasts: inputs that are states by their names, without an output.
        lonely_presents: outputs that are states by their names, without an input.
    """

    pairs: dict[str, str]
    lonely_pasts: tuple[str, ...] = ()
    lonely_presents: tuple[str, ...] = ()


def words(name: str) -> tuple[str, ...]:
    """The words and numbers of a name, in lower case: ``past_key_values.0.key`` has five."""
    found = (word.lower() for word in _WORD.findall(name))
    return tuple(part for word in found for part in _JOINED.get(word, (word,)))


def pairs_by_name(
    inputs: Sequence[str], outputs: Sequence[str], patterns: Iterable[tuple[str, str]] = ()
) -> NamedPairs:
    """Pair inputs and outputs by their names.

    Args:
        inputs: names of the inputs that may be states.
        outputs: names of the outputs.
        patterns: pairs of a name of an input and of an output, in which ``%d`` stands for the number of a layer. They
            win over what the words of the names say.
    """
    pairs = _by_patterns(inputs, outputs, patterns)
    rest_in = [name for name in inputs if name not in pairs]
    taken = set(pairs.values())
    rest_out = [name for name in outputs if name not in taken]
    pairs |= _by_words(rest_in, rest_out)
    taken = set(pairs.values())
    return NamedPairs(
        pairs={name: pairs[name] for name in inputs if name in pairs},
        lonely_pasts=tuple(name for name in inputs if name not in pairs and _is_cache(name, "past")),
        lonely_presents=tuple(name for name in outputs if name not in taken and _is_cache(name, "present")),
    )


def role_by_name(name: str) -> tuple[Role, int | None] | None:
    """The role of an input by its name, with the value of a fixed one; None where the name says nothing."""
    plain = "_".join(words(name))
    if plain in _FIXED:
        return "fixed", _FIXED[plain]
    return (_ROLES[plain], None) if plain in _ROLES else None


def of_encoder(name: str) -> bool:
    """Whether a name speaks of an encoder, or of attention to one."""
    return not _OF_ENCODERS.isdisjoint(words(name))


def kind_of_state(name: str) -> frozenset[str]:
    """The words that say what an input holds: ``past_key_values.0.conv_state`` has the words 0, conv and state."""
    return frozenset(_rest(name, _BEFORE))


def _by_patterns(inputs: Sequence[str], outputs: Sequence[str], patterns: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The pairs that patterns with ``%d`` for a layer's number describe."""
    pairs: dict[str, str] = {}
    free = set(outputs)
    for past, present in islice(patterns, _MOST_PATTERNS):
        before, hole, after = past.partition("%d")
        form = re.compile(re.escape(before) + (r"(\d+)" if hole else "") + re.escape(after))
        for name in inputs:
            match = form.fullmatch(name)
            partner = present.replace("%d", match.group(1)) if match and hole else present
            if match and partner in free and name not in pairs:
                pairs[name] = partner
                free.discard(partner)
    return pairs


def _by_words(inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, str]:
    """The pairs whose remaining words are equal and belong to one input and one output only."""
    pasts: dict[tuple[str, ...], list[str]] = {}
    for name in inputs:
        pasts.setdefault(_rest(name, _BEFORE), []).append(name)
    found: dict[str, list[str]] = {}
    for name in outputs:
        rest = _rest(name, _AFTER)
        matches = pasts.get(rest, [])
        if not matches and words(name)[-1:] == ("n",):  # hn is what becomes of h0
            matches = pasts.get((*rest, "0"), [])
        matches = [past for past in matches if _is_pair(past, name)]
        for past in matches:
            found.setdefault(past, []).append(name)
    once = {past: names[0] for past, names in found.items() if len(names) == 1}
    claims = Counter(once.values())
    return {past: present for past, present in once.items() if claims[present] == 1}


def _rest(name: str, directions: frozenset[str]) -> tuple[str, ...]:
    """The words of a name without those that say before or after, and without ``key_values`` before a number."""
    kept = [word for word in words(name) if word not in directions]
    if tuple(kept[:2]) == _LAYERS_OF_CACHES and len(kept) > 2:
        kept = kept[2:]
    return tuple(kept)


def _is_pair(past: str, present: str) -> bool:
    """Whether two names with the same remaining words say before and after, and speak of a state."""
    before, after = set(words(past)), set(words(present))
    told = not _BEFORE.isdisjoint(before) or not _AFTER.isdisjoint(after)
    return told and not (_SURE | _OF_STATES).isdisjoint(before | after)


def _is_cache(name: str, direction: str) -> bool:
    """Whether a name alone says that it is a state: it says past or present, and key, value, cache or state."""
    found = set(words(name))
    return direction in found and not _OF_STATES.isdisjoint(found)
