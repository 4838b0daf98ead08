"""Log lines for events: what happened, then ``key=value`` pairs. Programs find the pairs in ``record.fields``."""

from __future__ import annotations

import json
import logging
import time
from typing import Any


def log_event(log: logging.Logger, level: int, what: str, **fields: Any) -> None:
    """Log an event.

    Args:
        log: the logger.
        level: the level.
        what: what happened.
        fields: the pairs. A value with spaces, quotes or line breaks is written as a JSON string; None is left out.
    """
    if not log.isEnabledFor(level):
        return
    given = {key: value for key, value in fields.items() if value is not None}
    words = (f"{key}={_plain(value)}" for key, value in given.items())
    log.log(level, "%s", " ".join([what, *words]), extra={"fields": given})


def _plain(value: Any) -> str:
    text = str(value)
    return text if text and text.isprintable() and not any(c in text for c in ' "=') else json.dumps(text)


class DropLog:
    """Logs dropped messages, at most one line a second, so that a peer cannot fill the disk.

    Args:
        log: the logger.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._next_s = 0.0
        self._suppressed = 0

    def note(self, reason: object) -> None:
        """Log that a message was dropped, and why; the number of lines left out follows in the next line."""
        now = time.monotonic()
        if now < self._next_s:
            self._suppressed += 1
            return
        log_event(self._log, logging.WARNING, "message dropped", reason=reason, more=self._suppressed or None)
        self._next_s, self._suppressed = now + 1.0, 0
