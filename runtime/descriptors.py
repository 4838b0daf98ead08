"""Checks that a process can open more files. ZeroMQ aborts a process that has no file descriptors left."""

from __future__ import annotations

import os
import resource

from runtime.errors import PipelineError

SPARE = 32
"""Number of descriptors that are kept free for everything else in the process."""


def require_descriptors(count: int, what: str) -> None:
    """Check that this process can open more files, and raise its soft limit if that is needed and allowed.

    Args:
        count: number of descriptors that will be opened.
        what: their use, for the message.

    Raises:
        PipelineError: the hard limit is too low.
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
        f"{what} needs {count} file descriptors: this process has {used} open, and its hard limit is {hard}, of which "
        f"{SPARE} are kept free. Close some, or allow more with `ulimit -n`"
    )


def raise_limit(wanted: int) -> int:
    """Raise the soft limit to ``wanted`` descriptors, or to the hard limit; returns the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        return allowed
    return soft
