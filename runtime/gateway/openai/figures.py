"""Figures of the texts that a model generates for clients: counts, and times for histograms. Pure.

A text is one sequence of tokens. A request for several choices counts as several texts.

    begin ----> waiting ----> running ----> finished: stop, length, abort or error
                    first token
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
"""Why a text ended: by itself, at its largest number of tokens, because the client gave it up, or by an error."""


def _ignore(*_: object) -> None:
    """Observe nothing."""


@dataclass
class RequestFigures:
    """Figures of all texts of one version of a model since the server started. Used by one thread, that of the loop.

    Attributes:
        requests_waiting: texts that have no token yet.
        requests_running: texts that have some and have not ended.
        prompt_tokens: tokens of all prompts.
        generation_tokens: tokens of all texts.
        finished: number of texts that have ended, by reason.
        on_first_token: called with the seconds from the beginning of a text to its first token.
        on_gap: called with the seconds between two tokens of a text.
        on_end: called at the end of a text with the seconds it took, and the numbers of tokens of the prompt and of
            the text.
    """

    requests_waiting: int = 0
    requests_running: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: Counter[FinishReason] = field(default_factory=Counter)
    on_first_token: Callable[[float], None] = _ignore
    on_gap: Callable[[float], None] = _ignore
    on_end: Callable[[float, int, int], None] = _ignore

    @property
    def unfinished(self) -> int:
        """The number of texts that have begun and not ended."""
        return self.requests_waiting + self.requests_running

    def begin(self, prompt_tokens: int, now_ns: int) -> RequestRecord:
        """A text begins.

        Args:
            prompt_tokens: the number of tokens of its prompt.
            now_ns: the time, by the host's monotonic clock.
        """
        self.requests_waiting += 1
        self.prompt_tokens += prompt_tokens
        return RequestRecord(self, prompt_tokens, now_ns)


class RequestRecord:
    """One text in the figures of its model. Made by :meth:`RequestFigures.begin`."""

    def __init__(self, figures: RequestFigures, prompt_tokens: int, begun_ns: int) -> None:
        self._figures = figures
        self._prompt_tokens = prompt_tokens
        self._begun_ns = self._last_ns = begun_ns
        self._tokens = 0
        self._ended = False

    def tokens(self, times_ns: Sequence[int]) -> None:
        """Some tokens were read. The times are those at which they came, which does not depend on their reader."""
        figures = self._figures
        for time_ns in times_ns:
            seconds = (time_ns - self._last_ns) / 1e9
            if self._tokens:
                figures.on_gap(seconds)
            else:
                figures.requests_waiting -= 1
                figures.requests_running += 1
                figures.on_first_token(seconds)
            self._tokens += 1
            self._last_ns = time_ns
        figures.generation_tokens += len(times_ns)

    def end(self, reason: FinishReason, now_ns: int) -> None:
        """The text has ended. Only the first call counts."""
        if self._ended:
            return
        self._ended = True
        figures = self._figures
        if self._tokens:
            figures.requests_running -= 1
        else:
            figures.requests_waiting -= 1
        figures.finished[reason] += 1
        figures.on_end((now_ns - self._begun_ns) / 1e9, self._prompt_tokens, self._tokens)
