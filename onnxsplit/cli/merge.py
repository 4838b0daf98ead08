"""The command ``onnxsplit merge``."""

from __future__ import annotations

from pathlib import Path

from onnxsplit.cli.help import path_option
from onnxsplit.cli.model_options import PLAN
from onnxsplit.cli.output import Output, binary, make_command


@make_command
@PLAN
@path_option("-o", "--out", required=True, metavar="model.onnx", help="Model file to write.")
def command(output: Output, *, plan: Path, out: Path) -> None:
    """Join the stages of the plan in DIR into one model again."""
    from onnxsplit.files import check_outputs
    from onnxsplit.stages.merge import merge

    check_outputs(out)
    output.say("merging")
    merged = merge(plan, out)
    output.done()
    output.line(f"Wrote {out} ({binary(out.stat().st_size)}) from {len(merged.stages)} stages.")
    output.line(f"Next: onnxsplit inspect {out}")
    output.result({"model": out, "stages": len(merged.stages)})
