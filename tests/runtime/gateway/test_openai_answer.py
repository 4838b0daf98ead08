"""Pieces of text as chunks and as whole answers, without a server."""

from __future__ import annotations

import json

import pytest

from runtime.errors import Busy, DeadlineExceeded, StageFailed, StageUnavailable
from runtime.gateway.errors import NotLoaded, TooLarge, Unauthorized, UnknownModel
from runtime.gateway.openai.answer import AnswerForm, StreamedChat, StreamedCompletion, chat_choice, completion_choice
from runtime.gateway.openai.errors import FieldError, error_answer, http_status, is_openai_path
from runtime.requests.generation import TokenLogprob
from runtime.text.pieces import TextPiece

BYTES = {1: b"a", 2: "é".encode()[:1], 3: "é".encode()[1:], 9: b"<end>"}
FORM = AnswerForm(id="x", created=7, model="m", fingerprint="f", chat=True, token_bytes=BYTES.__getitem__)
ENDS = frozenset({9})


def piece(text: str, *tokens: int, reason: str | None = None, stop: str | int | None = None) -> TextPiece:
    logprobs = tuple(TokenLogprob(token, -float(token), ((token, -float(token)),)) for token in tokens)
    return TextPiece(text, tokens, logprobs, reason, stop)


def chunks(events: bytes) -> list[dict]:
    lines = events.decode().split("\n\n")
    assert lines.pop() == ""
    return [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]


def test_half_a_character_waits_for_the_other_half_with_its_logprobs():
    stream = StreamedChat(FORM, 0, 1, ENDS)
    (role,) = chunks(stream.add([piece("", 2)]))
    assert (role["delta"], role["logprobs"]) == ({"role": "assistant", "content": ""}, None)
    assert stream.add([piece("", 2)]) == b""
    (both,) = chunks(stream.add([piece("é", 3)]))
    assert both["delta"] == {"content": "é"}
    assert [each["bytes"] for each in both["logprobs"]["content"]] == [[0xC3], [0xC3], [0xA9]]
    assert both["logprobs"]["content"][0]["token"] == "bytes:\\xc3"


def test_pieces_that_came_together_share_a_chunk():
    stream = StreamedCompletion(FORM, 2, 1, ENDS, "echo ")
    (first,) = chunks(stream.add([piece("a", 1), piece("", 2), piece("é", 3)]))
    assert (first["index"], first["text"], first["finish_reason"]) == (2, "echo aé", None)
    assert first["logprobs"]["text_offset"][:2] == [5, 6]
    (last,) = chunks(stream.add([piece("", 9, reason="stop", stop=9)]))
    assert (last["text"], last["finish_reason"]) == ("", "stop")
    assert "stop_reason" not in last


def test_offsets_count_the_characters_of_the_text():
    pieces = [piece("", 2), piece("é", 3), piece("", 2), piece("\ufffda", 1), piece("a", 1, reason="length")]
    whole = completion_choice(FORM, 0, pieces, ENDS)
    assert whole.text == "é\ufffdaa"
    assert whole.logprobs.text_offset == [0, 0, 1, 1, 3]
    stream = StreamedCompletion(FORM, 0, 1, ENDS)
    streamed = [chunk for one in pieces for chunk in chunks(stream.add([one]))]
    assert [place for chunk in streamed for place in chunk["logprobs"]["text_offset"]] == [0, 0, 1, 1, 3]


@pytest.mark.parametrize(("stop", "told"), [(9, False), ("x", True), (1, True)])
def test_what_stopped_a_text_is_told_unless_it_is_the_end_of_the_model(stop, told):
    pieces = [piece("a", 1), piece("", 9, reason="stop", stop=stop)]
    for choice in (chat_choice(FORM, 0, pieces, ENDS), completion_choice(FORM, 0, pieces, ENDS)):
        assert (choice.stop_reason == stop) is told


def test_infinite_logprobs_are_numbers():
    one = TextPiece("a", (1,), (TokenLogprob(1, float("-inf"), ()),), "length")
    assert completion_choice(FORM, 0, [one], ENDS).logprobs.token_logprobs == [-9999.0]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (FieldError("n", "x"), 400, None),
        (Unauthorized("x"), 401, "invalid_api_key"),
        (UnknownModel("x"), 404, "model_not_found"),
        (TooLarge("x"), 413, "request_too_large"),
        (Busy("x"), 429, "rate_limit_exceeded"),
        (StageFailed("x"), 500, "internal_error"),
        (StageUnavailable("x"), 503, "service_unavailable"),
        (NotLoaded("x"), 503, "service_unavailable"),
        (DeadlineExceeded("x"), 504, "timeout"),
        (ValueError("secret"), 500, "internal_error"),
    ],
)
def test_every_error_has_a_status_and_a_code(error, status, code):
    answer = error_answer(error).error
    assert (http_status(error), answer.code) == (status, code)
    assert "secret" not in answer.message


def test_only_paths_of_this_api_have_its_errors():
    assert all(map(is_openai_path, ("/v1", "/v1/x", "/v1/models/a\nb", "/tokenize", "/detokenize")))
    assert not any(map(is_openai_path, ("/v2", "/", "/v10", "/tokenize/x")))
