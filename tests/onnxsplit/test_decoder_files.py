"""The small files beside a model, and the file of decisions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from onnxsplit.decoder.files import Beside, read_beside
from onnxsplit.decoder.override import Override, StateOverride, read_override
from onnxsplit.errors import InputError
from onnxsplit.plan_decoder import Control

LLAMA = {
    "model_type": "llama",
    "eos_token_id": 2,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
}
GENAI = {
    "model": {
        "context_length": 4096,
        "eos_token_id": [5, 6],
        "vocab_size": 32064,
        "decoder": {
            "head_size": 96,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "inputs": {
                "input_ids": "ids",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "scores_of_all",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
}


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_no_folder_and_an_empty_one_say_nothing(tmp_path):
    assert read_beside(None) == read_beside(tmp_path) == Beside()


def test_the_config_of_transformers(tmp_path):
    write(tmp_path, "config.json", LLAMA)
    found = read_beside(tmp_path)
    assert (found.heads, found.head_size, found.vocabulary) == (2, 8, 32000)
    assert (found.max_length, found.end_tokens, found.encoder_decoder) == (2048, (2,), False)
    assert found.text == ()


def test_the_config_of_genai_comes_first(tmp_path):
    write(tmp_path, "config.json", LLAMA)
    write(tmp_path, "genai_config.json", GENAI)
    found = read_beside(tmp_path)
    assert found.patterns == (
        ("past_key_values.%d.key", "present.%d.key"),
        ("past_key_values.%d.value", "present.%d.value"),
    )
    assert dict(found.names) == {"ids": "input_ids", "scores_of_all": "logits"}
    assert (found.heads, found.head_size, found.vocabulary) == (32, 96, 32064)
    assert (found.max_length, found.end_tokens) == (4096, (5, 6))


def test_generation_config_comes_before_config_for_end_tokens(tmp_path):
    write(tmp_path, "config.json", LLAMA)
    write(tmp_path, "generation_config.json", {"eos_token_id": [2, 0, 2]})
    assert read_beside(tmp_path).end_tokens == (2, 0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"n_embd": 32, "n_head": 4, "n_positions": 1024}, (4, 8, 1024)),
        ({"text_config": {"head_dim": 16, "num_key_value_heads": 1, "max_position_embeddings": 10}}, (1, 16, 10)),
        ({"multi_query": True, "n_head": 8, "n_embd": 64}, (1, 8, None)),
        ({"hidden_size": 65, "num_attention_heads": 8}, (8, None, None)),
    ],
)
def test_other_names_of_sizes(tmp_path, config, expected):
    write(tmp_path, "config.json", config)
    found = read_beside(tmp_path)
    assert (found.heads, found.head_size, found.max_length) == expected


@pytest.mark.parametrize("config", [{"is_encoder_decoder": True}, {"model": {"encoder": {"filename": "e.onnx"}}}])
def test_encoders_are_noticed(tmp_path, config):
    write(tmp_path, "genai_config.json" if "model" in config else "config.json", config)
    assert read_beside(tmp_path).encoder_decoder


def test_files_of_the_tokenizer_are_listed(tmp_path):
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json", "unrelated.json"):
        write(tmp_path, name, {})
    assert [path.name for path in read_beside(tmp_path).text] == [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]


def test_the_folder_above_one_named_onnx_is_read_too(tmp_path):
    write(tmp_path, "config.json", LLAMA)
    write(tmp_path, "tokenizer.json", {})
    folder = tmp_path / "onnx"
    folder.mkdir()
    found = read_beside(folder)
    assert (found.vocabulary, found.text) == (32000, (tmp_path / "tokenizer.json",))
    (tmp_path / "other").mkdir()
    assert read_beside(tmp_path / "other") == Beside()


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ("{", "it is not valid JSON"),
        ("\xff\xfe", "it is not valid JSON"),
        ("[" * 100_000, "it is not valid JSON"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "it is not valid JSON"),
        ("[1, 2]", "not an object of settings"),
        ("null", "not an object of settings"),
        (" " * (5 << 20), "bytes or more"),
    ],
)
def test_garbage_gives_a_note(tmp_path, content, note):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    found = read_beside(tmp_path)
    assert note in found.notes[0]
    assert "\n" not in found.notes[0]
    assert found == Beside(notes=found.notes)


@pytest.mark.parametrize(
    "config",
    [
        {"vocab_size": -1, "head_dim": 0, "max_position_embeddings": "many", "num_key_value_heads": True},
        {"vocab_size": 1e300, "head_dim": None, "max_position_embeddings": 2**40, "num_key_value_heads": [2]},
        {"text_config": [], "model": 3, "decoder": "x"},
    ],
)
def test_values_of_other_types_are_not_used(tmp_path, config):
    write(tmp_path, "config.json", config)
    write(tmp_path, "genai_config.json", config)
    assert read_beside(tmp_path) == Beside(text=(tmp_path / "genai_config.json",))


@pytest.mark.parametrize("tokens", ["</s>", [2, "x"], [-1], True, [False], 2**40, {"a": 1}, [[2]]])
def test_end_tokens_of_other_types_give_a_note(tmp_path, tokens):
    write(tmp_path, "config.json", {"eos_token_id": tokens})
    found = read_beside(tmp_path)
    assert found.end_tokens == ()
    assert "eos_token_id is not used" in found.notes[0]


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "tokenizer.json").mkdir()
    found = read_beside(tmp_path)
    assert found.text == ()
    assert "it is a FIFO" in found.notes[0]
    assert "it is a folder" in found.notes[1]


def test_links_must_stay_in_the_folder(tmp_path):
    outside = write(tmp_path, "secret.json", LLAMA)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to(outside)
    (folder / "tokenizer.json").symlink_to(folder / "absent")
    inside = write(folder, "real.json", {"eos_token_id": 9})
    (folder / "generation_config.json").symlink_to(inside)
    found = read_beside(folder)
    assert "outside its folder" in found.notes[0]
    assert "tokenizer.json is not used" in found.notes[1]
    assert (found.vocabulary, found.end_tokens) == (None, (9,))


def test_links_may_lead_where_the_models_link_leads(tmp_path):
    """The cache of Hugging Face: models and their files are links to one folder."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "revision"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.onnx"):
        (folder / name).symlink_to(write(blobs, f"hash-of-{name}", LLAMA))
    found = read_beside(folder)
    assert (found.notes, found.vocabulary, found.text) == ((), 32000, (folder / "tokenizer.json",))


DECISIONS = """
scores = "logits"
tokens = "ids"
vocabulary = 10
max_length = 64
end_tokens = [2, 3]

[[state]]
past = "a"
present = "b"
kind = "append"
axis = 2
batch_axis = 0
shape = [1, 4, 0, 8]

[[state]]
past = "c"
present = "d"

[[control]]
input = "style"
role = "fixed"
value = -1
"""


def test_a_file_of_decisions(tmp_path):
    assert read_override(write(tmp_path, "decoder.toml", DECISIONS)) == Override(
        scores="logits",
        tokens="ids",
        vocabulary=10,
        max_length=64,
        end_tokens=(2, 3),
        states=(StateOverride("a", "b", "append", 2, 0, (1, 4, 0, 8)), StateOverride("c", "d")),
        controls=(Control(input="style", role="fixed", value=-1),),
    )
    assert read_override(write(tmp_path, "empty.toml", "")) == Override()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scores = ", "is not valid TOML"),
        ("a = " + "[" * 5000, "is not valid TOML"),
        ("score = 'x'", "'score' is unknown; allowed are control, end_tokens, max_length, scores, state, tokens"),
        ("scores = 3", "scores is 3; a name in quotes is allowed"),
        ("scores = ''", "scores is ''; a name in quotes"),
        ("max_length = 0", "max_length is 0; a number from 1 to"),
        ("max_length = true", "max_length is True; a number from 1 to"),
        ("end_tokens = [-1]", r"end_tokens is \[-1\]; a list of numbers from 0 to"),
        ("end_tokens = 3", "end_tokens is 3; a list of numbers"),
        ("state = 3", r"state is 3; write a table \[\[state\]\] for each"),
        ("[state]\npast = 'a'", r"write a table \[\[state\]\] for each"),
        ("[[state]]\npast = 'a'", r"\[\[state\]\] 1: present is missing"),
        ("[[state]]\npast = 'a'\npresent = 'b'\nkind = 'ring'", "kind is 'ring'; allowed are in-place, append"),
        ("[[state]]\npast = 'a'\npresent = 'b'\nkind = 'recurrent'\naxis = 1", "a recurrent state has no axis"),
        ("[[state]]\npast = 'a'\npresent = 'b'\naxis = -1", "axis is -1; a number from 0 to 63"),
        ("[[state]]\npast = 'a'\npresent = 'b'\n" * 2, "'a' is given twice as past"),
        ("[[control]]\ninput = 'a'", "role is missing"),
        ("[[control]]\ninput = 'a'\nrole = 'fixed'", "the role 'fixed' needs a value"),
        ("[[control]]\ninput = 'a'\nrole = 'mask'\nvalue = 1", "the role 'mask' takes no value"),
        ("[[control]]\ninput = 'a'\nrole = 'x'", "role is 'x'; allowed are tokens, mask"),
        ("tokens = 'a'\n[[control]]\ninput = 'a'\nrole = 'mask'", "'a' is given twice as input"),
    ],
)
def test_wrong_decisions_get_one_message(tmp_path, text, message):
    path = write(tmp_path, "decoder.toml", text)
    with pytest.raises(InputError, match=message) as caught:
        read_override(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), os.mkfifo])
def test_a_file_of_decisions_that_cannot_be_read(tmp_path, make):
    path = tmp_path / "decoder.toml"
    make(path)
    with pytest.raises(InputError, match=r"cannot read .*Give --decoder auto, off, or a TOML file"):
        read_override(path)
