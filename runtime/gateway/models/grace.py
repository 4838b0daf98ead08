"""For how long a version that was ready stays ready for probes after a stage has lost its last node. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ReadyGrace:
    """The grace of one loaded version. It begins at the first look at which a stage has no ready node.

    A pipeline has started only when every stage has a node, so a new grace counts as complete.

    Attributes:
        seconds: The length of the grace. 0: a version is not ready while a stage has no ready node.
    """

    seconds: float = 0.0
    _lost_s: float | None = None

    def holds(self, *, complete: bool, now_s: float) -> bool:
        """Whether a version counts as ready.

        Args:
            complete: Whether every stage has a ready node now.
            now_s: The time, by a monotonic clock.
        """
        if complete:
            self._lost_s = None
            return True
        if self._lost_s is None:
            self._lost_s = now_s
        return now_s - self._lost_s < self.seconds
