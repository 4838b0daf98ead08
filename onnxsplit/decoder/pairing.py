"""The pairs of past and present, from what names, structure and the user say together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnxsplit.decoder.names import NamedPairs
from onnxsplit.decoder.override import Override, StateOverride
from onnxsplit.decoder.reasons import DECIDE, NotClaimed, listed
from onnxsplit.decoder.traces import Trace
from onnxsplit.plan import TensorSpec


@dataclass(frozen=True)
class StatePair:
    """An input and an output that belong together.

    Attributes:
        past: the input.
        present: the output.
        trace: how the graph makes the output from the input; None where only names say so.
        given: what the user says of it; None for nothing.
    """

    past: str
    present: str
    trace: Trace | None = None
    given: StateOverride | None = None


def agreed_pairs(
    named: NamedPairs,
    found: Mapping[str, Mapping[str, Trace]],
    repeated: Mapping[str, str],
    specs: Mapping[str, TensorSpec],
    override: Override,
) -> tuple[StatePair, ...]:
    """Pair the states by names and structure. Both must agree where both speak; the user's pairs come before both.

    Args:
        named: pairs by names.
        found: pairs by structure: for each input, the outputs that continue it.
        repeated: outputs that repeat an input unchanged, with the input.
        specs: types and shapes of inputs and outputs.
        override: the user's decisions.

    Raises:
        NotClaimed: names and structure disagree, or structure finds several outputs for one input.
    """
    given = {state.past: state for state in override.states}
    taken = {state.present for state in override.states}
    maker = {present: past for past, presents in found.items() for present in presents}
    pairs = [
        StatePair(past, state.present, found.get(past, {}).get(state.present), state) for past, state in given.items()
    ]
    for past, present in named.pairs.items():
        if past in given or present in taken:
            continue
        if repeated.get(present) == past:
            raise NotClaimed(
                f"{past!r} is passed on unchanged as {present!r}, as caches of cross attention are; models with an "
                "encoder are not run with resident caches yet"
            )
        _check_agreement(past, present, found.get(past, {}), maker.get(present))
        pairs.append(StatePair(past, present, found.get(past, {}).get(present)))
    known = {pair.past for pair in pairs} | set(given)
    presents = {pair.present for pair in pairs}
    for past, continued in found.items():
        free = [name for name in continued if name not in presents and _may_pass(past, name, continued[name], specs)]
        if past in known or not free:
            continue
        if len(free) > 1:
            raise NotClaimed(f"the graph makes several outputs from the cache {past!r}: {listed(free)}; {DECIDE}")
        pairs.append(StatePair(past, free[0], continued[free[0]]))
    return tuple(pairs)


def _check_agreement(past: str, present: str, continued: Mapping[str, Trace], maker: str | None) -> None:
    """Refuse a pair by names that the structure of the graph contradicts."""
    if present in continued:
        return
    if maker is not None:
        found = f"{maker!r} with {present!r}"
    elif continued:
        found = f"{past!r} with {next(iter(continued))!r}"
    else:
        return
    raise NotClaimed(f"names pair {past!r} with {present!r}, but the ops of the graph pair {found}; {DECIDE}")


def _may_pass(past: str, present: str, trace: Trace, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether an output can be given as the input of the next step, as far as types and shapes say."""
    before, after = specs.get(past), specs.get(present)
    if before is None or before.shape is None or (after is not None and after.dtype != before.dtype):
        return False
    if after is not None and after.shape is not None and len(after.shape) != len(before.shape):
        return False
    return trace.kind != "append" or trace.axis is None or not isinstance(before.shape[trace.axis], int)
