"""The files of text beside an exported GGUF file: the tokens are those that the file's makers meant."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

import gguf_files
import gguf_tokenizers
import onnx
from decoder_bits import claimed
from text_plans import TEMPLATE, small_tokenizer
from tokenizers import Tokenizer

from onnxsplit.errors import ExportError
from onnxsplit.export import export
from onnxsplit.export.gguf.split_rules import RULES

TEXTS = (
    "Hello, World's 12345 foxes!\n\n  def f(x):\treturn x",
    "Grüße aus Köln! 你好 世界。 🙂🙃",
    " leading",
    "naïve ́ x",
    "",
)


def written(folder, tokenizer, vocabulary, **more):
    """The export's result and its tokenizer."""
    path = gguf_files.random_llama(
        folder / "model.gguf", vocabulary=vocabulary, width=64, hidden=32, tokenizer=tokenizer, **more
    )
    (done,) = export(str(path), folder / "model.onnx", check=False)
    return done, Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_a_byte_level_tokenizer_gives_the_tokens_of_the_one_it_was_made_of(tmp_path):
    _, found = written(tmp_path, gguf_tokenizers.byte_level, gguf_tokenizers.SIZE)
    expected = small_tokenizer()
    for text in (*TEXTS, "<|im_start|>user\nHello<|im_end|>"):
        assert found.encode(text).ids == expected.encode(text).ids
        assert found.decode(found.encode(text).ids) == expected.decode(expected.encode(text).ids)


@pytest.mark.parametrize("pre", RULES)
def test_every_rule_that_splits_texts_gives_each_text_back(pre, tmp_path):
    done, found = written(tmp_path, lambda writer: gguf_tokenizers.byte_level(writer, pre), gguf_tokenizers.SIZE)
    assert done.notes == ()
    for text in TEXTS:
        back = found.decode(found.encode(text).ids)
        assert back == (text if RULES[pre].normal is False else found.normalizer.normalize_str(text))


def test_an_unknown_rule_is_a_note(tmp_path):
    done, _ = written(tmp_path, lambda writer: gguf_tokenizers.byte_level(writer, "other"), gguf_tokenizers.SIZE)
    assert done.notes == ("the rule 'other' that splits texts into words is not known; that of GPT-2 is used",)


def best_pairs(text):
    """SentencePiece's algorithm: join the pair whose token has the best score, the leftmost first."""
    ranks = {piece: place for place, piece in enumerate(gguf_tokenizers.PIECES)}
    parts = list("▁" + text.replace(" ", "▁"))
    while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
        _, place = min(pairs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [
        token
        for part in parts
        for token in ([part] if part in ranks else [f"<0x{byte:02X}>" for byte in part.encode()])
    ]


def test_pieces_are_joined_as_sentencepiece_joins_them(tmp_path):
    _, found = written(tmp_path, gguf_tokenizers.pieces, 259 + len(gguf_tokenizers.PIECES))
    source = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(source.choice(list("abc é🙂"), source.integers(1, 12)))
        encoded = found.encode(text)
        assert encoded.tokens == ["<s>", *best_pairs(text)]
        assert found.decode(encoded.ids) == text


def test_the_configurations_name_special_tokens_and_the_template(tmp_path):
    written(tmp_path, gguf_tokenizers.byte_level, gguf_tokenizers.SIZE)
    config, generation, special = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("config", "generation_config", "tokenizer_config")
    )
    assert generation["eos_token_id"] == [0, 2]  # <|im_end|> ends a turn
    assert config["eos_token_id"] == 0
    assert special["eos_token"] == "<|end|>"
    assert special["chat_template"] == TEMPLATE
    assert special["add_bos_token"] is False


def test_a_damaged_tokenizer_is_one_clear_message(tmp_path):
    def broken(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a", "b"])
        writer.add_token_merges(["ab"])

    path = gguf_files.random_llama(tmp_path / "model.gguf", tokenizer=broken)
    with pytest.raises(ExportError, match="the merge 'ab' is not two tokens with a space between them"):
        export(str(path), tmp_path / "model.onnx")


def test_more_tokens_than_the_embedding_has_are_one_clear_message(tmp_path):
    path = gguf_files.random_llama(tmp_path / "model.gguf", vocabulary=96, tokenizer=gguf_tokenizers.byte_level)
    with pytest.raises(ExportError, match=f"its tokenizer has {gguf_tokenizers.SIZE} tokens, but its embedding 96;"):
        export(str(path), tmp_path / "model.onnx")


def test_several_numbers_for_one_special_token_are_one_clear_message(tmp_path):
    def several(writer):
        gguf_tokenizers.byte_level(writer)
        writer.add_array("tokenizer.ggml.bos_token_id", [1, 2])

    path = gguf_files.random_llama(tmp_path / "model.gguf", vocabulary=gguf_tokenizers.SIZE, tokenizer=several)
    with pytest.raises(ExportError, match=r"tokenizer.ggml.bos_token_id is \[1, 2\]; allowed are whole numbers"):
        export(str(path), tmp_path / "model.onnx")


def test_a_number_of_a_special_token_is_left_out_where_there_are_no_tokens(tmp_path):
    path = gguf_files.random_llama(tmp_path / "model.gguf", tokenizer=lambda writer: writer.add_eos_token_id(7))
    (done,) = export(str(path), tmp_path / "model.onnx", check=False)
    assert len(done.notes) == 1, "there is no tokenizer"
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {}


def test_a_piece_that_would_take_long_to_cut_is_refused(tmp_path):
    def long(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["a" * 60_000, "b"])
        writer.add_token_scores([0.0, 0.0])

    path = gguf_files.random_llama(tmp_path / "model.gguf", tokenizer=long)
    with pytest.raises(ExportError, match="a token has 60000 characters; allowed are at most 512"):
        export(str(path), tmp_path / "model.onnx")


def test_the_tokenizer_of_another_model_in_the_folder_is_not_used(tmp_path):
    done, _ = written(tmp_path, gguf_tokenizers.byte_level, gguf_tokenizers.SIZE)
    own = claimed(onnx.load(done.path), tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    other = claimed(onnx.load(done.path), tmp_path)
    assert (own.text[0].name, own.notes, other.text) == ("tokenizer.json", (), ())
    assert any("not those that were exported with this model" in note for note in other.notes)
