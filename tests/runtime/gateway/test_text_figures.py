"""The figures of texts, counted from their beginning to their end."""

from __future__ import annotations

from runtime.gateway.openai.figures import RequestFigures

S = 1_000_000_000


def test_a_text_waits_then_runs_then_is_finished():
    figures = RequestFigures()
    record = figures.begin(5, 0)
    assert (figures.requests_waiting, figures.requests_running, figures.prompt_tokens) == (1, 0, 5)
    record.tokens([S])
    assert (figures.requests_waiting, figures.requests_running) == (0, 1)
    record.tokens([2 * S, 3 * S])
    record.end("stop", 4 * S)
    record.end("abort", 5 * S)  # only the first counts
    assert (figures.requests_waiting, figures.requests_running, figures.generation_tokens) == (0, 0, 3)
    assert figures.finished == {"stop": 1}


def test_times_go_to_the_observers():
    first: list[float] = []
    gaps: list[float] = []
    ends: list[tuple[float, int, int]] = []
    figures = RequestFigures(
        on_first_token=first.append, on_gap=gaps.append, on_end=lambda *values: ends.append(values)
    )
    record = figures.begin(7, 0)
    record.tokens([2 * S])
    record.tokens([2 * S, 3 * S])
    record.tokens([5 * S])
    record.end("length", 6 * S)
    assert (first, gaps, ends) == ([2.0], [0.0, 1.0, 2.0], [(6.0, 7, 4)])


def test_a_text_without_a_token_can_end():
    figures = RequestFigures()
    figures.begin(1, 0).end("error", S)
    assert (figures.requests_waiting, figures.requests_running, figures.finished) == (0, 0, {"error": 1})
