"""The handle of one generation: the tokens as they come, for threads and for event loops."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Literal

from msgspec import Struct

from onnxsplit.tensors import Array
from runtime.coordinator.request_io import RequestIO
from runtime.coordinator.token_stream import TokenStream
from runtime.errors import PipelineError
from runtime.requests.normalize import MOST_TIMEOUT_S
from runtime.wire.messages.sequences import Drawn, Sampling

_END = sys.maxsize  # a number of tokens that no generation has: its reader waits for the end


class TokenLogprob(Struct, frozen=True):
    """The logarithm of a token's probability by the model's own scores, before any option changes them.

    Attributes:
        token: the token.
        logprob: the natural logarithm of its probability.
        top: the most probable tokens with the same of each, most probable first; as many as the caller asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Usage(Struct, frozen=True):
    """The numbers of tokens of a generation.

    Attributes:
        prompt: the tokens of the prompt.
        completion: the new tokens.
        cached: the tokens of the prompt that were not computed, because another sequence had begun alike.
    """

    prompt: int
    completion: int
    cached: int = 0


@dataclass(frozen=True)
class Generated:
    """A finished generation.

    Attributes:
        tokens: the new tokens. An end token is the last of them.
        reason: why it ended: ``stop`` for an end token, ``length`` for ``max_tokens`` or the end of the context.
        usage: the numbers of tokens.
        logprobs: for each token its probability and those of others; None if they were not asked for.
        scores: the model's scores for each token, [tokens, vocabulary] in the rows; None if they were not asked for.
        seed: the seed of the random numbers. The same seed, prompt and options give the same tokens.
        submitted_ns: when it was submitted, by the host's monotonic clock.
        times_ns: when each token arrived, by the same clock.
    """

    tokens: tuple[int, ...]
    reason: Literal["stop", "length"]
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None
    scores: tuple[Array, ...] | None
    seed: int
    submitted_ns: int
    times_ns: tuple[int, ...]


class Generation:
    """The new tokens of one sequence, as they come. It is made by :meth:`~runtime.pipeline.Pipeline.generate`.

    It is an iterator and an asynchronous iterator of token numbers. Tokens are kept until they are read, so a slow
    reader loses none. After the last token the iterator ends; if the generation has failed, it raises the error.
    ``await generation`` gives the same as :meth:`result`.

    A generation that nobody reads continues until it ends. :meth:`cancel` and :meth:`close` end it early, and so does
    leaving a ``with`` block, or dropping the last reference to it.

    Args:
        requests: takes the request to give it up.
        stream: receives the tokens.
        number: the sequence's number.
        prompt: the number of tokens of the prompt.
        max_tokens: the most new tokens.
        sampling: how they are chosen.
        has_scores: whether scores were asked for.
        submitted_ns: when it was submitted, by the host's monotonic clock.

    Attributes:
        prompt: as given.
        seed: the seed of the random numbers.
        max_tokens: as given.
        end_tokens: the tokens that end it.
        submitted_ns: as given.
    """

    def __init__(
        self,
        requests: RequestIO,
        stream: TokenStream,
        number: int,
        prompt: int,
        *,
        max_tokens: int,
        sampling: Sampling,
        has_scores: bool,
        submitted_ns: int,
    ) -> None:
        self.prompt = prompt
        self.seed = sampling.seed
        self.max_tokens = max_tokens
        self.end_tokens = frozenset(sampling.end_tokens)
        self.submitted_ns = submitted_ns
        self._requests = requests
        self._stream = stream
        self._number = number
        self._has_logprobs = sampling.logprobs >= 0
        self._has_scores = has_scores
        self._read = 0
        self._closed = False

    # The tokens so far

    @property
    def tokens(self) -> tuple[int, ...]:
        """All new tokens so far, whether they were read or not."""
        return tuple([drawn.token for drawn in self._stream.drawn])

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """The probabilities of all new tokens so far; None if they were not asked for."""
        return tuple(map(_logprob, self._stream.drawn)) if self._has_logprobs else None

    def logprob(self, index: int) -> TokenLogprob | None:
        """The probability of one of the new tokens so far; None if they were not asked for."""
        return _logprob(self._stream.drawn[index]) if self._has_logprobs else None

    @property
    def times_ns(self) -> tuple[int, ...]:
        """When each new token so far arrived, by the host's monotonic clock."""
        return tuple(self._stream.times_ns)

    def time_ns(self, index: int) -> int:
        """When one of the new tokens so far arrived, by the same clock."""
        return self._stream.times_ns[index]

    @property
    def cached(self) -> int:
        """The tokens of the prompt that were not computed, because another sequence had begun alike."""
        return self._stream.cached

    @property
    def done(self) -> bool:
        """Whether it has ended: with its last token, with an error, or because it was cancelled."""
        return self._stream.ended

    # Reading

    @property
    def ready(self) -> bool:
        """Whether the next token, the end or the error can be read without waiting."""
        return self._closed or self._read < len(self._stream.drawn) or self._stream.ended

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> int:
        while (token := self._next()) is None:
            self._wait(self._read, None)
        if token < 0:
            raise StopIteration
        return token

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> int:
        while (token := self._next()) is None:
            await self._more(self._read)
        if token < 0:
            raise StopAsyncIteration
        return token

    def _next(self) -> int | None:
        """The next token; -1 at the end, None when it has not come yet."""
        stream = self._stream
        if self._closed:
            return -1
        if self._read < len(stream.drawn):
            self._read += 1
            return stream.drawn[self._read - 1].token
        if stream.ended and self._read == len(stream.drawn):
            self._raise()
            return -1
        return None

    def result(self, timeout: float | None = None) -> Generated:
        """Wait for the end.

        Raises:
            PipelineError: the generation failed or was cancelled, or this was called in a callback of the pipeline,
                which would wait for itself.
            TimeoutError: it has not ended in ``timeout`` seconds; it continues.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not self._stream.ended:
            self._wait(_END, until)
        return self._generated()

    def __await__(self) -> Generator[None, None, Generated]:
        while not self._stream.ended:
            yield from self._more(_END).__await__()
        return self._generated()

    def _wait(self, seen: int, until: float | None) -> None:
        """Let the present thread wait until there are more tokens than it has seen, or the end."""
        self._requests.inbox.check_process()
        if self._requests.delivering and not self._stream.ended:
            raise PipelineError(
                "a callback of a request cannot wait for tokens: its thread delivers them. Wait in a thread of your own"
            )
        turn: SimpleQueue[None] = SimpleQueue()

        def call() -> None:
            turn.put(None)

        self._stream.when_more(seen, call)
        try:
            turn.get(timeout=None if until is None else min(max(0.0, until - time.monotonic()), MOST_TIMEOUT_S))
        except Empty:
            self._stream.forget(call)
            raise TimeoutError(
                f"the generation has not ended; it has {len(self._stream.drawn)} tokens so far, and it continues"
            ) from None

    async def _more(self, seen: int) -> None:
        """Let the present task wait until there are more tokens than it has seen, or the end."""
        self._requests.inbox.check_process()
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not turn.done():
                turn.set_result(None)

        def call() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(wake)

        self._stream.when_more(seen, call)
        try:
            await turn
        except asyncio.CancelledError:
            self._stream.forget(call)
            raise

    def _generated(self) -> Generated:
        self._raise()
        stream = self._stream
        assert stream.reason is not None, "it has ended without an error"
        return Generated(
            tokens=self.tokens,
            reason=stream.reason,
            usage=Usage(self.prompt, len(stream.drawn), stream.cached),
            logprobs=self.logprobs,
            scores=tuple(stream.scores) if self._has_scores else None,
            seed=self.seed,
            submitted_ns=self.submitted_ns,
            times_ns=tuple(stream.times_ns),
        )

    def _raise(self) -> None:
        if self._stream.error is not None:
            raise self._stream.error

    # The end

    def cancel(self) -> bool:
        """End it now; readers get :class:`~runtime.errors.Cancelled` after the tokens that have come.

        Returns:
            False if it had already ended.
        """
        if self._stream.ended:
            return False
        self._requests.inbox.check_process()
        self._requests.give_up(self._number)
        return True

    def close(self) -> None:
        """End it now, and drop the tokens that were not read: the iterator ends without an error."""
        self._closed = True
        self.cancel()

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if (
            not self._stream.ended and os.getpid() == self._requests.inbox.pid
        ):  # any thread may run this at any time, so it must not take a lock
            self._requests.give_up_later(self._number)


def _logprob(drawn: Drawn) -> TokenLogprob:
    return TokenLogprob(drawn.token, drawn.logprob, drawn.top)
