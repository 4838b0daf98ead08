"""Trials of a decoder's claims: runs of the whole model, and the differences that they show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxsplit.decoder.claim import DecoderClaim
from onnxsplit.decoder.inputs import room
from onnxsplit.decoder.reference import States, StepRunner
from onnxsplit.distance import distance
from onnxsplit.errors import InputError, ModelError
from onnxsplit.plan_decoder import Proof
from onnxsplit.progress import Say
from onnxsplit.tensors import Array

_ROOM = 96  # positions of a sequence in a trial
_GARBAGE = 4.0  # the scale of what lies in a buffer before its first step


class Refuted(Exception):
    """A claim does not hold; the text says why."""


@dataclass
class ClaimTrials:
    """The trials of one decoder, and what they have shown so far.

    Attributes:
        runner: runs the model.
        claim: what is claimed of it.
        allowed: the largest difference of scores and states, as a share of their scale.
        rounding: the same for runs that other kernels compute, such as those for one token; above ``allowed`` where
            the model rounds activations to few bits.
        say: called with each claim that is tried.
        runs: the number of runs.
        differences: the largest difference that was seen for each claim that holds.
        refused: why each other claim does not hold.
    """

    runner: StepRunner
    claim: DecoderClaim
    allowed: float
    rounding: float
    say: Say
    runs: int = 0
    differences: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.most = min(room(self.claim.states, _ROOM), self.claim.max_length or _ROOM)
        below = min(self.claim.vocabulary, self.claim.tokens_below or self.claim.vocabulary)
        random = np.random.default_rng(7)
        self.texts: list[list[int]] = random.integers(0, below, (3, self.most)).tolist()

    @property
    def proof(self) -> Proof:
        """What the trials have shown so far."""
        return Proof(runs=self.runs, differences=dict(self.differences), refused=dict(self.refused))

    def holds(self, claim: str, tried: Callable[[], None]) -> bool:
        """Try a claim; ``tried`` raises :class:`Refuted` if it does not hold."""
        self.say(f"proving the decoder: {claim}")
        before = dict(self.differences)
        try:
            tried()
        except Refuted as error:
            self.differences = before
            self.refused[claim] = str(error)
            return False
        return True

    def run(
        self, starts: Sequence[int], tokens: Sequence[Sequence[int]], states: States, **how: Any
    ) -> tuple[Array, States]:
        """Run one step, as :meth:`~onnxsplit.decoder.reference.StepRunner.run` does.

        Raises:
            Refuted: the model does not run.
        """
        self.runs += 1
        try:
            return self.runner.run(starts, tokens, states, **how)
        except (ModelError, InputError) as error:
            raise Refuted(str(error)) from error

    def empty(self) -> States:
        """The states of one row before its first step. Buffers of in-place states hold the remains of other rows."""
        states = self.runner.empty(1, _ROOM)
        random = np.random.default_rng(11)
        for state in self.claim.states:
            held = states[state.past]
            if state.kind == "in-place" and held.dtype.kind not in "iub":
                states[state.past] = np.asarray(random.normal(0.0, _GARBAGE, held.shape)).astype(held.dtype)
        return states

    def compare(self, claim: str, got: Array, expected: Array, *, kernels_differ: bool = False) -> None:
        """Note how far two tensors are apart.

        Args:
            claim: the claim that is tried.
            got: scores or states.
            expected: those that they are compared with.
            kernels_differ: whether other kernels have computed these.

        Raises:
            Refuted: they are too far apart.
        """
        apart = distance(got, expected)
        allowed = self.rounding if kernels_differ else self.allowed
        if not apart <= allowed:
            raise Refuted(f"the results are {apart:.2g} of their scale apart, and {allowed:.2g} is allowed")
        self.differences[claim] = max(self.differences.get(claim, 0.0), apart)


def copied(states: States) -> States:
    """The states in memory of their own."""
    return {name: array.copy() for name, array in states.items()}
