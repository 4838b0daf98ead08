"""The demo's decoder, made from the weights in a pinned package: it answers, and its files fit together."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import zoo

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

import smollm2
from tokenizers import Tokenizer

PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nExplain gravity in one sentence.<|im_end|>\n<|im_start|>assistant\n"
)
ANSWER = (
    "Gravity is a fundamental concept in physics that describes the force of gravity, which is a result of the "
    "curvature of spacetime caused by the presence of mass."
)


def made(folder, **options):
    try:
        return smollm2.make(folder, **options).parent
    except zoo.FetchError as error:  # without the package index the test is skipped with the reason
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return made(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return made(tmp_path_factory.mktemp("small"), layers=2, float32=True)


class Steps:
    """The model in ONNX Runtime, with its cache."""

    def __init__(self, folder) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        config = json.loads((folder / "config.json").read_text())
        empty = np.zeros((1, config["num_key_value_heads"], 0, config["head_dim"]), np.float32)
        names = [f"{n}.{part}" for n in range(config["num_hidden_layers"]) for part in ("key", "value")]
        self.presents = [f"present.{name}" for name in names]
        self.cache = {f"past_key_values.{name}": empty for name in names}
        self.length = 0

    def __call__(self, tokens):
        """Scores [new tokens, vocabulary]."""
        self.length += len(tokens)
        controls = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, self.length), np.int64)}
        scores, *presents = self.session.run(["logits", *self.presents], controls | self.cache)
        self.cache = dict(zip(self.cache, presents, strict=True))
        return scores[0]


def test_it_answers_a_question_greedily_and_ends(whole):
    text = Tokenizer.from_file(str(whole / "tokenizer.json"))
    end = json.loads((whole / "generation_config.json").read_text())["eos_token_id"]
    steps, answer = Steps(whole), []
    scores = steps(text.encode(PROMPT).ids)
    while (token := int(scores[-1].argmax())) != end and len(answer) < 64:
        answer.append(token)
        scores = steps([token])
    assert text.decode(answer) == ANSWER
    assert token == end


@pytest.mark.parametrize("chunks", [(5, 3), (1,) * 8])
def test_steps_give_what_one_run_gives(small, chunks):
    tokens = [504, 3575, 282, 4649, 314, 7042, 30, 2]
    expected, steps, start = Steps(small)(tokens), Steps(small), 0
    for size in chunks:
        scores = steps(tokens[start : start + size])
        assert np.abs(scores - expected[start : start + size]).max() <= 1e-5 * np.abs(expected).max()
        start += size


def test_the_tokenizer_gives_back_every_text(whole):
    text = Tokenizer.from_file(str(whole / "tokenizer.json"))
    for example in ("Hello, world!", "  two  spaces\n\ttab", "naïve café, 12,345 €", "日本語 🙂"):
        assert text.decode(text.encode(example).ids) == example
    assert text.encode("<|im_start|>user<|im_end|>").ids[::2] == [1, 2]
    assert len(text.encode("2026").ids) == 4  # every digit is a token


def test_the_files_beside_the_model_agree_with_it(whole):
    model = onnx.load(whole / "model.onnx")
    config, special = (json.loads((whole / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    shapes = {
        one.name: [dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim]
        for one in (*model.graph.input, *model.graph.output)
    }
    assert shapes["logits"][-1] == config["vocab_size"]
    assert shapes["past_key_values.29.key"][1::2] == [config["num_key_value_heads"], config["head_dim"]]
    text = Tokenizer.from_file(str(whole / "tokenizer.json"))
    assert text.get_vocab_size() == config["vocab_size"]
    assert text.token_to_id(special["eos_token"]) == config["eos_token_id"]
    assert "add_generation_prompt" in special["chat_template"]
    kinds = {node.op_type for node in model.graph.node}
    assert {"MatMulNBits", "GroupQueryAttention", "RMSNormalization"} < kinds
    assert "MatMul" not in kinds
    assert (whole / "model.onnx").stat().st_size < 270e6
    assert {entry.key: entry.value for entry in model.metadata_props}["license"] == "Apache-2.0"


@pytest.mark.parametrize("layers", [0, 31])
def test_a_number_of_layers_that_it_does_not_have_is_one_clear_message(layers, small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["smollm2.py", "-o", str(tmp_path / "out"), "--layers", str(layers)])
    assert smollm2.main() == 1
    assert capsys.readouterr().err == f"layers: {layers}; the model has 30, so choose 1 to 30\n"
    assert not (tmp_path / "out").exists()
