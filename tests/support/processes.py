"""Processes that tests look at while they may end."""

from __future__ import annotations

from collections.abc import Iterable

import psutil


def running(pids: Iterable[int]) -> list[int]:
    """Return the processes that have not ended; a zombie has."""
    return [pid for pid in pids if _runs(pid)]


def children_of(pid: int, module: str, *, recursive: bool = False) -> list[psutil.Process]:
    """Return the running children of a process that execute a module, those that were started first first."""
    children = psutil.Process(pid).children(recursive=recursive)
    return sorted((child for child in children if module in _command(child)), key=psutil.Process.create_time)


def _command(process: psutil.Process) -> str:
    """The words of its command; empty for a process that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
