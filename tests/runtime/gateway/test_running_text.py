"""A text on its way to a client that reads slowly."""

from __future__ import annotations

import asyncio

from runtime.coordinator.token_stream import TokenStream
from runtime.gateway.openai.figures import RequestFigures
from runtime.gateway.openai.texts import RunningText
from runtime.requests.generation import Generation
from runtime.text.generation import TextGeneration
from runtime.text.stops import StopStrings
from runtime.wire.messages.sequences import Drawn, Sampling

S = 1_000_000_000


class Letters:
    """A detokenizer whose tokens are letters."""

    def add(self, token: int) -> str:
        return chr(token)

    def finish(self) -> str:
        return ""


def running(stream: TokenStream, figures: RequestFigures) -> RunningText:
    """A text of at most three tokens, which was asked for at 0."""
    sampling = Sampling(seed=1, end_tokens=())
    tokens = Generation(None, stream, 1, 2, max_tokens=3, sampling=sampling, has_scores=False, submitted_ns=0)
    return RunningText(0, TextGeneration(tokens, (5, 6), Letters(), StopStrings((), include=False)), figures)


def test_times_are_those_of_the_tokens_however_late_they_are_read():
    first: list[float] = []
    gaps: list[float] = []
    ends: list[tuple[float, int, int]] = []
    figures = RequestFigures(on_first_token=first.append, on_gap=gaps.append, on_end=lambda *one: ends.append(one))
    stream = TokenStream()
    text = running(stream, figures)
    for place, letter in enumerate("abc"):
        stream.add(Drawn(1, 1, place, ord(letter), -0.5, ()), None, (place + 2) * S)
    stream.finish("length")
    pieces = asyncio.run(text.more())
    assert "".join(piece.text for piece in pieces) == "abc"
    assert (first, gaps, ends) == ([2.0], [1.0, 1.0], [(4.0, 2, 3)])
    assert (figures.unfinished, figures.finished) == (0, {"length": 1})
