"""Processes that tests look at while they may end."""

from __future__ import annotations

from collections.abc import Iterable

import psutil


def running(pids: Iterable[int]) -> list[int]:
    """Return the processes that have not ended; a zombie has."""
    return [pid for pid in pids if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
