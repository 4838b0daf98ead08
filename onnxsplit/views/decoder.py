"""What a plan or a report says about a decoder, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from onnxsplit.plan import Plan
from onnxsplit.plan_decoder import Decoder, State

_ROWS = {
    "right": "rows of any lengths share a run",
    "left": "rows of any lengths share a run, with padding before them",
    "holes": "rows of any lengths share a run, with padding behind them",
    "equal": "only rows of equal length share a run",
    "one": "each row runs alone",
}
_CHUNKS = {
    "rows": "prompts run in chunks, several in one run",
    "one-row": "prompts run in chunks, one in a run",
    "none": "a prompt runs in one piece",
}


def decoder_lines(plan: Plan, decoder: Decoder) -> Iterator[str]:
    """What ``partition`` says of a decoder, line by line."""
    yield (
        f"Decoder: {_states(decoder.states)}; {_ROWS[decoder.rows]}; {_CHUNKS[decoder.chunk]}; at most "
        f"{decoder.max_length} positions."
    )
    token = [decoder.token_bytes(stage.index) for stage in plan.stages]
    fixed = [decoder.fixed_bytes(stage.index) for stage in plan.stages]
    for what, sizes in (("a token", token), ("a sequence", fixed)):
        if any(sizes):
            by_stage = ", ".join(f"stage {index} {size}" for index, size in enumerate(sizes))
            yield f"Bytes of states for {what}: {by_stage}."
    crossing = [cut for cut in plan.cuts if cut.tensor not in decoder.presents()]
    if crossing:
        named = ", ".join(f"{cut.tensor} ({cut.bytes} bytes)" for cut in crossing)
        yield f"In a step of {decoder.cost_rows} rows, this crosses: {named}."
    if decoder.cost_rows:
        yield (
            f"Costs are those of a step of {decoder.cost_rows} rows with {decoder.cost_context} positions each; stages "
            f"have memory for {decoder.cache_tokens} positions."
        )
    yield from _proof_lines(decoder)
    if decoder.tokenizer is not None:
        yield f"Text: {', '.join(entry.name for entry in decoder.text)} beside the model."
    else:
        yield "No text, numbers of tokens only: there is no tokenizer.json beside the model."


def _states(states: tuple[State, ...]) -> str:
    """The number of states by kind."""
    counts = Counter(state.kind for state in states)
    return ", ".join(f"{count} states {kind}" for kind, count in counts.items())


def _proof_lines(decoder: Decoder) -> Iterator[str]:
    proof = decoder.proof
    if proof is None:
        yield "Nothing was proven: the model was not run."
        return
    largest = max(proof.differences, key=lambda name: proof.differences[name], default=None)
    difference = f"; the largest difference is {proof.differences[largest]:.2g} ({largest})" if largest else ""
    yield f"Proven by {proof.runs} runs: {', '.join(proof.differences)}{difference}."
    for claim, reason in proof.refused.items():
        yield f"Not used: {claim}, because {_short(reason)}."


def _short(reason: str, most: int = 160) -> str:
    """The end of a long message of ONNX Runtime, where it says why."""
    text = reason.rpartition("Status Message: ")[2].rstrip(". ")
    return text if len(text) <= most else text[:most] + " ..."
