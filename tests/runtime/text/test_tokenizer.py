"""Tokens of long texts."""

from __future__ import annotations

import threading
import time

import pytest

pytest.importorskip("tokenizers", reason="needs the extra text")

from text_plans import small_tokenizer
from tokenizers import decoders

from onnxsplit.errors import InputError
from runtime.text.tokenizer import Tokenizer

LONG = "The quick brown fox. Grüße aus Köln! " * 10_000


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(small_tokenizer().to_str().encode())


def test_long_texts_have_the_same_tokens_as_short_ones(tokenizer):
    text = LONG[:50_000]
    tokens = tokenizer.encode(text)
    assert list(tokens) == small_tokenizer().encode(text).ids
    assert tokenizer.decode(tokens) == text


def test_a_panic_of_the_library_is_an_error_of_ours():
    panics = small_tokenizer()
    panics.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip("x", 0, 1)])  # of a text without characters
    tokenizer = Tokenizer(panics.to_str().encode())
    assert tokenizer.decode(()) == ""
    with pytest.raises(InputError, match="cannot decode"):
        tokenizer.decode((1,))
    assert tokenizer.decode(tokenizer.encode("brown fox")) == "brownĠfo"


def test_other_threads_go_on_while_a_long_text_is_encoded(tokenizer):
    steps, ended = [0], threading.Event()

    def step() -> None:
        while not ended.is_set():
            time.sleep(0)
            steps[0] += 1

    other = threading.Thread(target=step)
    other.start()
    try:
        before = steps[0]
        tokenizer.encode(LONG)
        assert steps[0] - before > 100
    finally:
        ended.set()
        other.join()
