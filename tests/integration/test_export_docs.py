"""The examples of docs/export.md run unchanged, one per framework."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec

import pages
import pytest
from reader import check_installation

from onnxsplit.cli.export import command as export

TEXT = (pages.ROOT / "docs" / "export.md").read_text()
NEEDS = {
    "PyTorch": ("torch", "onnxscript"),
    "transformers": ("torch", "transformers"),
    "TensorFlow": ("tensorflow", "tf2onnx"),
    "scikit-learn": ("sklearn", "skl2onnx", "skops"),
    "SavedModel": ("tensorflow", "tf2onnx"),
    "TFLite": ("tensorflow", "tf2onnx"),
    "LightGBM": ("lightgbm", "onnxmltools"),
    "XGBoost": ("xgboost", "onnxmltools"),
    "CatBoost": ("catboost",),
    "JAX": ("jax", "jax2onnx"),
    "GGUF": ("gguf", "tokenizers"),
    "ONNX": ("onnx",),
}


def section(title: str) -> str:
    return re.split(r"\n##+ ", re.split(rf"\n##+ {title}\n", TEXT)[1])[0]


def cases():
    """Return the examples; those of frameworks that make test does not install need make test-all."""
    for title, needs in NEEDS.items():
        usual = not {"tensorflow", "xgboost", "catboost", "jax"}.intersection(needs)
        yield pytest.param(title, marks=() if usual else pytest.mark.exhaustive)


def test_each_framework_has_its_example():
    found = set(re.findall(r"^##+ (.+)$", TEXT, re.MULTILINE)) - {"What runs code"}
    assert found == set(NEEDS)


def test_what_is_no_example_is_a_command_that_exists():
    examples = [block for title in NEEDS for block in pages.blocks(section(title))]
    synopsis, installation = (block for block in pages.blocks_of("docs/export.md") if block not in examples)
    ((_, command),) = pages.commands(synopsis[1])
    export.make_context("export", command.split()[2:])
    for _, command in pages.commands(installation[1]):
        check_installation(shlex.split(command)[1:])


@pytest.mark.parametrize("title", list(cases()))
def test_an_example_runs_as_it_stands(title, tmp_path, python_environment):
    missing = [name for name in NEEDS[title] if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; make test-export installs all")

    def run(*words: str) -> str:
        done = subprocess.run(
            words, cwd=tmp_path, env=python_environment, capture_output=True, text=True, check=False, timeout=250
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for name, code in re.findall(r'```python(?: title="(\S+)")?\n(.*?)```', section(title), re.DOTALL):
        if name:
            (tmp_path / name).write_text(code)
        else:
            run(sys.executable, "-c", code)
    (command,) = re.findall(r"^\$ onnxsplit (.+)$", section(title), re.MULTILINE)
    said = run(sys.executable, "-P", "-m", "onnxsplit", *shlex.split(command))
    assert "differs from the framework's output by" in said
    assert "Next: onnxsplit partition" in said
