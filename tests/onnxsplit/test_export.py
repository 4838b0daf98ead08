"""Recipes to ONNX and into stages, small ones of each kind."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from onnxsplit.errors import ExportError, MissingDependency
from onnxsplit.export import TOLERANCE, export
from onnxsplit.planner import partition
from onnxsplit.verify import verify

MODELS = Path(__file__).parents[2] / "models"
SMALL = {
    "resnet50": {"blocks": (1, 1, 1, 1), "width": 8, "size": 32, "classes": 10},
    "bert": {"layers": 2, "width": 32, "heads": 2, "vocabulary": 100, "positions": 32, "sequence": 16},
    "gpt2": {"layers": 2, "width": 32, "heads": 2, "vocabulary": 100, "positions": 32, "sequence": 16},
    "inception": {"blocks": 2, "width": 8, "size": 32, "classes": 10},
    "multitask": {"depth": 1, "width": 8, "size": 32, "classes": 5},
}
FREE = {"bert": {"batch", "sequence"}, "gpt2": {"batch", "sequence"}}


@pytest.mark.parametrize("name", list(SMALL))
def test_a_recipe_becomes_a_model_that_can_be_cut(name, tmp_path):
    pytest.importorskip("torch", reason="the exporter's tests need the extra torch")
    pytest.importorskip("onnxscript", reason="the exporter's tests need the extra torch")
    out = tmp_path / f"{name}.onnx"
    exported = export(str(MODELS / f"{name}.py"), out, parameters=SMALL[name])
    assert exported.differences
    assert max(exported.differences.values()) <= TOLERANCE
    proto = onnx.load(out)
    free = {d.dim_param for value in proto.graph.input for d in value.type.tensor_type.shape.dim if d.dim_param}
    assert free == FREE.get(name, {"batch"})
    sizes = {"sequence": 16} if "sequence" in free else None
    partition(out, stages=3, out=tmp_path / "m.plan", costs="analytic", dims=sizes)
    assert all(comparison.good and comparison.difference == 0 for comparison in verify(tmp_path / "m.plan", out))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["m.plan", f"{name}.onnx"])


def recipe(tmp_path, text: str) -> str:
    (tmp_path / "recipe.py").write_text(text)
    return str(tmp_path / "recipe.py")


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("", ExportError, "has no function 'build'"),
        ("def build(): return 1", ExportError, "returned a int"),
        ("def build(a): return 1", ExportError, "missing 1 required"),
        ("import a_framework_that_is_not_there", MissingDependency, "a_framework_that_is_not_there"),
    ],
)
def test_a_recipe_that_is_none_is_refused(tmp_path, text, error, words):
    with pytest.raises(error, match=words):
        export(recipe(tmp_path, text), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_unknown_sources_are_refused(tmp_path):
    with pytest.raises(ExportError, match="expected a recipe"):
        export("model.pkl", tmp_path / "out.onnx")
    with pytest.raises(ExportError, match="no such recipe"):
        export("absent.py", tmp_path / "out.onnx")


def test_a_network_that_exports_wrong_is_refused_and_not_written(tmp_path):
    pytest.importorskip("onnxscript", reason="the exporter's tests need the extra torch")
    text = (
        "import torch\nfrom onnxsplit.export import Recipe\n"
        "class Moody(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x + (0.0 if torch.compiler.is_compiling() else 1.0)\n"
        "def build():\n"
        "    return Recipe(Moody(), {'x': torch.ones(2)}, ('y',))\n"
    )
    with pytest.raises(ExportError, match="differs from PyTorch"):
        export(recipe(tmp_path, text), tmp_path / "out.onnx")
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".onnx"] == []
