"""Decoders of transformers with a cache: growing in plain ops, growing with Attention, and of a fixed size."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxsplit.errors import ExportError
from onnxsplit.export import export

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")

PROMPTS = [[5, 71, 13, 88, 2, 40], [64, 3, 99]]
WAYS = {"plain": {"opset": 20}, "attention": {"opset": 23}, "static": {"static_cache": True}}
TEXT = {"vocab_size": 100, "initializer_range": 0.3}
LLAMA = transformers.LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **TEXT
)
GPT2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **TEXT)
CONFIGS = {"llama": LLAMA, "gpt2": GPT2}


@pytest.fixture(scope="module", params=[(name, way) for name in CONFIGS for way in WAYS], ids="-".join)
def exported(request, tmp_path_factory):
    """A network with random weights, and its ONNX model."""
    name, way = request.param
    folder = tmp_path_factory.mktemp(f"{name}-{way}")
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    network.save_pretrained(folder / "source")
    (done,) = export(str(folder / "source"), folder / "model.onnx", **WAYS[way])
    return network, done.path, way


def texts_of(network, count):
    """The tokens that the network itself chooses, reading everything again at each step."""
    found = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(count):
                tokens.append(int(network(torch.tensor([tokens])).logits[0, -1].argmax()))
        found.append(tokens[len(prompt) :])
    return found


def opened(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def shapes_of(session):
    return {one.name: one.shape for one in session.get_inputs() if one.name.startswith("past_key_values")}


def growing_text(session, prompt, count):
    cache = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes_of(session).items()}
    outputs = [name.replace("past_key_values", "present") for name in cache]
    new, length, text = prompt, 0, []
    for _ in range(count):
        length += len(new)
        given = {
            "input_ids": np.array([new]),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length - len(new), length)[None],
        }
        scores, *presents = session.run(["logits", *outputs], given | cache)
        cache = dict(zip(cache, presents, strict=True))
        new = [int(scores[0, -1].argmax())]
        text += new
    return text


def texts_in_place(session, count, capacity=32):
    """Both texts in the same runs, with buffers that are past and present at once and are never copied."""
    buffers = {
        name: np.full((2, shape[1], capacity, shape[3]), 7.0, np.float32) for name, shape in shapes_of(session).items()
    }

    def run(rows, tokens, starts):
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", np.array(tokens))
        binding.bind_cpu_input("write_indices", np.array(starts))
        for name, buffer in buffers.items():
            part = buffer[rows]
            place = "cpu", 0, np.float32, part.shape, part.ctypes.data
            binding.bind_input(name, *place)
            binding.bind_output(name.replace("past_key_values", "present"), *place)
        binding.bind_output("logits", "cpu")
        session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()[:, -1].argmax(-1).tolist()

    texts = [run(slice(row, row + 1), [prompt], [0]) for row, prompt in enumerate(PROMPTS)]
    for step in range(count - 1):
        starts = [len(prompt) + step for prompt in PROMPTS]
        for text, token in zip(texts, run(slice(0, 2), [[text[-1]] for text in texts], starts), strict=True):
            text.append(token)
    return texts


def test_an_exported_decoder_gives_the_tokens_of_its_network(exported):
    network, path, way = exported
    session, expected = opened(path), texts_of(network, 12)
    assert expected[0] != expected[1]
    assert min(len(set(text)) for text in expected) > 2
    if way == "static":
        assert texts_in_place(session, 12) == expected
    else:
        assert [growing_text(session, prompt, 12) for prompt in PROMPTS] == expected


def test_the_way_decides_which_ops_attention_has(exported):
    _, path, way = exported
    model = onnx.load(path)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Attention") == (0 if way == "plain" else 2)
    assert kinds.count("Softmax") == (2 if way == "plain" else 0)
    assert kinds.count("TensorScatter") == (4 if way == "static" else 0)
    declared = {one.name: one.type.tensor_type.shape.dim[2].dim_param for one in model.graph.input[-2:]}
    assert set(declared.values()) == {"capacity" if way == "static" else "past_sequence"}


def refused(tmp_path, config, **options):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError) as caught:
        export(str(tmp_path / "config.json"), tmp_path / "out.onnx", static_cache=True, **options)
    assert not (tmp_path / "out.onnx").exists()
    return str(caught.value)


def configuration(kind, architecture, **content):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    return {"model_type": kind, "architectures": [architecture], "intermediate_size": 64, **sizes, **content}


LLAMA_FILE = configuration("llama", "LlamaForCausalLM")


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (LLAMA_FILE, {"opset": 20}, "--static-cache needs --opset 24 or later; 20 was given"),
        (LLAMA_FILE, {"cache": False}, "LlamaForCausalLM is exported without a cache; --static-cache does not apply"),
        (configuration("bert", "BertModel"), {}, "BertModel is a network of the kind 'encoder'; --static-cache does"),
        (configuration("bloom", "BloomForCausalLM"), {}, "BloomForCausalLM takes no position_ids, which a cache of"),
        (
            configuration("mistral", "MistralForCausalLM", sliding_window=8, num_key_value_heads=2),
            {},
            "MistralForCausalLM has layers of the kind sliding_attention, whose cache does not keep all positions",
        ),
    ],
    ids=["opset", "no cache", "encoder", "positions", "window"],
)
def test_a_cache_of_a_fixed_size_is_refused_where_it_cannot_be(config, options, words, tmp_path):
    assert words in refused(tmp_path, config, **options)


def test_the_files_of_text_in_a_folder_are_written_beside_the_model(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    out.mkdir()
    transformers.AutoModelForCausalLM.from_config(LLAMA).save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (out / "tokenizer.json").write_text("another")
    (done,) = export(str(source), out / "model.onnx", check=False)
    names = {"tokenizer.json", "chat_template.jinja", "config.json", "generation_config.json"}
    assert {path.name for path in out.iterdir()} == {"model.onnx", *names}
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert {path.name for path in done.files} == names
    assert done.notes == (f"{out / 'tokenizer.json'} had another content and was replaced",)
    (again,) = export(str(source), out / "model.onnx", check=False)
    assert (again.files, again.notes) == ((), ())


SHARED = {  # heads that share keys, and latent attention, by the tensors of a layer: heads and width
    "multi-query": (
        transformers.FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
        (1, 8),
        (1, 8),
    ),
    "grouped": (
        transformers.FalconConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True
        ),
        (4, 8),
        (4, 8),
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_the_cache_has_the_heads_that_the_network_gives_it(name, tmp_path):
    config, *expected = SHARED[name]
    config.vocab_size = 100
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    (done,) = export(str(tmp_path / "source"), tmp_path / "model.onnx")
    assert [(shape[1], shape[3]) for shape in shapes_of(opened(done.path)).values()] == expected


def test_a_decoder_that_keeps_no_keys_and_values_is_refused_with_the_way_out(tmp_path):
    config = transformers.MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=1, vocab_size=100)
    config.architectures = ["MambaForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=r"MambaForCausalLM does not keep keys and values alone .* try --no-cache"):
        export(str(tmp_path / "config.json"), tmp_path / "model.onnx")


def rotary(tmp_path, **parameters):
    """The export of a Llama with such a rotary embedding."""
    LLAMA.architectures = ["LlamaForCausalLM"]
    config = {**LLAMA.to_dict(), "num_hidden_layers": 1, "rope_parameters": {"rope_theta": 10000.0, **parameters}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return export(str(tmp_path / "config.json"), tmp_path / "model.onnx")


def test_a_rotary_embedding_that_is_computed_anew_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"\(rope_type 'dynamic'\), which is not exported; give it another rope_type"):
        rotary(tmp_path, rope_type="dynamic", factor=2.0)


def test_a_rotary_embedding_that_depends_on_the_length_of_a_text_is_a_note(tmp_path):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
    (done,) = rotary(tmp_path, rope_type="longrope", factor=2.0, **factors)
    (note,) = done.notes
    assert note.startswith("LlamaForCausalLM turns its rotary embedding at other speeds beyond 16 positions (longrope)")


BRANCHES = """
import torch
from onnxsplit.export import Recipe


class Network(torch.nn.Module):
    def forward(self, x):
        return x * 2 if x.max() > 16 else x


def build():
    return Recipe(Network(), {"x": torch.randn(4, 8)}, outputs=("y",))
"""


def test_a_network_that_pytorch_cannot_export_is_one_message(tmp_path):
    (tmp_path / "recipe.py").write_text(BRANCHES)
    words = [sys.executable, "-m", "onnxsplit", "export", "recipe.py", "-o", "model.onnx"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("onnxsplit: PyTorch could not export the network: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_mixture_of_experts_has_the_scores_of_its_network(tmp_path):
    config = transformers.MixtralConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 1, "num_local_experts": 4})
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path)
    (done,) = export(str(tmp_path / "config.json"), tmp_path / "model.onnx")
    assert max(done.differences.values()) < 1e-5


def test_a_tokenizer_in_other_files_than_tokenizer_json_is_a_note(tmp_path):
    folder = tmp_path / "source"
    transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1)
    ).save_pretrained(folder)
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("")
    (done,) = export(str(folder), tmp_path / "model.onnx", check=False)
    (note,) = done.notes
    assert note.startswith(
        f"no tokenizer.json is written, since {folder} has its tokenizer in vocab.json, merges.txt only"
    )
    (folder / "tokenizer.json").write_text("{}")
    assert export(str(folder), tmp_path / "other.onnx", check=False)[0].notes == ()
