"""The outcomes of the requests of a chaos run, and violations."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

OURS = "a callback of the chaos"
"""What callbacks that raise say."""


class Ledger:
    """The outcomes of requests and the violations; every thread may write.

    Attributes:
        outcomes: kind of request -> outcome -> number of requests.
        faults: violation -> number of times it was seen.
        broken: set when the pipeline under test hangs, so that no more requests are sent to it.
    """

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = {}
        self.faults: Counter[str] = Counter()
        self.broken = threading.Event()
        self._lock = threading.Lock()

    def next_pipeline(self) -> None:
        """Start with a new pipeline; late outcomes of the old one are ignored."""
        self.broken = threading.Event()

    def note(self, kind: str, outcome: str) -> None:
        """Count a request that ended with a permitted outcome."""
        with self._lock:
            self.outcomes.setdefault(kind, Counter())[outcome] += 1

    def fault(self, text: str, kind: str = "", outcome: str = "") -> None:
        """Count a violation."""
        with self._lock:
            self.faults[f"{kind}: {text}" if kind else text] += 1
            if outcome:
                self.outcomes.setdefault(kind, Counter())[outcome] += 1

    def total(self, outcome: str) -> int:
        """Return the outcomes of all kinds together."""
        return sum(counts[outcome] for counts in self.outcomes.values())


@contextmanager
def stray_errors(ledger: Ledger) -> Iterator[None]:
    """Count threads that die of an exception, and exceptions of callbacks that the chaos run did not raise itself."""
    before = threading.excepthook

    def hook(given: threading.ExceptHookArgs) -> None:
        name = given.thread.name if given.thread is not None else "?"
        ledger.fault(f"thread {name} died of {given.exc_type.__name__}: {str(given.exc_value)[:200]}")

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            if OURS not in str(error):
                ledger.fault(f"logged: {record.getMessage()[:100]}: {type(error).__name__}: {str(error)[:160]}")

    handler = Handler(logging.ERROR)
    watched = [logging.getLogger(name) for name in ("concurrent.futures", "runtime", "asyncio")]
    kept = [logger.propagate for logger in watched]
    threading.excepthook = hook
    for logger in watched:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        threading.excepthook = before
        for logger, propagate in zip(watched, kept, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagate
