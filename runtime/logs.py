"""One line an event: what happened, then ``key=value`` for what to; programs find the values in ``record.fields``."""

from __future__ import annotations

import json
import logging
import time
from typing import Any


def log_event(log: logging.Logger, level: int, what: str, **fields: Any) -> None:
    """Log an event. Values with spaces, quotes or line breaks are written as JSON strings; None is left out."""
    if not log.isEnabledFor(level):
        return
    given = {key: value for key, value in fields.items() if value is not None}
    words = (f"{key}={_plain(value)}" for key, value in given.items())
    log.log(level, "%s", " ".join([what, *words]), extra={"fields": given})


def _plain(value: Any) -> str:
    text = str(value)
    return text if text and text.isprintable() and not any(c in text for c in ' "=') else json.dumps(text)


class DropLog:
    """Notes messages that were dropped, a line a second at most, so that nobody can fill a disk with them.

    Args:
        log: where to.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._next_s = 0.0
        self._unsaid = 0

    def note(self, reason: object) -> None:
        """One was dropped."""
        now = time.monotonic()
        if now < self._next_s:
            self._unsaid += 1
            return
        log_event(self._log, logging.WARNING, "message dropped", reason=reason, more=self._unsaid or None)
        self._next_s, self._unsaid = now + 1.0, 0
