"""The pieces of a text, joined, are what the tokenizer makes of all tokens at once."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_plans import CORPUS, small_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from runtime.text.tokenizer import Tokenizer

TEXTS = (
    *CORPUS,
    "  two  spaces\n\tand tabs ",
    "family 👨‍👩‍👧‍👦 and flag 🇩🇪",
    "हिन्दी नमस्ते",
    "السلام عليكم",
    "Привет, мир!",
    "do n't stop , now .",
    "",
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _metaspace(decoder: decoders.Decoder, *, prepend: str = "first") -> Library:
    """A vocabulary of words that begin with a mark for a space, and of bytes, as Llama 2 and Gemma have it."""
    letters = sorted({letter for letter in "".join(CORPUS[:2]) if letter.isascii()} | {"▁"})
    words = ["<unk>", "<s>", "</s>", *BYTES, *letters, "▁▁", "▁t", "▁th", "▁the", "qu", "ow", "er", "Gr", "▁aus"]
    words = list(dict.fromkeys(words))
    merges = [("▁", "▁"), ("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("q", "u"), ("o", "w"), ("e", "r"), ("G", "r")]
    tokenizer = Library(
        models.BPE(
            vocab={word: place for place, word in enumerate(words)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def llama() -> Library:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _metaspace(decoders.Sequence(parts))


def gemma() -> Library:
    return _metaspace(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))


def metaspace() -> Library:
    return _metaspace(decoders.Metaspace(prepend_scheme="always"), prepend="always")


def unigram() -> Library:
    pieces = [("<unk>", 0.0), *((byte, -9.0) for byte in BYTES), *((f"▁{w}", -2.0) for w in ("the", "dog", "a"))]
    pieces += [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Library(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return tokenizer


def wordpiece() -> Library:
    words = [
        "[UNK]",
        "[SEP]",
        "the",
        "quick",
        "brown",
        "do",
        "n",
        "'",
        "t",
        ".",
        ",",
        "!",
        "##s",
        "##ing",
        "##t",
        "dog",
    ]
    tokenizer = Library(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[SEP]"])
    return tokenizer


def suffixed() -> Library:
    tokenizer = Library(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=120, end_of_word_suffix="</w>", special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def byte_level() -> Library:
    tokenizer = small_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool call>", special=False), AddedToken("你好吗", special=False)])
    return tokenizer


def byte_level_with_more() -> Library:
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("z", "s")])
    return tokenizer


def without_decoder() -> Library:
    tokenizer = wordpiece()
    tokenizer.decoder = None
    return tokenizer


FAMILIES = {
    made.__name__: made
    for made in (llama, gemma, metaspace, unigram, wordpiece, suffixed, byte_level, byte_level_with_more)
} | {"no decoder": without_decoder}


@cache
def tokenizer(family: str) -> Tokenizer:
    return Tokenizer(FAMILIES[family]().to_str().encode())


def pieces(family: str, tokens, *, skip: bool = True) -> list[str]:
    detokenizer = tokenizer(family).detokenizer(skip_special=skip)
    return [*map(detokenizer.add, tokens), detokenizer.finish()]


def whole(family: str, tokens, *, skip: bool = True) -> str:
    return tokenizer(family).decode(tokens, skip_special=skip)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_in_many_scripts_come_out_as_the_tokenizer_writes_them(family, skip):
    for text in (*TEXTS, "".join(TEXTS), "\n".join(TEXTS)):
        tokens = tokenizer(family).encode(text)
        assert "".join(pieces(family, tokens, skip=skip)) == whole(family, tokens, skip=skip)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("family", ["metaspace", "wordpiece", "suffixed", "byte_level", "no decoder"])
def test_any_tokens_in_any_order_come_out_as_the_tokenizer_writes_them(family, skip):
    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.integers(0, tokenizer(family).size + 3), max_size=30))
    def check(tokens):
        assert "".join(pieces(family, tokens, skip=skip)) == whole(family, tokens, skip=skip)

    check()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma", "unigram"])
def test_any_words_and_bytes_come_out_as_the_tokenizer_writes_them(family, skip):
    """The library takes back characters if a byte behind them breaks; so runs of bytes are whole characters or none."""
    known = tokenizer(family)
    byte_tokens = [known._tokenizer.token_to_id(byte) for byte in BYTES]
    apart = [*byte_tokens, *(known._special if skip else ())]  # a token that is left out does not separate bytes
    others = [number for number in range(known.size) if number not in apart]
    texts = st.text(min_size=1, max_size=4).filter(lambda text: text.isprintable()).map(lambda text: text.encode())
    broken = st.sampled_from([b"\xff", b"\xff\xfe", b"\xe4\xbd", b"\xf0\x9f\x98", b"\xc3", b"\x80\x80\xe4\xbd\xa0"])
    run = st.one_of(texts, broken).map(lambda data: [byte_tokens[byte] for byte in data])
    word = st.sampled_from(others).map(lambda number: [number])

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.tuples(run, word), max_size=8), st.one_of(st.just([]), run))
    def check(parts, last):
        tokens = [token for pair in parts for part in pair for token in part] + last
        assert "".join(pieces(family, tokens, skip=skip)) == whole(family, tokens, skip=skip)

    check()


@pytest.mark.parametrize("family", ["llama", "gemma", "unigram", "byte_level"])
@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=40))
def test_bytes_that_are_no_text_neither_stop_it_nor_are_lost(family, data):
    known = tokenizer(family)
    names = BYTES if family != "byte_level" else None
    alphabet = {known.token_bytes(number): number for number in range(known.size)}
    tokens = [known._tokenizer.token_to_id(names[byte]) if names else alphabet[bytes((byte,))] for byte in data]
    given_out = pieces(family, tokens)
    held = 0
    for piece in given_out[:-1]:
        held = 0 if piece else held + 1
        assert held < 4, "a character has at most four bytes"
    if family == "byte_level":
        assert "".join(given_out) == data.decode(errors="replace") == whole(family, tokens)


@pytest.mark.parametrize("family", ["llama", "gemma", "byte_level"])
def test_half_a_character_is_held_back(family):
    tokens = tokenizer(family).encode("x🙃世")
    assert not any("\ufffd" in piece for piece in pieces(family, tokens))


def test_the_space_before_a_word_stays_after_a_token_that_is_left_out():
    known = tokenizer("llama")
    word, begin = (known._tokenizer.token_to_id(text) for text in ("▁the", "<s>"))
    assert pieces("llama", [begin, word, begin, word]) == ["", "the", "", " the", ""]


def test_the_bytes_of_tokens_are_those_that_they_add():
    llamas, levels = tokenizer("llama"), tokenizer("byte_level")
    number = llamas._tokenizer.token_to_id
    assert llamas.token_bytes(number("▁the")) == b" the"
    assert llamas.token_bytes(number("<0xE4>")) == b"\xe4"
    assert llamas.token_bytes(number("</s>")) == b"</s>"
    assert tokenizer("wordpiece").token_bytes(tokenizer("wordpiece")._tokenizer.token_to_id("##ing")) == b"ing"
    text = "Grüße 🙃 <|end|> 你好吗 <tool call>"
    assert b"".join(map(levels.token_bytes, levels.encode(text))).decode() == text
    assert {levels.token_bytes(number) for number in (-1, levels.size, 1 << 40)} == {b""}


def test_a_token_costs_as_much_late_in_a_text_as_early():
    """Every call of the library is counted: none gets more tokens than a few, however long the text is."""
    known = tokenizer("llama")
    vocabulary = known._vocabulary
    longest = 0
    decode = vocabulary._decode

    def counted(tokens, **options):
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(tokens, **options)

    vocabulary._decode = counted
    try:
        pieces("llama", known.encode("the quick 世 " * 500))
    finally:
        vocabulary._decode = decode
    assert 0 < longest <= 8
