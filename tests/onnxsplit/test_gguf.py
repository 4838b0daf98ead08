"""GGUF files become decoders with the scores of the networks that they describe."""

from __future__ import annotations

import errno
import os

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxsplit.errors import ExportError
from onnxsplit.export import export

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

import gguf
import gguf_files

NO_NAME = ("general.name", "", gguf.GGUFValueType.STRING)
SIZES = {
    "hidden_size": gguf_files.WIDTH,
    "intermediate_size": gguf_files.HIDDEN,
    "num_hidden_layers": gguf_files.LAYERS,
    "num_attention_heads": gguf_files.HEADS,
    "num_key_value_heads": gguf_files.GROUPS,
    "max_position_embeddings": gguf_files.CONTEXT,
    "vocab_size": 100,
    "initializer_range": 0.3,
}
OWN, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
GEMMA = {**TIED, "head_dim": 16}
WINDOW = {"attention__sliding_window": 5}
NETWORKS = {  # configuration of transformers, architecture and fields of the file
    "llama": ("LlamaConfig", OWN, "llama", {}),
    "llama-bias": ("LlamaConfig", {**OWN, "attention_bias": True}, "llama", {}),
    "llama-linear": (
        "LlamaConfig",
        {**OWN, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "llama",
        {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
    ),
    "llama-yarn": (
        "LlamaConfig",
        {**OWN, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        "llama",
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 32,
        },
    ),
    "mistral": ("MistralConfig", {**OWN, "sliding_window": 5}, "llama", WINDOW),
    "qwen2": ("Qwen2Config", TIED, "qwen2", {}),
    "qwen3": ("Qwen3Config", {**OWN, "head_dim": 32}, "qwen3", {}),
    "gemma": ("GemmaConfig", GEMMA, "gemma", {}),
    "gemma2": ("Gemma2Config", {**GEMMA, "query_pre_attn_scalar": 16, "sliding_window": 5}, "gemma2", WINDOW),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **GEMMA,
            "query_pre_attn_scalar": 16,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "gemma3",
        {**WINDOW, "attention__sliding_window_pattern": 2, "rope__freq_base": 1e6},
    ),
}
EXACT = ["F32", "F16", "BF16", "Q4_0", "Q8_0", "Q5_0", "IQ4_NL", "Q6_K"]
STEPPED = ["Q4_1", "Q5_1", "Q4_K", "Q5_K"]
ROUNDED = ["Q2_K", "Q3_K"]


def scores_of(path, tokens):
    """The scores of whole prompts, from empty caches."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    caches = {
        one.name: np.zeros((len(tokens), one.shape[1], 0, one.shape[3]), np.float32)
        for one in session.get_inputs()
        if one.name.startswith("past_key_values")
    }
    given = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **caches}
    return session.run(["logits"], given)[0]


def distance(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def tensors_of(path):
    return {one.name: one for one in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("name", NETWORKS)
def test_an_architecture_has_the_scores_that_transformers_has(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config_name, options, arch, more = NETWORKS[name]
    config = getattr(transformers, config_name)(**{**SIZES, **options})
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    epsilon = {"attention__layer_norm_rms_epsilon": config.rms_norm_eps}
    path = gguf_files.from_transformers(tmp_path / "model.gguf", arch, network, **epsilon, **more)
    (exported,) = export(str(path), tmp_path / "model.onnx")
    tokens = np.random.default_rng(1).integers(0, 100, (2, 20))
    with torch.no_grad():
        expected = network(torch.tensor(tokens)).logits.numpy()
    assert distance(scores_of(exported.path, tokens), expected) < 2e-5
    assert max(exported.differences.values()) < 2e-5


@pytest.mark.parametrize("kind", EXACT + STEPPED + ROUNDED)
def test_every_type_of_weights_is_written_as_the_table_says(kind, tmp_path):
    path = gguf_files.random_llama(tmp_path / "model.gguf", kind)
    (exported,) = export(str(path), tmp_path / "model.onnx")
    export(str(path), tmp_path / "float.onnx", weights="float")
    held, floats = tensors_of(exported.path), tensors_of(tmp_path / "float.onnx")
    name = "blk.0.ffn_up.weight"
    expected = onnx.numpy_helper.to_array(floats[f"{name}.transposed"], tmp_path).T
    if kind in ("F32", "F16", "BF16"):
        found = onnx.numpy_helper.to_array(held[f"{name}.transposed"], tmp_path).T
    else:
        found = values_of(held, name, tmp_path, bits=4 if kind == "Q4_0" else 8).reshape(expected.shape)
    difference = distance(found, expected)
    bounds = {**dict.fromkeys(EXACT, (0, 1e-6)), **dict.fromkeys(STEPPED, (1e-6, 1 / 250))}
    least, most = bounds.get(kind, (1e-4, 1 / 127))
    assert least <= difference < most
    if kind in STEPPED:  # the worst block is far from the usual one
        assert np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()) < 3e-3


def values_of(tensors, name, folder, *, bits):
    """The numbers that blocks stand for."""
    numbers, scales = (onnx.numpy_helper.to_array(tensors[f"{name}.{part}"], folder) for part in ("numbers", "scales"))
    if bits == 4:
        numbers = np.stack([numbers & 15, numbers >> 4], -1).reshape(*numbers.shape[:2], -1)
    zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8)
    if f"{name}.zeros" in tensors:
        zeros = onnx.numpy_helper.to_array(tensors[f"{name}.zeros"], folder)
    return (numbers.astype(np.float32) - zeros[..., None]) * scales[..., None]


@pytest.mark.parametrize(("wanted", "most"), [("4", 0.5), ("8", 0.05), ("float", 1e-5)])
def test_the_weights_that_are_asked_for_are_written(wanted, most, tmp_path):
    path = gguf_files.random_llama(tmp_path / "model.gguf", "F16")
    (exported,) = export(str(path), tmp_path / "model.onnx", weights=wanted)
    kinds = {node.op_type: node for node in onnx.load(exported.path, load_external_data=False).graph.node}
    bits = [one.i for one in kinds["MatMulNBits"].attribute if one.name == "bits"] if "MatMulNBits" in kinds else []
    assert bits == ([] if wanted == "float" else [int(wanted)])
    assert 0 < exported.differences["logits"] < most


def test_rows_whose_last_block_is_not_full_are_written(tmp_path):
    path = gguf_files.random_llama(tmp_path / "model.gguf", "F32", hidden=330)
    (exported,) = export(str(path), tmp_path / "model.onnx", weights="8")
    assert exported.differences["logits"] < 0.05


def test_factors_of_the_file_change_the_rotary_embedding(tmp_path):
    def factors(writer):
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 32).astype(np.float32))

    plain = gguf_files.random_llama(tmp_path / "plain.gguf")
    scaled = gguf_files.random_llama(tmp_path / "scaled.gguf", tokenizer=factors)
    tokens = np.arange(12)[None]
    found = []
    for path in (plain, scaled):
        (exported,) = export(str(path), path.with_suffix(".onnx"))
        assert max(exported.differences.values()) < 1e-5
        found.append(scores_of(exported.path, tokens))
    assert distance(*found) > 0.01


def test_a_context_shorter_than_the_prompts_that_are_compared_is_exported(tmp_path):
    path = gguf_files.random_llama(tmp_path / "model.gguf", context_length=4)
    (exported,) = export(str(path), tmp_path / "model.onnx")
    assert max(exported.differences.values()) < 1e-5


def test_a_later_position_that_fits_far_better_does_not_change_those_before_it(tmp_path):
    path = gguf_files.random_llama(tmp_path / "model.gguf", times=30.0)
    (exported,) = export(str(path), tmp_path / "model.onnx")
    assert max(exported.differences.values()) < 1e-3


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    path = gguf_files.random_llama(tmp_path / "model.gguf", times=float("nan"))
    with pytest.raises(ExportError, match="give scores that are no numbers, so it is damaged"):
        export(str(path), tmp_path / "model.onnx")


def test_a_full_disk_is_one_clear_message_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    path = gguf_files.random_llama(tmp_path / "model.gguf")
    with pytest.raises(ExportError, match="No space left on device; nothing was written"):
        export(str(path), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_with_an_empty_name_is_exported(tmp_path):
    path = gguf_files.random_llama(tmp_path / "model.gguf", tokenizer=lambda writer: writer.add_key_value(*NO_NAME))
    (exported,) = export(str(path), tmp_path / "model.onnx")
    assert onnx.load(exported.path, load_external_data=False).graph.name == "llama"


@pytest.mark.parametrize("name", ["model.json", "model.txt", "model.textproto"])
def test_a_model_may_have_any_ending(name, tmp_path):
    path = gguf_files.random_llama(tmp_path / "model.gguf")
    (exported,) = export(str(path), tmp_path / name)
    assert onnx.load(exported.path, format="protobuf", load_external_data=False).graph.name == "llama"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.gguf", "model.gguf is the source, which the model would replace"),
        ("link.gguf", "link.gguf is the source, which the model would replace"),
        ("config.json", "config.json is the name of a file of text that is written beside the model"),
    ],
)
def test_a_name_that_would_destroy_another_file_is_refused(name, message, tmp_path):
    path = gguf_files.random_llama(tmp_path / "model.gguf")
    (tmp_path / "link.gguf").symlink_to(path)
    before = path.read_bytes()
    with pytest.raises(ExportError, match=message):
        export(str(path), tmp_path / name)
    assert path.read_bytes() == before


def test_a_file_is_known_by_its_first_bytes(tmp_path):
    path = gguf_files.random_llama(tmp_path / "weights.bin")
    (exported,) = export(str(path), tmp_path / "model.onnx", check=False)
    assert exported.framework == "GGUF llama (15 F32)"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"expert_count": 8}, "has a mixture of experts (llama.expert_count is 8), which is not exported"),
        ({"rope__scaling__type": "longrope", "rope__scaling__factor": 2.0}, "exported are none, linear and yarn"),
        ({"rope__freq_base": 0.0}, "llama.rope.freq_base is 0.0; allowed are numbers from 1.001 to 1e+30"),
        ({"rope__freq_base": 1.0, "rope__scaling__type": "yarn", "rope__scaling__factor": 2.0}, "llama.rope.freq_base"),
        (
            {"rope__scaling__yarn_beta_fast": 0.0, "rope__scaling__type": "yarn", "rope__scaling__factor": 2.0},
            "llama.rope.scaling.yarn_beta_fast is 0.0; allowed are numbers from 0.001",
        ),
        ({"attention__head_count_kv": 3}, "4 heads cannot share 3 heads of keys"),
        ({"rope__dimension_count": 32}, "llama.rope.dimension_count is 32, but keys have 64 numbers"),
        ({"attention__causal": False}, "is an encoder"),
        (
            {"attention__key_length": 40, "attention__value_length": 40},
            "heads of 40 numbers; ONNX Runtime's attention needs a multiple of 16",
        ),
        ({"block_count": 3}, "has no tensor blk.2.attn_norm.weight"),
        ({"block_count": 1}, "has 9 tensors that the architecture llama does not have here"),
        (
            {"feed_forward_length": 256},
            "the tensor blk.0.ffn_gate.weight has the sizes [512, 256]; it needs [256, 256]",
        ),
    ],
)
def test_what_is_not_exported_is_one_clear_message(more, message, tmp_path):
    path = gguf_files.random_llama(tmp_path / "model.gguf", **more)
    with pytest.raises(ExportError) as error:
        export(str(path), tmp_path / "model.onnx")
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("options", [{"opset": 21}, {"cache": False}, {"static_cache": True}])
def test_options_that_do_not_apply_are_refused(options, tmp_path):
    path = gguf_files.random_llama(tmp_path / "model.gguf")
    with pytest.raises(ExportError, match="does not apply to it"):
        export(str(path), tmp_path / "model.onnx", **options)


def test_a_part_of_a_model_is_refused_with_the_way_to_join_the_parts(tmp_path):
    path = gguf_files.random_llama(
        tmp_path / "model.gguf", tokenizer=lambda writer: writer.add_uint16("split.count", 3)
    )
    with pytest.raises(ExportError, match="is one of 3 parts of a model; join them first: llama-gguf-split --merge"):
        export(str(path), tmp_path / "model.onnx")
