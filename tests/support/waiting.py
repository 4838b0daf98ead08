"""Waiting in tests: for a condition, with a deadline that is missed only if something is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 60.0


def wait_until(condition: Callable[[], Any], what: str = "it", *, every_s: float = 0.02) -> Any:
    """Return the condition's value once that is true.

    Raises:
        AssertionError: it was not true within a minute.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE_S:.0f} s"
        time.sleep(every_s)
    return found
