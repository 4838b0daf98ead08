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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    try:
        return smollm2.make(tmp_path_factory.mktemp("smollm2")).parent
    except zoo.FetchError as error:  # without the package index the test is skipped with the reason
        pytest.skip(str(error))


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


def test_the_tokenizer_gives_back_every_text(whole):
    text = Tokenizer.from_file(str(whole / "tokenizer.json"))
    for example in ("Hello, world!", "  two  spaces\n\ttab", "naïve café, 12,345 €", "日本語 🙂"):
        assert text.decode(text.encode(example).ids) == example
    assert text.encode("<|im_start|>user<|im_end|>").ids[::2] == [1, 2]
    assert len(text.encode("2026").ids) == 4  # every digit is a token


def test_the_files_beside_the_model_agree_with_it(whole):
    model = onnx.load(whole / "model.onnx", load_external_data=False)
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
    assert (whole / "model.onnx.data").stat().st_size < 160e6
    assert {entry.key: entry.value for entry in model.metadata_props}["license"] == "apache-2.0"
