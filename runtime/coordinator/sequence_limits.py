"""How many sequences of a decoder its nodes hold at once, and how long they may be. Pure."""

from __future__ import annotations

from math import ceil

from msgspec import Struct

from onnxsplit.errors import InputError
from onnxsplit.plan import Plan
from onnxsplit.plan_decoder import Decoder
from runtime.topology import StepGraph
from runtime.wire.messages.sequences import MOST_NEW_TOKENS, MOST_ROWS, MOST_SLOTS

DEFAULT_ROWS = 16
"""The largest number of sequences at once on a chain of nodes, unless the user says otherwise."""

DEFAULT_CHUNK = 128
"""The largest number of tokens of a prompt in a step, unless the user says otherwise."""

_FEWEST_PLACES = 4
_SAME = 1e-4  # scores that differ by no more than this share of their scale are the same


class SequenceLimits(Struct, frozen=True, kw_only=True):
    """The limits of sequences in one pipeline; :func:`sequence_limits` makes them.

    A *chain* is one node of each stage. All chains that share a node have ranges of slots of their own, which are
    called places.

    Attributes:
        cache_bytes: the most bytes of states on each node.
        rows: the most sequences at once on a chain.
        length: the most positions of a sequence, its prompt included.
        chunk: the most tokens of a prompt in a step.
        reading: the most tokens of prompts in flight on a chain while any of its sequences decodes; one step may have
            more.
        exact: whether a replay repeats the steps of the text one by one, after the parts of the prompt.
        reuses: whether a sequence may begin with states of another one.
        keeps: whether states of sequences that have ended are kept for that.
        reuses_text: whether states that were computed step by step may be reused where others read them in parts.
        groups: the number of groups of a chain; each has one step in flight.
        places: the number of ranges of slots that a node has.
        token_bytes: for each stage, the bytes of one position of one sequence.
        fixed_bytes: for each stage, the bytes of one sequence, whatever its length.
    """

    cache_bytes: int
    rows: int
    length: int
    chunk: int
    reading: int
    exact: bool
    reuses: bool
    keeps: bool
    reuses_text: bool
    groups: int
    places: int
    token_bytes: tuple[int, ...]
    fixed_bytes: tuple[int, ...]

    @property
    def group_slots(self) -> int:
        """The number of slots of a group."""
        return ceil(self.rows / self.groups)

    @property
    def chain_slots(self) -> int:
        """The number of slots of a chain."""
        return self.groups * self.group_slots

    @property
    def slots(self) -> int:
        """The number of slots of a node."""
        return self.places * self.chain_slots

    def needed_bytes(self, tokens: int) -> tuple[int, ...]:
        """The bytes that a sequence of so many positions takes at each stage."""
        return tuple(tokens * each + fixed for each, fixed in zip(self.token_bytes, self.fixed_bytes, strict=True))

    def problem(self, prompt: int, max_tokens: int) -> str | None:
        """Why a sequence never fits, in one sentence; None where it does.

        Args:
            prompt: the number of tokens of its prompt.
            max_tokens: the most tokens to add.
        """
        total = prompt + max_tokens
        if total > self.length:
            return (
                f"the prompt of {prompt} tokens and {max_tokens} more are {total} positions; a sequence has at most "
                f"{self.length}: shorten the prompt, ask for fewer tokens, or raise max_length"
            )
        needed = self.needed_bytes(total)
        stage = max(range(len(needed)), key=needed.__getitem__, default=0)
        if needed and needed[stage] > self.cache_bytes:
            return (
                f"the prompt of {prompt} tokens and {max_tokens} more take {needed[stage]} bytes of caches at stage "
                f"{stage}; a node has {self.cache_bytes}: shorten the prompt, ask for fewer tokens, or raise "
                f"cache_bytes"
            )
        return None


def sequence_limits(
    plan: Plan,
    *,
    replicas: tuple[int, ...],
    cache_bytes: int,
    max_rows: int = DEFAULT_ROWS,
    max_length: int | None = None,
    prefill_chunk: int = DEFAULT_CHUNK,
    decode_groups: int | None = None,
    exact_replay: bool = True,
    prefix_reuse: bool = True,
) -> SequenceLimits:
    """The limits of sequences for a plan with a decoder.

    Args:
        plan: the plan.
        replicas: the number of nodes of every stage at the beginning.
        cache_bytes: the most bytes of states on each node.
        max_rows: the most sequences at once on a chain.
        max_length: the most positions of a sequence; None for as many as the model allows.
        prefill_chunk: the most tokens of a prompt in a step, and of all prompts in flight on a chain while any of its
            sequences decodes. A prompt that a model must read in one run may have more.
        decode_groups: the number of groups of a chain; None for as many as stages, and one more where rows of unequal
            length do not share a run.
        exact_replay: whether to replay exactly where the model's scores depend on how tokens are divided into runs.
        prefix_reuse: whether a sequence begins with states of another one, where those of the model can be cut.

    Raises:
        InputError: a number is out of range.
    """
    decoder = plan.decoder
    if decoder is None:
        raise InputError("the plan has no decoder, so it generates no tokens")
    length = min(decoder.max_length if max_length is None else max_length, decoder.max_length)
    chunk = prefill_chunk
    if decoder.chunk == "none":
        length = chunk = min(length, MOST_NEW_TOKENS)
    groups = _groups(plan, decoder) if decode_groups is None else decode_groups
    _check("cache_bytes", cache_bytes, 1 << 50)
    _check("max_rows", max_rows, MOST_ROWS)
    _check("max_length", length, decoder.max_length)
    _check("prefill_chunk", prefill_chunk, MOST_NEW_TOKENS)
    _check("decode_groups", groups, MOST_ROWS)
    groups = min(groups, max_rows)
    reuses, depends = prefix_reuse and decoder.rollback and decoder.chunk != "none", _depends_on_parts(decoder)
    return SequenceLimits(
        cache_bytes=cache_bytes,
        rows=max_rows,
        length=length,
        chunk=chunk,
        reading=prefill_chunk,
        exact=exact_replay and depends,
        reuses=reuses,
        keeps=reuses and all(s.kind == "in-place" or decoder.rows == "holes" for s in decoder.states),
        reuses_text=not depends,
        groups=groups,
        places=_places(replicas, groups * ceil(max_rows / groups)),
        token_bytes=tuple(decoder.token_bytes(stage.index) for stage in plan.stages),
        fixed_bytes=tuple(decoder.fixed_bytes(stage.index) for stage in plan.stages),
    )


def _places(replicas: tuple[int, ...], slots: int) -> int:
    """The number of chains with so many slots that may share a node."""
    most = max(_FEWEST_PLACES, 2 * max(replicas, default=1))
    return max(1, min(most, MOST_SLOTS // slots))


def _check(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise InputError(f"{name} must be a whole number from 1 to {most}, not {value}")


def _groups(plan: Plan, decoder: Decoder) -> int:
    """The usual number of groups: a further one makes steps smaller, unless rows do not share a run anyway."""
    return len(StepGraph(plan).stages) + (decoder.rows in ("equal", "one"))


def _depends_on_parts(decoder: Decoder) -> bool:
    """Whether the scores of a model depend on how its tokens are divided into runs; also true where nobody has tried.

    That is so where activations are rounded to few bits: a difference in the last bit of a kernel becomes a large one.
    """
    return decoder.proof is None or decoder.proof.differences.get("steps", 1.0) > _SAME
