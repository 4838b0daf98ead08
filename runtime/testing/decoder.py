"""A simulated decoder, and its sequences: the token that follows a text is a hash of all of it. Pure.

Each node keeps the text that its slots hold, as it has come with the rows of steps. The last stage compares the texts
of all stages. So a wrong slot, a wrong epoch or a lost step at any node makes a wrong token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from runtime.node.slots import Placed
from runtime.wire.messages.sequences import Drawn, StepRow


def next_token(text: Sequence[int], vocabulary: int) -> int:
    """The token that follows a text."""
    return int.from_bytes(blake2b(repr(tuple(text)).encode(), digest_size=8).digest(), "little") % vocabulary


class SimulatedSlots:
    """The texts in the slots of a simulated node.

    Attributes:
        texts: the text in each slot that is in use.
    """

    def __init__(self) -> None:
        self.texts: dict[int, list[int]] = {}

    def run(self, rows: Sequence[StepRow], placed: Placed) -> tuple[tuple[int, ...], ...]:
        """Run a step; returns the text of each row up to its last token. Dead rows write as live ones do."""
        moved = {move.target: self.texts[move.source][: move.length] for move in placed.moves}
        for move in placed.moves:
            if not move.keep:
                self.texts.pop(move.source, None)
        self.texts.update(moved)
        self.clear(placed.clear)
        for row in rows:
            text = self.texts.setdefault(row.slot, [])
            text[row.start :] = row.tokens
        return tuple(tuple(self.texts[row.slot]) for row in rows)

    def clear(self, slots: Iterable[int]) -> None:
        """Forget the texts in some slots."""
        for slot in slots:
            self.texts.pop(slot, None)


def draw(
    rows: Sequence[StepRow],
    placed: Placed,
    texts: Sequence[tuple[int, ...]],
    inputs: Mapping[str, Any],
    vocabulary: int,
) -> tuple[Drawn, ...]:
    """The tokens that the last stage chooses.

    Args:
        rows: the rows of the step.
        placed: which of them are live.
        texts: the text of each row at this stage.
        inputs: the outputs of other stages, which hold their texts.
        vocabulary: the number of tokens.
    """
    others = [texts_in for tensor in inputs.values() for texts_in in _texts_in(tensor)]
    drawn = []
    for place, (row, live) in enumerate(zip(rows, placed.live, strict=True)):
        if row.draw and live:
            seen = {texts[place], *(other[place] for other in others)}
            token = next_token(texts[place] if len(seen) == 1 else [*map(hash, sorted(seen))], vocabulary)
            drawn.append(Drawn(row.sequence, row.epoch, row.start + len(row.tokens), token))
    return tuple(drawn)


def _texts_in(tensor: tuple[Any, ...]) -> Iterable[tuple[tuple[int, ...], ...]]:
    """The texts of a stage and of all stages before it, in an output (name, texts, inputs...) of a step."""
    yield tensor[1]
    for other in tensor[2:]:
        yield from _texts_in(other)


@dataclass
class SimulatedSequence:
    """A sequence of a simulated pipeline, as its caller sees it.

    Attributes:
        prompt: its prompt.
        max_tokens: the most tokens to add.
        end_tokens: the tokens that end it.
        drawn: the tokens that its caller has got.
        ends: how it has ended, a reason or an error; more than one is a bug.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    end_tokens: tuple[int, ...] = ()
    drawn: list[Drawn] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)

    def check(self, vocabulary: int) -> None:
        """Check that every token has come once and in order, that it is right, and that the end is the right one.

        Raises:
            AssertionError: something is wrong; an error in place of the end is not.
        """
        text = list(self.prompt)
        for token in self.drawn:
            assert token.position == len(text), f"token {token.position} came as number {len(text)}"
            assert token.token == next_token(text, vocabulary), f"token {len(text)} is wrong"
            assert text[-1] not in self.end_tokens or len(text) == len(self.prompt), (
                "the sequence goes on after its end"
            )
            text.append(token.token)
        assert len(self.ends) <= 1, f"the sequence has ended {len(self.ends)} times"
        assert len(self.drawn) <= self.max_tokens
        if "stop" in self.ends:
            assert text[-1] in self.end_tokens
        elif "length" in self.ends:
            assert len(self.drawn) == self.max_tokens
