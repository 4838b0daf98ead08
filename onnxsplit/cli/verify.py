"""The command ``onnxsplit verify``."""

from __future__ import annotations

from pathlib import Path

from onnxsplit.cli.output import (
    MODEL,
    PLAN,
    Output,
    custom_ops_option,
    custom_ops_words,
    inputs_option,
    make_command,
    threads_option,
)
from onnxsplit.errors import OnnxsplitError


@make_command
@PLAN
@MODEL
@inputs_option
@custom_ops_option
@threads_option
def command(
    output: Output,
    *,
    plan: Path,
    model: Path,
    inputs: Path | None,
    custom_ops: tuple[str, ...],
    threads: int | None,
) -> None:
    """Run MODEL and the stages of the plan in DIR on the same inputs, and compare every output."""
    from onnxsplit.stages.verify import verify

    output.say("running the model and its stages")
    comparisons = verify(plan, model, inputs=inputs, threads=threads or 1, custom_ops=custom_ops)
    output.done()
    rows = [
        (
            c.output,
            "bit-equal" if c.exact else f"{c.difference:.1e}",
            f"{c.optimized:.1e}",
            f"{c.moved:.1e}",
            ("equal" if c.good else "DIFFERENT") if c.repeatable else "random",
        )
        for c in comparisons
    ]
    output.table(("output", "optimisation off", "on", "optimisation alone", "verdict"), rows)
    good = all(c.good for c in comparisons)
    allowed = max(c.tolerance for c in comparisons)
    narrowest = comparisons[0].narrowest
    output.line(
        f"\nDifferences are relative to the output's scale. {_reason(narrowest, allowed)} With optimisation on, twice "
        "the difference that it makes to the whole model is allowed, too."
    )
    if any(not c.repeatable for c in comparisons):
        output.line("Outputs marked random differ between two runs of the whole model, so they cannot be compared.")
    if good:
        more = custom_ops_words(custom_ops)
        output.line(f"Next: onnxsplit run {plan} --inputs in.npz --outputs out.npz{more}")
    fields = ("output", "exact", "difference", "optimized", "moved", "repeatable", "good")
    output.result(
        {
            "good": good,
            "tolerance": allowed,
            "narrowest_type": narrowest,
            "outputs": [{name: getattr(c, name) for name in fields} for c in comparisons],
        }
    )
    if not good:
        if output.as_json:
            raise SystemExit(1)
        raise OnnxsplitError(
            f"the outputs of the stages in {plan} differ from those of {model}; the table says by how much"
        )


def _reason(narrowest: str | None, allowed: float) -> str:
    """Text about the difference that is allowed with optimisation off, and why."""
    if narrowest is None:
        return f"Allowed with optimisation off: {allowed:.0e} (the model computes in float32 or wider)."
    return (
        f"Allowed with optimisation off: {allowed:.1e}, since {narrowest} is the narrowest float type that crosses a "
        "cut or is computed in, or twice the difference that optimisation makes to the whole model."
    )
