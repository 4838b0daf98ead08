"""File descriptors: ZeroMQ ends the process that has none left, so room is looked for before it is needed."""

from __future__ import annotations

import os
import resource

from runtime.errors import PipelineError

SPARE = 32
"""Descriptors that are left for everything else a process does."""


def require_descriptors(count: int, what: str) -> None:
    """See that a process can open so many more files, with a higher soft limit where that is needed and allowed.

    Args:
        count: of descriptors that will be opened.
        what: they are for, as the message says it.

    Raises:
        PipelineError: there is no room; says how many there are.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  the names alone
    wanted = used + count + SPARE
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard == resource.RLIM_INFINITY or wanted <= hard:
        raise_limit(wanted)
        return
    raise PipelineError(
        f"{what} needs {count} file descriptors: this process has {used} open and may have {soft}, {hard} at most. "
        "Close some, or allow more with `ulimit -n`"
    )


def raise_limit(wanted: int) -> int:
    """Allow this process so many descriptors, as far as the hard limit goes; returns how many it may have then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        return allowed
    return soft
