"""The text of one sequence, as it comes."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

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
    reason: str
    stop: str | int | None
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None
    seed: int


class TextGeneration:
    """The text of one sequence: an iterator and an asynchronous iterator of its pieces, also empty ones.

    After the piece with a reason, it ends. A stop string ends the sequence in the pipeline, too. Leaving a ``with``
    block, :meth:`close` or dropping the last reference ends it early.

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
        self._ended = False

    @property
    def usage(self) -> Usage:
        """The numbers of tokens: of the prompt, and of the text that was read so far."""
        return Usage(len(self.prompt), self._count)

    def __iter__(self) -> TextGeneration:
        return self

    def __next__(self) -> TextPiece:
        if self._ended:
            raise StopIteration
        return self._piece(next(self.generation, None))

    def __aiter__(self) -> TextGeneration:
        return self

    async def __anext__(self) -> TextPiece:
        if self._ended:
            raise StopAsyncIteration
        return self._piece(await anext(self.generation, None))

    def _piece(self, token: int | None) -> TextPiece:
        if token is None:  # it was closed
            self._ended = True
            raise StopIteration
        logprob = self.generation.logprob(self._count)
        self._count += 1
        is_end, is_last = token in self.generation.end_tokens, self._count == self.generation.max_tokens
        text = "" if is_end else self._stops.add(self._detokenizer.add(token))
        if (is_end or is_last) and self._stops.found is None:
            text += self._stops.add(self._detokenizer.finish()) + self._stops.finish()
        stop = token if is_end else self._stops.found
        self._ended = is_last or stop is not None
        if self._ended:
            self.generation.close()
        return TextPiece(
            text=text,
            tokens=(token,),
            logprobs=None if logprob is None else (logprob,),
            reason="stop" if stop is not None else "length" if is_last else None,
            stop=stop,
        )

    def result(self) -> GeneratedText:
        """Read the rest and return all that was read by this call."""
        pieces = list(self)
        logprobs = [one for piece in pieces for one in piece.logprobs or ()]
        return GeneratedText(
            text="".join(piece.text for piece in pieces),
            tokens=tuple(token for piece in pieces for token in piece.tokens),
            reason=pieces[-1].reason or "stop",
            stop=pieces[-1].stop,
            usage=self.usage,
            logprobs=tuple(logprobs) or None,
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
