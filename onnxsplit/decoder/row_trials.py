"""Trials of rows that share a run: each row must get the scores that it gets alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxsplit.decoder.inputs import AnyState
from onnxsplit.decoder.reference import States, last_scores
from onnxsplit.decoder.trials import ClaimTrials, copied
from onnxsplit.plan_decoder import RowLayout
from onnxsplit.tensors import Array

_LENGTHS = (17, 5, 40)
_STEPS = 3


def layouts(states: Sequence[AnyState]) -> tuple[RowLayout, ...]:
    """The layouts of rows that some states allow, the most useful first."""
    kinds = {state.kind for state in states if state.axis is not None}
    if kinds <= {"in-place"}:
        return ("right", "equal")
    return ("left", "holes", "equal") if kinds == {"append"} else ("equal",)


def rows_together(trials: ClaimTrials, layout: RowLayout, new: int) -> None:
    """Try rows of unequal length in one run, for some steps.

    Args:
        trials: the trials of the decoder.
        layout: how the rows share the run.
        new: the number of new tokens of each row in a step.

    Raises:
        Refuted: a row gets other scores than alone, or the model does not run.
    """
    claim = f"rows {layout}" if new == 1 else "chunk rows"
    limit = min(max(_LENGTHS), trials.most - _STEPS * new)
    lengths = [limit // 2] * len(_LENGTHS) if layout == "equal" else [n * limit // max(_LENGTHS) for n in _LENGTHS]
    starts = [max(1, length) for length in lengths]
    alone = [trials.run([0], [text[:n]], trials.empty())[1] for n, text in zip(starts, trials.texts, strict=True)]
    expected: list[list[Array]] = []
    for states, start, text in zip(alone, starts, trials.texts, strict=True):
        held, scores = copied(states), []
        for first in range(start, start + _STEPS * new, new):
            answer, held = trials.run([first], [text[first : first + new]], held)
            scores.append(last_scores(answer)[0])
        expected.append(scores)
    together = _Together(trials, layout, starts, alone, room=_STEPS * new)
    for step in range(_STEPS):
        answer = together.step([text[n : n + new] for n, text in zip(together.starts, trials.texts, strict=True)])
        for row, scores in zip(last_scores(answer), expected, strict=True):
            trials.compare(claim, row, scores[step])


class _Together:
    """The states of several rows in one layout."""

    def __init__(
        self, trials: ClaimTrials, layout: RowLayout, starts: Sequence[int], alone: Sequence[States], room: int
    ) -> None:
        self._trials, self._layout = trials, layout
        self.starts = list(starts)
        width = max(starts) + (room if layout == "holes" else 0)
        self._states = {
            state.past: np.concatenate(
                [self._placed(state, states[state.past], width) for states in alone], state.batch_axis
            )
            for state in trials.claim.states
        }

    def step(self, tokens: Sequence[Sequence[int]]) -> Array:
        """Run one step; returns its scores."""
        before = self._states
        scores, after = self._trials.run(self.starts, tokens, before, layout=self._layout, shared=True)
        new = len(tokens[0])
        if self._layout == "holes":
            for state in self._trials.claim.states:
                if state.kind == "append":
                    after[state.past] = self._filled(state, before[state.past], after[state.past], new)
        self._states = after
        self.starts = [start + new for start in self.starts]
        return scores

    def _placed(self, state: AnyState, held: Array, width: int) -> Array:
        """The state of one row as a part of a wider one."""
        if state.kind != "append" or state.axis is None or self._layout == "equal":
            return held
        more = width - held.shape[state.axis]
        padding = [(0, 0)] * held.ndim
        padding[state.axis] = (more, 0) if self._layout == "left" else (0, more)
        return np.pad(held, padding)

    def _filled(self, state: AnyState, past: Array, present: Array, new: int) -> Array:
        """Past with the new positions of each row behind those that it has."""
        assert state.axis is not None
        width = past.shape[state.axis]
        filled = past.copy()
        for row, start in enumerate(self.starts):
            to: list[slice | int] = [slice(None)] * past.ndim
            to[state.batch_axis] = row
            source = list(to)
            to[state.axis], source[state.axis] = slice(start, start + new), slice(width, width + new)
            filled[tuple(to)] = present[tuple(source)]
        return filled
