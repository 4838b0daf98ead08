"""From a GGUF file to text out of two processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from onnxsplit.export import export
from runtime.pipeline import Pipeline

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

import gguf_files
import gguf_tokenizers


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_a_gguf_file_writes_text_in_two_stages_as_in_one(kind, tmp_path):
    path = gguf_files.random_llama(
        tmp_path / "model.gguf", kind, vocabulary=gguf_tokenizers.SIZE, tokenizer=gguf_tokenizers.byte_level
    )
    (exported,) = export(str(path), tmp_path / "model.onnx")
    texts = []
    for stages in ("1", "2"):
        plan = tmp_path / f"{stages}.plan"
        command = ["-m", "onnxsplit", "partition", str(exported.path), "-o", str(plan), "--stages", stages]
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        with Pipeline.launch(plan, threads=1, cache_bytes="16M", max_rows=2) as pipeline:
            generation = pipeline.text.complete("The quick", max_tokens=24, temperature=0.0, timeout=60)
            texts.append(generation.result().text)
    verify = ["-m", "onnxsplit", "verify", str(plan), str(exported.path)]
    said = subprocess.run([sys.executable, *verify], check=True, capture_output=True, text=True).stdout
    assert f"Next: onnxsplit generate {plan}" in said
    assert texts[0] == texts[1]
    assert texts[0]
