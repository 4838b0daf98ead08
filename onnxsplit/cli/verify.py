"""The command ``onnxsplit verify``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxsplit.cli.model_options import (
    MODEL,
    PLAN,
    custom_ops_option,
    custom_ops_words,
    examples_option,
    threads_option,
)
from onnxsplit.cli.output import Output, make_command
from onnxsplit.cli.series import first_of_many
from onnxsplit.errors import OnnxsplitError

if TYPE_CHECKING:
    from onnxsplit.cli.decoding import DecodeComparison
    from onnxsplit.stages.chain import StageOnProvider
    from onnxsplit.stages.comparison import Comparison


@make_command
@PLAN
@MODEL
@examples_option
@custom_ops_option
@threads_option
def command(
    output: Output,
    *,
    plan: Path,
    model: Path,
    inputs: tuple[Path, ...],
    custom_ops: tuple[str, ...],
    threads: int | None,
) -> None:
    """Run MODEL and the stages of the plan in DIR on the same inputs, and compare every output."""
    from onnxsplit.cli.decoding import compare_decoding
    from onnxsplit.cli.providers import provider_lines
    from onnxsplit.stages.verify import verify

    output.say("running the model and its stages")
    ran: list[StageOnProvider] = []
    comparisons = verify(plan, model, inputs=inputs, threads=threads or 1, custom_ops=custom_ops, tell=ran.append)
    ran = list({stage.stage: stage for stage in ran}.values())  # each runs once for each file of inputs
    output.done()
    _show(output, comparisons)
    good = all(c.good for c in comparisons)
    output.say("continuing a sequence in a pipeline and in the whole model")
    decoding = compare_decoding(plan, model, threads=threads or 1, allowed=_allowed(comparisons), custom_ops=custom_ops)
    output.done()
    allowed = max(c.tolerance for c in comparisons)
    narrowest = comparisons[0].narrowest
    budget = comparisons[0].budget
    output.line(
        f"\nDifferences are relative to the output's scale. {_reason(narrowest, allowed)} With optimisation on, twice "
        "the difference that it makes to the whole model is allowed, too."
    )
    if budget:
        output.line(_narrow(plan, comparisons))
    for text in provider_lines(ran, max(c.provider_moved for c in comparisons)):
        output.line(text)
    if any(not c.repeatable for c in comparisons):
        output.line("Outputs marked random differ between two runs of the whole model, so they cannot be compared.")
    if decoding is not None:
        good = good and decoding.good
        output.line(_decoded(decoding))
    if good:
        output.line(f"Next: {_next_command(plan)}{custom_ops_words(custom_ops)}")
    fields = ("output", "exact", "difference", "optimized", "moved", "provider_moved", "repeatable", "good")
    output.result(
        {
            "good": good,
            "tolerance": allowed,
            "border_budget": budget or None,
            "narrowest_type": narrowest,
            "outputs": [{name: getattr(c, name) for name in fields} for c in comparisons],
            "decoding": decoding,
            "providers": ran,
        }
    )
    if not good:
        if output.as_json:
            raise SystemExit(1)
        raise OnnxsplitError(
            f"the outputs of the stages in {plan} differ from those of {model}; the table says by how much"
        )


def _show(output: Output, comparisons: Sequence[Comparison]) -> None:
    """Print a table of the outputs. Of many that are equal, such as a decoder's caches, the last share a row."""
    _, folded = first_of_many([c for c in comparisons if c.good and c.repeatable])
    rows = [
        (
            c.output,
            "bit-equal" if c.exact else f"{c.difference:.1e}",
            f"{c.optimized:.1e}",
            f"{c.moved:.1e}",
            ("equal" if c.good else "DIFFERENT") if c.repeatable else "random",
        )
        for c in comparisons
        if c not in folded
    ]
    if folded:
        worst = max(c.difference for c in folded)
        exact = "bit-equal" if all(c.exact for c in folded) else f"{worst:.1e}"
        others = (f"{max(c.optimized for c in folded):.1e}", f"{max(c.moved for c in folded):.1e}")
        rows.append((f"{len(folded)} more, at most", exact, *others, "equal"))
    output.table(
        ("output", "optimisation off", "on", "optimisation alone", "verdict"),
        rows,
        may_go=("optimisation alone", "optimisation off", "on", "verdict"),
    )


def _next_command(plan: Path) -> str:
    """What to do with a verified plan: continue a text where it has a tokenizer, or run it on inputs."""
    from onnxsplit.plan_files import load_plan

    decoder = load_plan(plan, check_files=False).decoder
    if decoder is not None and decoder.tokenizer is not None:
        return f'onnxsplit generate {plan} "The capital of France is" --max-tokens 16'
    return f"onnxsplit run {plan} --inputs in.npz --outputs out.npz"


def _allowed(comparisons: Sequence[Comparison]) -> float:
    """The difference of scores that is allowed between a pipeline that keeps states and the whole model."""
    return max(max(c.tolerance, c.budget, 2 * c.moved) for c in comparisons)


def _narrow(plan: Path, comparisons: Sequence[Comparison]) -> str:
    """Text about the budget of narrow borders."""
    from onnxsplit.plan_files import load_plan
    from onnxsplit.views.borders import error_text

    borders = load_plan(plan, check_files=False).borders
    assert borders is not None
    found = max(max(c.difference, c.optimized) for c in comparisons)
    return f"Narrow borders may cause differences up to {error_text(borders.tolerance)}; found: {error_text(found)}."


def _decoded(decoding: DecodeComparison) -> str:
    """Text about the tokens of a pipeline that keeps states."""
    tokens = f"{decoding.equal} of {decoding.steps} most probable tokens are equal"
    if decoding.equal < decoding.steps:
        tokens = (
            f"{decoding.equal} tokens are equal, then the whole model prefers another one by {decoding.margin:.1e} of "
            "the scale"
        )
    return (
        f"A text continued in a pipeline, with its states on the nodes, and in the whole model: {tokens}. "
        f"The scores differ by {decoding.difference:.1e} (allowed: {decoding.allowed:.1e}): "
        + ("equal." if decoding.good else "DIFFERENT.")
    )


def _reason(narrowest: str | None, allowed: float) -> str:
    """Text about the difference that is allowed with optimisation off, and why."""
    if narrowest is None:
        return f"Allowed with optimisation off: {allowed:.0e} (the model computes in float32 or wider)."
    return (
        f"Allowed with optimisation off: {allowed:.1e}, since {narrowest} is the narrowest float type that crosses a "
        "cut or is computed in, or twice the difference that optimisation makes to the whole model."
    )
