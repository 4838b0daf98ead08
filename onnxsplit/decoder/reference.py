"""A whole decoder that runs step by step in one session: the measure of everything that a pipeline answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from onnxsplit.decoder.inputs import AnyDecoder, AnyState, controls_of, empty_state, room
from onnxsplit.errors import InputError
from onnxsplit.plan import Level, TensorSpec
from onnxsplit.plan_decoder import RowLayout
from onnxsplit.session import open_session
from onnxsplit.tensors import Array

_ROOM = 64  # buffers of in-place states grow by this number of positions

States = dict[str, Array]
"""The states of some rows, by the names of the inputs."""


class WholeModel(Protocol):
    """The part of :class:`~onnxsplit.session.Session` that runs a model."""

    @property
    def inputs(self) -> tuple[tuple[str, str | None], ...]:
        """Name and type of every input."""

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run the model once; returns all outputs by name."""

    def run_into(self, inputs: Mapping[str, Array], into: Mapping[str, Array]) -> Mapping[str, Array]:
        """The same, with memory for some of the outputs."""


@dataclass(frozen=True)
class StepRunner:
    """Runs steps of a whole decoder; the caller keeps the states.

    Attributes:
        session: the session of the model. Controls that it does not take are left out.
        decoder: the decoder.
        specs: the types and shapes of the inputs.
    """

    session: WholeModel
    decoder: AnyDecoder
    specs: Mapping[str, TensorSpec]

    def empty(self, rows: int, positions: int) -> States:
        """The states before the first step; in-place states have room for ``positions``."""
        positions = room(self.decoder.states, positions)
        return {s.past: empty_state(s, self.specs[s.past], rows, positions) for s in self.decoder.states}

    def run(
        self,
        starts: Sequence[int],
        tokens: Sequence[Sequence[int]],
        states: States,
        *,
        layout: RowLayout = "one",
        all_scores: bool = True,
        shared: bool = False,
    ) -> tuple[Array, States]:
        """Run one step.

        Args:
            starts: for each row, the number of its positions before the step.
            tokens: for each row, its new tokens.
            states: the states before the step.
            layout: how the rows share the run.
            all_scores: True computes the scores of all new positions.
            shared: True lets the session write in-place states into ``states``; False leaves these unchanged.

        Returns:
            The scores, and the states after the step.
        """
        controls = controls_of(
            self.decoder.controls, self.specs, starts, tokens, self._width(starts, states), layout,
            all_scores=all_scores,
        )  # fmt: skip
        taken = {name for name, _ in self.session.inputs}
        inputs = {name: array for name, array in {**states, **controls}.items() if name in taken}
        into = {s.present: states[s.past] for s in self.decoder.states if shared and s.kind == "in-place"}
        outputs = self.session.run_into(inputs, into) if into else self.session.run(inputs)
        return outputs[self.decoder.scores], {state.past: outputs[state.present] for state in self.decoder.states}

    def _width(self, starts: Sequence[int], states: States) -> int:
        for state in self.decoder.states:
            if state.axis is not None and state.kind != "in-place":
                return int(states[state.past].shape[state.axis])
        return max(starts)


def last_scores(scores: Array) -> Array:
    """The scores at the last position of each row, [B, vocabulary]."""
    return scores if scores.ndim == 2 else scores[:, -1]


class ReferenceDecoder:
    """One sequence in one session of the whole model: a prompt, then one token after the other.

    Args:
        model: the model's file, or an open session of it.
        decoder: the decoder, as claimed or as its plan describes it.
        specs: the types and shapes of the model's inputs, such as the tensors of the plan.
        threads: threads of the session.
        level: optimisation level of the session.
    """

    def __init__(
        self,
        model: Path | WholeModel,
        decoder: AnyDecoder,
        specs: Mapping[str, TensorSpec],
        *,
        threads: int = 1,
        level: Level = "all",
    ) -> None:
        session = open_session(model, threads=threads, level=level) if isinstance(model, Path) else model
        self._runner = StepRunner(session, decoder, specs)
        self._in_place = [state for state in decoder.states if state.kind == "in-place"]
        self.length = 0
        self._states = self._runner.empty(1, _ROOM)

    def prefill(self, tokens: Sequence[int], *, chunk: int | None = None) -> Array:
        """Begin a new sequence.

        Args:
            tokens: the prompt.
            chunk: the most tokens of one run; None for the whole prompt in one run.

        Returns:
            The scores of the token that follows, [vocabulary].
        """
        if not tokens:
            raise InputError("a prompt has at least one token; this one has none")
        self.length = 0
        self._states = self._runner.empty(1, _ROOM)
        size = chunk or len(tokens)
        for first in range(0, len(tokens), size):
            scores = self.extend(tokens[first : first + size])
        return scores

    def extend(self, tokens: Sequence[int]) -> Array:
        """Add tokens in one run; returns the scores of the token that follows, [vocabulary]."""
        self._make_room(self.length + len(tokens))
        scores, self._states = self._runner.run([self.length], [tokens], self._states, all_scores=False)
        self.length += len(tokens)
        return np.asarray(last_scores(scores)[0])

    def step(self, token: int) -> Array:
        """Add one token; returns the scores of the token that follows, [vocabulary]."""
        return self.extend([token])

    def greedy(self, prompt: Sequence[int], count: int, *, chunk: int | None = None) -> tuple[list[int], Array]:
        """Continue a prompt with the most probable tokens.

        Args:
            prompt: the tokens to begin with.
            count: the number of tokens to add.
            chunk: as in :meth:`prefill`.

        Returns:
            The tokens that were added, and the scores that each was chosen by, [count, vocabulary].
        """
        rows = [self.prefill(prompt, chunk=chunk)]
        tokens = [int(rows[0].argmax())]
        while len(tokens) < count:
            rows.append(self.step(tokens[-1]))
            tokens.append(int(rows[-1].argmax()))
        return tokens[:count], np.stack(rows[:count])

    def _make_room(self, length: int) -> None:
        """Enlarge the buffers of in-place states whose capacity is free."""
        for state in self._in_place:
            held = self._states[state.past]
            assert state.axis is not None
            size = held.shape[state.axis]
            if state.capacity is None and size < length:
                self._states[state.past] = _longer(state, held, -(-length // _ROOM) * _ROOM)


def _longer(state: AnyState, held: Array, positions: int) -> Array:
    """A state with a larger buffer, filled up with zeros."""
    assert state.axis is not None
    more = [(0, 0)] * held.ndim
    more[state.axis] = (0, positions - held.shape[state.axis])
    return np.pad(held, more)
