"""Runs the steps of a stage: the states of its sequences, and at the last stage the choice of their next tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnxsplit.errors import ModelError
from onnxsplit.plan import Plan
from onnxsplit.session import Session
from onnxsplit.tensors import Array, dtype_name
from runtime.guided.guide import GrammarError
from runtime.memory.layouts import OutputShapes
from runtime.node.caches.bank import StepSpan
from runtime.node.caches.caches import Caches
from runtime.node.sampling import Guide, TokenSampler
from runtime.node.slots import Move, Placed
from runtime.topology import StepGraph
from runtime.wire.messages.sequences import MOST_FAILURE, Drawn, Opening, StepRow

_SIGNATURES = 256  # combinations of sizes whose shapes are remembered


class SequenceRunner:
    """Runs the steps of one stage.

    Args:
        plan: the plan; it has a decoder.
        stage: the stage.
        session: its session; must be ``bindable``.
        slots: the number of slots.
        length: the most positions of a sequence.
        guides: makes the guide for a grammar, and raises ModelError where it cannot.

    Raises:
        MemoryError: the system cannot reserve the room for the states; says what to do.
    """

    def __init__(
        self, plan: Plan, stage: int, session: Session, slots: int, length: int, guides: Callable[[str], Guide]
    ) -> None:
        decoder = plan.decoder
        assert decoder is not None
        longest = min(length or decoder.max_length, decoder.max_length)
        self._caches = Caches(plan, stage, session, slots, longest)
        self._guides = guides
        self._scores = decoder.scores
        self._is_tail = StepGraph(plan).tail == stage
        below = decoder.vocabulary if decoder.tokens_below is None else decoder.tokens_below
        self._below = min(below, decoder.vocabulary)
        self._samplers: dict[int, TokenSampler] = {}  # by slot
        self._shapes: dict[tuple[int, int, tuple[str, ...]], OutputShapes] = {}

    def shapes(self, rows: Sequence[StepRow], names: tuple[str, ...]) -> OutputShapes:
        """Types and shapes of outputs, from the last step with as many rows and new tokens; empty if there was none."""
        return self._shapes.get((len(rows), len(rows[0].tokens), names), {})

    def run(
        self,
        rows: Sequence[StepRow],
        placed: Placed,
        tensors: Mapping[str, Array],
        into: Mapping[str, Array],
        names: tuple[str, ...],
    ) -> tuple[Mapping[str, Array], tuple[Drawn, ...]]:
        """Run a step.

        Args:
            rows: its rows.
            placed: what to do before, and which rows are live.
            tensors: what other stages have sent, by name.
            into: arrays for outputs, with the types and shapes of :meth:`shapes`.
            names: the outputs that leave the node.

        Returns:
            These outputs, and the tokens that were chosen. Of scores, only the last position of each row leaves.

        Raises:
            ModelError: ONNX Runtime could not run the step, its scores are no numbers, or a grammar cannot be followed.
            InputError: the rows cannot share a run.
        """
        self.move(placed.moves)
        self.clear(placed.clear)
        new = len(rows[0].tokens)
        step = StepSpan(rows[0].slot, tuple([row.start for row in rows]), new, placed.live)
        if self._is_tail and new > 1:
            into = {name: array for name, array in into.items() if name != self._scores}
        outputs = self._caches.run(step, [row.tokens for row in rows], tensors, into)
        drawn: tuple[Drawn, ...] = ()
        if self._is_tail:
            scores = _last_position(outputs[self._scores], len(rows), new, self._below)
            outputs[self._scores] = scores
            drawn = self._draw(rows, placed.live, scores)
        leaving = {name: outputs[name] for name in names}
        self._learn(len(rows), new, names, leaving)
        return leaving, drawn

    def _learn(self, rows: int, new: int, names: tuple[str, ...], leaving: Mapping[str, Array]) -> None:
        known = self._shapes.get((rows, new, names))
        if known is not None and all(known[name][1] == array.shape for name, array in leaving.items()):
            return
        if len(self._shapes) >= _SIGNATURES:
            self._shapes.clear()
        typed = {name: (dtype_name(array.dtype), array.shape) for name, array in leaving.items()}
        self._shapes[rows, new, names] = {n: (dtype, shape) for n, (dtype, shape) in typed.items() if dtype is not None}

    def _draw(self, rows: Sequence[StepRow], live: Sequence[bool], scores: Array) -> tuple[Drawn, ...]:
        """Note the tokens of the live rows, and choose those that follow."""
        drawn = []
        for place, row in enumerate(rows):
            if not live[place]:
                continue
            if row.opening is not None:
                self._samplers[row.slot] = self._sampler(row.opening)
            sampler = self._samplers[row.slot]
            sampler.feed(row.start, row.tokens)
            if row.draw:
                try:
                    drawn.append(sampler.draw(row, scores[place].reshape(-1)))
                except GrammarError as error:  # of this row alone
                    drawn.append(_not_drawn(row, error))
        return tuple(drawn)

    def _sampler(self, opening: Opening) -> TokenSampler:
        sampling = opening.sampling
        guide = self._guides(sampling.grammar) if sampling.grammar else None
        sampler = TokenSampler(sampling, opening.prompt, self._below, guide)
        sampler.feed(0, opening.reused)
        return sampler

    def move(self, moves: Sequence[Move]) -> None:
        """Move sequences to other slots, or copy their states, all at once."""
        if not moves:
            return
        self._caches.move(moves)
        moved = {move.target: self._samplers.pop(move.source, None) for move in moves if not move.keep}
        self._samplers.update({slot: sampler for slot, sampler in moved.items() if sampler is not None})

    def clear(self, slots: Sequence[int]) -> None:
        """Forget the sequences in some slots, and give their memory back to the system."""
        if not slots:
            return
        self._caches.clear(slots)
        for slot in slots:
            self._samplers.pop(slot, None)


def _last_position(scores: Array, rows: int, new: int, below: int) -> Array:
    """The scores of the last position of each row.

    Raises:
        ModelError: they are not one vector of at least ``below`` scores for each row, or for each of its positions.
    """
    shape = scores.shape
    if shape[:-1] not in ((rows,), (rows, 1), (rows, new)) or shape[-1] < below:
        raise ModelError(
            f"the scores of {rows} rows with {new} new tokens each have the shape {list(shape)}; they must be "
            f"one vector of at least {below} for each row or each new token"
        )
    return np.ascontiguousarray(scores[:, -1:]) if len(shape) == 3 and shape[1] > 1 else scores


def _not_drawn(row: StepRow, error: GrammarError) -> Drawn:
    return Drawn(row.sequence, row.epoch, row.start + len(row.tokens), 0, failure=str(error)[:MOST_FAILURE])
