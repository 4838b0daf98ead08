"""The probe: short runs of a whole decoder that prove each claim, or show that it does not hold.

    steps        8 tokens in one run = the same tokens one by one
    prefix       present begins with past, bit by bit (in-place and append)
    replaced     the states after 8 tokens in one run = after the same tokens one by one (recurrent and window)
    in-place     past and present in one buffer = in two
    chunk        5 tokens and 3 more in one run = 8 tokens in one run
    rows LAYOUT  three rows of unequal length in one run = each row alone
    chunk rows   the same with 3 new tokens for each row
    last only    the scores of the last position alone = the last of all scores

A model that fails ``steps``, ``prefix`` or ``replaced`` is no decoder. For the other claims, weaker ones are tried.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from onnxsplit.decoder.claim import DecoderClaim, NoDecoder, StateClaim
from onnxsplit.decoder.proven import ProvenDecoder
from onnxsplit.decoder.reference import States, StepRunner, last_scores
from onnxsplit.decoder.row_trials import layouts, rows_together
from onnxsplit.decoder.trials import ClaimTrials, Refuted
from onnxsplit.plan_decoder import ChunkLayout, Proof, RowLayout
from onnxsplit.progress import Say, silent
from onnxsplit.tensors import Array

_PROMPT, _PART, _CHUNK = 8, 5, 3


def probe(
    runner: StepRunner, claim: DecoderClaim, *, allowed: float, rounding: float | None = None, say: Say = silent
) -> ProvenDecoder | NoDecoder:
    """Prove the claims of a decoder by runs of the whole model.

    Args:
        runner: runs the model.
        claim: the claims.
        allowed: the largest difference of scores and states, as a share of their scale.
        rounding: the same between a run of several tokens and runs of one; None for ``allowed``. A model that rounds
            activations to 8 bits turns the last bits in which kernels differ into more.
        say: called with each claim that is tried.
    """
    trials = ClaimTrials(replace(runner, decoder=claim), claim, allowed, rounding or allowed, say)
    if trials.most < _PROMPT:
        return NoDecoder(f"a sequence has at most {trials.most} positions, and a proof needs {_PROMPT}")
    runs: list[_Run] = []
    if not trials.holds("steps", lambda: runs.extend(_one_by_one(trials))):
        return NoDecoder(f"{_PROMPT} tokens in one run are not the same as one by one: {trials.refused['steps']}")
    whole, steps = runs
    if not trials.holds("prefix", lambda: _prefix(trials, steps)):
        return NoDecoder(trials.refused["prefix"])
    if not trials.holds("replaced", lambda: _replaced(trials, whole, steps)):
        return NoDecoder(f"the states after {_PROMPT} tokens depend on the runs: {trials.refused['replaced']}")
    in_place = any(state.kind == "in-place" for state in claim.states)
    if in_place and not trials.holds("in-place", lambda: _in_place(trials, whole, steps)):
        return _appending(runner, trials)
    if any(one.role == "first-scored" for one in claim.controls):
        trials.holds("last only", lambda: _last_only(trials, whole))
    chunked = trials.holds("chunk", lambda: _chunk(trials, whole))
    rows: RowLayout = "one"
    for layout in layouts(claim.states):
        if trials.holds(f"rows {layout}", lambda layout=layout: rows_together(trials, layout, 1)):  # type: ignore[misc]
            rows = layout
            break
    chunk: ChunkLayout = "one-row" if chunked else "none"
    if chunked and rows != "one" and trials.holds("chunk rows", lambda: rows_together(trials, rows, _CHUNK)):
        chunk = "rows"
    return ProvenDecoder(claim, rows, chunk, trials.proof)


@dataclass(frozen=True)
class _Run:
    """The scores of each of the first tokens where they are known, and the states after each run."""

    scores: list[Array | None]
    states: list[States]


def _one_by_one(trials: ClaimTrials) -> tuple[_Run, _Run]:
    """The first tokens in one run, and one by one."""
    tokens = trials.texts[0][:_PROMPT]
    answer, after = trials.run([0], [tokens], trials.empty())
    known = answer.shape[1] if answer.ndim == 3 else 1
    whole = [answer[0, i - _PROMPT] if _PROMPT - i <= known and answer.ndim == 3 else None for i in range(_PROMPT)]
    whole[-1] = last_scores(answer)[0]
    scores: list[Array | None] = []
    states = [trials.empty()]
    for start, token in enumerate(tokens):
        answer, held = trials.run([start], [[token]], states[-1])
        states.append(held)
        scores.append(last_scores(answer)[0])
    for got, expected in zip(scores, whole, strict=True):
        if expected is not None and got is not None:
            trials.compare("steps", got, expected, kernels_differ=True)
    return _Run(whole, [after]), _Run(scores, states)


def _prefix(trials: ClaimTrials, steps: _Run) -> None:
    """Whether a step leaves the positions before it as they are."""
    before, after = steps.states[_PART], steps.states[_PART + 1]
    for state in trials.claim.states:
        if state.kind in ("in-place", "append"):
            kept, now = (_positions(state, states[state.past], _PART) for states in (before, after))
            if kept.tobytes() != now.tobytes():
                raise Refuted(f"{state.present} does not begin with the {_PART} positions of {state.past}")
            trials.differences["prefix"] = 0.0


def _replaced(trials: ClaimTrials, whole: _Run, steps: _Run) -> None:
    for state in trials.claim.states:
        if state.kind in ("recurrent", "window"):
            one, all_at_once = steps.states[-1][state.past], whole.states[-1][state.past]
            trials.compare("replaced", one, all_at_once, kernels_differ=True)


def _in_place(trials: ClaimTrials, whole: _Run, steps: _Run) -> None:
    """Whether past and present may be one buffer: for the first tokens in one run, and one by one."""
    tokens = trials.texts[0][:_PROMPT]
    scores, states = trials.run([0], [tokens], trials.empty(), shared=True)
    _compare_ends(trials, "in-place", scores, states, whole)
    states = trials.empty()
    for start, token in enumerate(tokens):
        scores, states = trials.run([start], [[token]], states, shared=True)
    _compare_ends(trials, "in-place", scores, states, steps)


def _chunk(trials: ClaimTrials, whole: _Run) -> None:
    """Whether tokens in two runs of several are the same as in one run."""
    tokens = trials.texts[0]
    _, states = trials.run([0], [tokens[:_PART]], trials.empty())
    scores, states = trials.run([_PART], [tokens[_PART:_PROMPT]], states)
    _compare_ends(trials, "chunk", scores, states, whole)


def _compare_ends(trials: ClaimTrials, claim: str, scores: Array, states: States, expected: _Run) -> None:
    """Compare the scores of the last of the first tokens, and the states after it."""
    last = expected.scores[-1]
    assert last is not None
    trials.compare(claim, last_scores(scores)[0], last)
    for state in trials.claim.states:
        got, wanted = states[state.past], expected.states[-1][state.past]
        if state.kind in ("in-place", "append"):
            got, wanted = (_positions(state, held, _PROMPT) for held in (got, wanted))
        trials.compare(claim, got, wanted)


def _last_only(trials: ClaimTrials, whole: _Run) -> None:
    answer, _ = trials.run([0], [trials.texts[0][:_PROMPT]], trials.empty(), all_scores=False)
    expected = whole.scores[-1]
    assert expected is not None
    if answer.shape[1] != 1:
        raise Refuted(f"{trials.claim.scores} has {answer.shape[1]} positions instead of one")
    trials.compare("last only", answer[0, 0], expected)


def _appending(runner: StepRunner, trials: ClaimTrials) -> ProvenDecoder | NoDecoder:
    """The proof of the same decoder with states that grow instead of states that are written in place."""
    states = tuple(replace(s, kind="append") if s.kind == "in-place" else s for s in trials.claim.states)
    weaker = probe(
        runner, replace(trials.claim, states=states), allowed=trials.allowed, rounding=trials.rounding, say=trials.say
    )
    if isinstance(weaker, NoDecoder) or weaker.proof is None:
        return NoDecoder(f"its states cannot be written in place: {trials.refused['in-place']}")
    refused = {"in-place": trials.refused["in-place"], **weaker.proof.refused}
    runs = trials.runs + weaker.proof.runs
    return replace(weaker, proof=Proof(runs=runs, differences=weaker.proof.differences, refused=refused))


def _positions(state: StateClaim, held: Array, count: int) -> Array:
    """The first positions of a state."""
    assert state.axis is not None
    return np.ascontiguousarray(np.take(held, range(count), state.axis))
