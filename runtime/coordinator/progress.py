"""Tells the caller how many nodes are ready."""

from __future__ import annotations

import logging
from collections.abc import Callable

_log = logging.getLogger("runtime.coordinator")


class Progress:
    """The number of ready nodes, and of all nodes, as a caller was last told.

    Args:
        callback: the caller's function.
    """

    def __init__(self, callback: Callable[[int, int], None]) -> None:
        self._callback = callback
        self._known = self._told = (-1, -1)

    def note(self, ready: int, total: int) -> None:
        """Note the numbers, as of now."""
        self._known = ready, total

    def tell(self) -> None:
        """Tell the caller if they have changed; not to be called while the coordinator's lock is held."""
        if self._known == self._told:
            return
        self._told = self._known
        try:
            self._callback(*self._known)
        except Exception:
            _log.exception("the callback for progress raised")
