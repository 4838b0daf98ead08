"""The files of a tokenizer, a template and options: what they say, and one message for what they must not say."""

from __future__ import annotations

import json

import pytest
from text_plans import TEMPLATE, small_tokenizer
from tokenizers import processors

from onnxsplit.errors import InputError
from runtime.text.files import read_text_files

ALL = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "genai_config.json")


def read(folder, **files):
    """Write files, whose names have ``_`` for the dot, and read them."""
    files = {"tokenizer_json": small_tokenizer().to_str(), **files}
    names = []
    for name, content in files.items():
        ending = "jinja" if name == "chat_template" else "json"
        name = f"{name.removesuffix('_json')}.{ending}"
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        names.append(name)
    assert set(names) <= set(ALL)
    return read_text_files(folder, names)


def test_without_a_tokenizer_there_is_no_text(tmp_path):
    assert read_text_files(tmp_path, {"tokenizer_config.json"}) is None


def test_a_tokenizer_alone_is_enough(tmp_path):
    found = read(tmp_path)
    assert (found.templates, found.variables, found.defaults) == ({}, {}, {})
    assert found.tokenizer.decode(found.tokenizer.encode("Grüße 🙃")) == "Grüße 🙃"


def test_a_file_that_the_plan_does_not_name_is_not_read(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("not the plan's")
    assert read(tmp_path, tokenizer_config={"chat_template": TEMPLATE}).templates == {"default": TEMPLATE}


@pytest.mark.parametrize(
    ("files", "templates"),
    [
        ({"tokenizer_config": {"chat_template": "a"}}, {"default": "a"}),
        ({"tokenizer_config": {"chat_template": "a"}, "chat_template": "b"}, {"default": "b"}),
        ({"tokenizer_config": {"chat_template": None}}, {}),
        (
            {
                "tokenizer_config": {
                    "chat_template": [
                        {"name": "default", "template": "a"},
                        {"name": "tool_use", "template": "b", "more": 1},
                    ]
                }
            },
            {"default": "a", "tool_use": "b"},
        ),
    ],
)
def test_templates_have_several_places(tmp_path, files, templates):
    assert read(tmp_path, **files).templates == templates


def test_special_tokens_are_texts_or_objects(tmp_path):
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
    }
    assert read(tmp_path, tokenizer_config=config).variables == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "additional_special_tokens": ["<a>", "<b>"],
    }


@pytest.mark.parametrize(
    ("files", "defaults"),
    [
        (
            {
                "generation_config": {
                    "do_sample": True,
                    "temperature": 0.6,
                    "top_p": 0.9,
                    "top_k": 20,
                    "min_p": 0,
                    "repetition_penalty": 1.05,
                    "eos_token_id": [1, 2],
                }
            },
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.05},
        ),
        ({"generation_config": {"temperature": 0.6, "top_p": None}}, {"temperature": 0.6}),
        ({"generation_config": {"do_sample": True, "top_p": 0.8}}, {"temperature": 1.0, "top_p": 0.8}),
        (
            {"generation_config": {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}},
            {"temperature": 0.0, "repetition_penalty": 1.1},
        ),
        (
            {"genai_config": {"model": {}, "search": {"top_k": 50.0, "temperature": 0.7}}},
            {"top_k": 50, "temperature": 0.7},
        ),
        ({"genai_config": {"search": {"top_k": 1}}, "generation_config": {}}, {}),
        ({"genai_config": {"model": {}}}, {}),
    ],
)
def test_recommended_options_become_defaults(tmp_path, files, defaults):
    assert read(tmp_path, **files).defaults == defaults


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_json": b"\xff"}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer_json": "{}"}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer_json": '{"model": {"type": "BPE"}, "decoder": 1}'}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer_json": "[" * 100_000}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer_config": "{"}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config": "[" * 100_000}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config": b"\xff\xfe"}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config": []}, r"tokenizer_config.json holds \[\]"),
        ({"tokenizer_config": {"chat_template": 5}}, "chat_template is 5, but it must be a text, or a list"),
        ({"tokenizer_config": {"chat_template": [{"name": "a"}]}}, "chat_template is .* but it must be"),
        (
            {"tokenizer_config": {"chat_template": [{"name": "a", "template": ["a"]}]}},
            "chat_template is .* but it must",
        ),
        ({"tokenizer_config": {"bos_token": 1}}, "bos_token is 1, but it must be a text"),
        ({"tokenizer_config": {"eos_token": {"content": 1}}}, "eos_token is .* must be a text"),
        ({"tokenizer_config": {"add_bos_token": "yes"}}, "add_bos_token is 'yes', but it must be true or false"),
        ({"tokenizer_config": {"add_bos_token": True, "bos_token": "<none>"}}, "no token bos_token = '<none>'"),
        ({"chat_template": b"\xff"}, "chat_template.jinja is not UTF-8"),
        ({"chat_template": "x" * (2 << 20)}, "at most 1048576 are allowed"),
        ({"generation_config": {"temperature": "hot"}}, "temperature is 'hot', but it must be a number from 0"),
        ({"generation_config": {"top_p": 1.5}}, "top_p is 1.5, but it must be a number from 0 to 1"),
        ({"generation_config": {"top_k": 1.5}}, "top_k is 1.5, but it must be a whole number"),
        ({"generation_config": '{"top_k": Infinity}'}, "top_k is inf"),
        ({"generation_config": '{"temperature": NaN}'}, "temperature is nan"),
        ({"generation_config": {"do_sample": "no"}}, "do_sample is 'no'"),
        ({"genai_config": {"search": [1]}}, r"search is \[1\], but it must be an object"),
    ],
)
def test_a_wrong_file_gives_one_message_that_names_it(tmp_path, files, message):
    with pytest.raises(InputError, match=message) as refused:
        read(tmp_path, **files)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*tokenizer.json: No such file"):
        read_text_files(tmp_path, {"tokenizer.json"})


@pytest.mark.parametrize("add", [True, False, None])
@pytest.mark.parametrize("adds_itself", [True, False])
def test_a_prompt_begins_once_with_the_first_token_where_the_model_wants_it(tmp_path, add, adds_itself):
    library = small_tokenizer()
    if adds_itself:
        library.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", pair=None, special_tokens=[("<|im_start|>", 1)]
        )
    config = {"bos_token": "<|im_start|>", "add_bos_token": add}
    tokenizer = read(tmp_path, tokenizer_json=library.to_str(), tokenizer_config=config).tokenizer
    plain = tokenizer.encode("dog", special=False)
    wanted = adds_itself if add is None else add
    assert tokenizer.encode("dog") == ((1, *plain) if wanted else plain)
    assert 1 not in plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\ud83d", "half of a surrogate pair at place 1"),
        (b"bytes", "but this is b'bytes'"),
        ("x" * (17 << 20), "shorten"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path).tokenizer.encode(text)
