"""Checks of stage files and merged models with ONNX's own checker."""

from __future__ import annotations

from pathlib import Path

import onnx

from onnxsplit.plan_files import load_plan
from onnxsplit.stages.merge import merge


def check_plan(folder: Path, model: Path) -> None:
    """Check that every stage and the merged stages pass the checker if the model does.

    The checker demands a rank of every input and output, so it cannot accept a stage with a cut tensor of unknown rank.
    """
    try:
        onnx.checker.check_model(str(model))
    except onnx.checker.ValidationError:
        return
    merge(folder, folder.parent / "merged.onnx")
    onnx.checker.check_model(str(folder.parent / "merged.onnx"))
    plan = load_plan(folder)
    for stage in plan.stages:
        if all(plan.tensors[name].shape is not None for name in (*stage.inputs, *stage.outputs)):
            onnx.checker.check_model(str(folder / stage.file))
