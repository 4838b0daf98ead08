"""The text of one sequence, as it comes."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from runtime.errors import Cancelled
from runtime.requests.generation import Generation, TokenLogprob, Usage
from runtime.text.detokenizer import Detokenizer
from runtime.text.pieces import TextPiece
from runtime.text.stops import StopStrings


@dataclass(frozen=True)
class GeneratedText:
    """A finished text.

    Attributes:
        text: the text.
        tokens: its tokens, with the end token that ended it.
        reason: as in :class:`~runtime.text.pieces.TextPiece`.
        stop: as there.
        usage: the numbers of tokens.
        logprobs: for each token its probability and those of others; None if they were not asked for.
        seed: the seed of the random numbers.
    """

    text: str
    tokens: tuple[int, ...]
    reason: Literal["stop", "length"]
    stop: str | int | None
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None
    seed: int


class TextGeneration:
    """The text of one sequence: an iterator and an asynchronous iterator of its pieces, also empty ones.

    After the piece with a reason, it ends. A stop string ends the sequence in the pipeline, too; tokens behind it that
    have come are dropped. ``await`` gives the same as :meth:`result`. Leaving a ``with`` block, :meth:`close` or
    dropping the last reference ends it early; any thread may close it.

    Args:
        generation: its tokens.
        prompt: the tokens of the prompt.
        detokenizer: turns tokens into text.
        stops: finds stop strings.

    Attributes:
        generation: as given.
        prompt: as given.
    """

    def __init__(
        self,
        generation: Generation,
        prompt: tuple[int, ...],
        detokenizer: Detokenizer,
        stops: StopStrings,
    ) -> None:
        self.generation = generation
        self.prompt = prompt
        self._detokenizer = detokenizer
        self._stops = stops
        self._count = 0  # of the tokens read
        self._parts: list[str] = []
        self._reason: Literal["stop", "length"] | None = None
        self._stop: str | int | None = None
        self._ended = False

    @property
    def usage(self) -> Usage:
        """The numbers of tokens: of the prompt, and of the text that was read so far."""
        return Usage(len(self.prompt), self._count, self.generation.cached)

    def __iter__(self) -> TextGeneration:
        return self

    def __next__(self) -> TextPiece:
        piece = None if self._ended else self._piece(next(self.generation, None))
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> TextGeneration:
        return self

    async def __anext__(self) -> TextPiece:
        piece = None if self._ended else self._piece(await anext(self.generation, None))
        if piece is None:
            raise StopAsyncIteration
        return piece

    def _piece(self, token: int | None) -> TextPiece | None:
        """The piece of one token; None where another thread has closed the generation."""
        if token is None:
            self._ended = True
            return None
        logprob = self.generation.logprob(self._count)
        self._count += 1
        is_end, is_last = token in self.generation.end_tokens, self._count == self.generation.max_tokens
        text = "" if is_end else self._stops.add(self._detokenizer.add(token))
        if (is_end or is_last) and self._stops.found is None:
            text += self._stops.add(self._detokenizer.finish()) + self._stops.finish()
        stop = token if is_end and self._stops.found is None else self._stops.found
        self._parts.append(text)
        self._stop, self._reason = stop, "stop" if stop is not None else "length" if is_last else None
        if self._reason is not None:
            self._ended = True
            self.generation.close()
        return TextPiece(
            text=text,
            tokens=(token,),
            logprobs=None if logprob is None else (logprob,),
            reason=self._reason,
            stop=stop,
        )

    def result(self) -> GeneratedText:
        """Read the rest, and return the whole text.

        Raises:
            PipelineError: the generation failed, or it was closed before its end.
        """
        for _ in self:
            pass
        return self._generated()

    def __await__(self) -> Generator[None, None, GeneratedText]:
        return self._rest().__await__()

    async def _rest(self) -> GeneratedText:
        async for _ in self:
            pass
        return self._generated()

    def _generated(self) -> GeneratedText:
        if self._reason is None:
            raise Cancelled("the text was closed before its end")
        logprobs = self.generation.logprobs
        return GeneratedText(
            text="".join(self._parts),
            tokens=self.generation.tokens[: self._count],
            reason=self._reason,
            stop=self._stop,
            usage=self.usage,
            logprobs=None if logprobs is None else logprobs[: self._count],
            seed=self.generation.seed,
        )

    def close(self) -> None:
        """End the sequence now."""
        self._ended = True
        self.generation.close()

    def __enter__(self) -> TextGeneration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
