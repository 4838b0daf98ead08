"""The texts of one request on their way to the client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from runtime.gateway.openai.figures import FinishReason, RequestFigures
from runtime.text.generation import TextGeneration
from runtime.text.pieces import TextPiece

_MOST_PIECES = 64  # that are read at once, between which other requests go on


class RunningText:
    """One text that is being generated.

    Args:
        index: which of the texts of the request.
        generation: its pieces.
        figures: counts it.

    Attributes:
        index: as given.
        prompt: the number of tokens of its prompt.
        completion: the number of its tokens so far.
    """

    def __init__(self, index: int, generation: TextGeneration, figures: RequestFigures) -> None:
        self.index = index
        self.prompt = len(generation.prompt)
        self.completion = 0
        self._generation = generation
        self._record = figures.begin(self.prompt, generation.generation.submitted_ns)
        self._ended = False

    @property
    def cached(self) -> int:
        """The number of tokens of its prompt that were not computed."""
        return self._generation.usage.cached

    async def more(self) -> list[TextPiece]:
        """Wait for a piece, and return all that have come; an empty list after the last one.

        Raises:
            PipelineError: the text has failed.
        """
        if self._ended:
            return []
        generation = self._generation
        pieces = [await anext(generation)]
        while pieces[-1].reason is None and generation.generation.ready and len(pieces) < _MOST_PIECES:
            pieces.append(await anext(generation))
        before, time_ns = self.completion, generation.generation.time_ns
        self.completion += sum([len(piece.tokens) for piece in pieces])
        self._record.tokens([time_ns(index) for index in range(before, self.completion)])
        if (reason := pieces[-1].reason) is not None:
            self._ended = True
            self._record.end(reason, time_ns(self.completion - 1))
        return pieces

    def close(self, reason: FinishReason) -> None:
        """End it now, if it has not ended."""
        self._record.end(reason, time.monotonic_ns())
        self._generation.close()


async def arriving(texts: Sequence[RunningText]) -> AsyncIterator[tuple[RunningText, list[TextPiece]]]:
    """The pieces of several texts, in the order in which they come. The text waits while nobody reads this.

    Raises:
        PipelineError: one of them has failed.
    """
    if len(texts) == 1:
        while pieces := await texts[0].more():
            yield texts[0], pieces
        return
    arrived: asyncio.Queue[tuple[RunningText, list[TextPiece] | Exception]] = asyncio.Queue(1)
    readers = [asyncio.ensure_future(_read(text, arrived)) for text in texts]
    try:
        running = len(texts)
        while running:
            text, found = await arrived.get()
            if isinstance(found, Exception):
                raise found
            if found:
                yield text, found
            else:
                running -= 1
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _read(text: RunningText, arrived: asyncio.Queue[tuple[RunningText, list[TextPiece] | Exception]]) -> None:
    """Put the pieces of a text into the queue, and an empty list or the error at the end."""
    pieces: list[TextPiece] = []
    try:
        while pieces := await text.more():
            await arrived.put((text, pieces))
    except Exception as error:
        await arrived.put((text, error))
    else:
        await arrived.put((text, pieces))
