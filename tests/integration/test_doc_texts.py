"""The pages about language models, decoders and load, followed with a small GGUF model."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import build
import pages
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("gguf", reason="needs the extra gguf")
pytest.importorskip("tokenizers", reason="needs the extra gguf")

import gguf_files
import gguf_tokenizers
from reader import Reader
from text_plans import VOCABULARY, write_text_files

from onnxsplit.export import export
from onnxsplit.planning.planner import partition

QUICK = {
    "ONNXSPLIT_PARTITION_ROUNDS": "0",
    "ONNXSPLIT_PARTITION_EFFORT": "quick",
    "ONNXSPLIT_LOAD_REQUEST_COUNT": "20",
    "ONNXSPLIT_LOAD_WARMUP": "0",
    "ONNXSPLIT_LOAD_PROMPT_WORDS": "4",
    "ONNXSPLIT_SERVE_MAX_LENGTH": "200",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with ``model.gguf``, and what ``export`` and ``partition`` make of it."""
    folder = tmp_path_factory.mktemp("texts")
    words = {"vocabulary": gguf_tokenizers.SIZE, "tokenizer": gguf_tokenizers.byte_level}
    gguf_files.random_llama(folder / "model.gguf", "Q8_0", context_length=256, **words)
    export(str(folder / "model.gguf"), folder / "model.onnx")
    partition(folder / "model.onnx", stages=2, out=folder / "model.plan", rounds=0)
    return folder


@pytest.fixture
def reader(tmp_path, python_environment):
    with ExitStack() as opened:
        yield Reader(tmp_path, {**python_environment, **QUICK}, opened, says="Why is the sky blue?\n")


@pytest.fixture
def with_plan(reader, made):
    """A reader whose folder has the model and its plan."""
    shutil.copytree(made, reader.folder, dirs_exist_ok=True)
    return reader


def save_transformers_model(folder: Path) -> None:
    """A tiny llama as transformers saves it, with a tokenizer."""
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_text_files(folder)


def test_a_language_model_comes_from_its_file_to_text_from_three_hosts(reader, made):
    save_transformers_model(reader.folder / "hf-folder")
    shutil.copy(made / "model.gguf", reader.folder)
    for kind, block in pages.blocks_of("docs/language-models.md"):
        reader.follow(kind, block)
    assert len(reader.server.json("/v1/models")["data"]) == 1


def test_load_is_sent_to_servers_and_to_a_plan(with_plan):
    build.save(build.with_if(), with_plan.folder, "M.onnx")  # its input has a fixed size
    partition(with_plan.folder / "M.onnx", stages=1, out=with_plan.folder / "M.plan", costs="analytic")
    with_plan.serve(["M.plan", "model.plan"])
    (with_plan.folder / "model.plan").rename(with_plan.folder / "text.plan")
    shutil.copytree(with_plan.folder / "M.plan", with_plan.folder / "model.plan")
    (block,) = (block for _, block in pages.blocks_of("docs/load.md"))
    with_plan.follow("console", block)


def test_a_plan_is_served_to_clients_of_openai(with_plan):
    with_plan.moved |= {'"NAME"': '"model"'}
    with_plan.serve(["model.plan"])
    with_plan.follow("console", pages.block_of("docs/serving.md", "$ curl -s http://127.0.0.1:8000/v1/chat"))
    assert with_plan.said.rstrip().endswith("data: [DONE]")


def test_sequences_are_continued_from_python_and_the_command_line(with_plan):
    first = pages.block_of("docs/running.md", 'with Pipeline.launch("model.plan", cache_bytes')
    second = pages.block_of("docs/running.md", "    text = pipeline.text")
    with_plan.follow("python", f"from onnxsplit import Pipeline\n\n{first}{second}    print(result.text)\n")
    with_plan.follow("console", pages.block_of("docs/running.md", "$ onnxsplit chat"))


def test_a_text_follows_a_grammar(with_plan):
    pytest.importorskip("llguidance", reason="needs the extra guided")
    with_plan.follow("python", pages.block_of("docs/decoders.md", "from onnxsplit import Pipeline"))
    assert json.loads(with_plan.said)["city"] in ("Rome", "Oslo")
