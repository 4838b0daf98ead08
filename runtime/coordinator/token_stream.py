"""The tokens of one sequence on their way to the caller's threads and event loops."""

from __future__ import annotations

import threading
from collections.abc import Callable

from onnxsplit.errors import OnnxsplitError
from onnxsplit.tensors import Array
from runtime.coordinator.sequence_events import EndReason
from runtime.wire.messages.sequences import Drawn


class TokenStream:
    """All tokens of a sequence so far, and its end. Nothing is dropped, however slowly they are read.

    One thread at a time adds to it, under the lock of the requests. It then calls :meth:`wake` without that lock. Any
    number of threads and event loops read.

    Attributes:
        drawn: the tokens.
        scores: the scores of each token, where the caller asked for them.
        times_ns: when each token arrived, by the host's monotonic clock.
        cached: the number of tokens of the prompt that were not computed, because another sequence had them.
        reason: why the sequence has ended; None before, and when it failed.
        error: why it failed; None before, and when it did not.
    """

    def __init__(self) -> None:
        self.drawn: list[Drawn] = []
        self.scores: list[Array] = []
        self.times_ns: list[int] = []
        self.cached = 0
        self.reason: EndReason | None = None
        self.error: OnnxsplitError | None = None
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, Callable[[], None]]] = []

    @property
    def ended(self) -> bool:
        """Whether no more tokens follow."""
        return self.reason is not None or self.error is not None

    def add(self, drawn: Drawn, scores: Array | None, now_ns: int) -> None:
        """Add the next token."""
        self.times_ns.append(now_ns)
        if scores is not None:
            self.scores.append(scores)
        self.drawn.append(drawn)  # last, because readers look at this list

    def finish(self, reason: EndReason) -> None:
        """End it after its last token."""
        self.reason = reason

    def fail(self, error: OnnxsplitError) -> None:
        """End it with an error."""
        self.error = error

    def wake(self) -> None:
        """Call the functions of those that wait for the tokens that have come, or for the end."""
        with self._lock:
            if not self._waiting:
                return
            count, ended = len(self.drawn), self.ended
            ready = [call for seen, call in self._waiting if ended or seen < count]
            self._waiting = [(seen, call) for seen, call in self._waiting if not ended and seen >= count]
        for call in ready:
            call()

    def when_more(self, seen: int, call: Callable[[], None]) -> None:
        """Call a function once, in any thread, as soon as there are more tokens than ``seen``, or the end."""
        with self._lock:
            if len(self.drawn) <= seen and not self.ended:
                self._waiting.append((seen, call))
                return
        call()

    def forget(self, call: Callable[[], None]) -> None:
        """Do not call a function that still waits; its reader has given up."""
        with self._lock:
            self._waiting = [waiting for waiting in self._waiting if waiting[1] is not call]
