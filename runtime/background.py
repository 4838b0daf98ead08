"""Processes at idle priority: a node that loads in the background leaves the cores to the stages that serve.

Linux runs a process of the policy SCHED_IDLE only where no other process wants the core. A process without privileges
may always enter that policy. It may leave it again only with CAP_SYS_NICE, or where RLIMIT_NICE allows its nice value
(``ulimit -e 20``; ``LimitNICE=+0`` in a unit of systemd). Where it may not, nodes load at normal priority.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from contextlib import suppress
from functools import cache

BACKGROUND_S = 5.0
"""Seconds after which a node that loads in the background goes on at normal priority, even if it is not ready.

On a host whose cores are all busy, a process at idle priority hardly runs at all.
"""

_log = logging.getLogger("runtime.background")


@cache
def may_return() -> bool:
    """Whether a process of this user may leave idle priority again; tried by a thread of this process."""
    allowed: list[bool] = []

    def try_it() -> None:
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            allowed.append(True)

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()
    if not allowed:
        _log.info("nodes load at normal priority: this user may not leave idle priority again (RLIMIT_NICE is 0)")
    return bool(allowed)


def hold_back(pid: int, seconds: float) -> threading.Timer | None:
    """Run a process that was just started at idle priority, for some seconds at most.

    Args:
        pid: a child of this process that has not been reaped.
        seconds: after which it is returned to normal priority, if it has not returned by itself.

    Returns:
        The timer; cancel it before the process is reaped. None where the process stays at normal priority.
    """
    if seconds <= 0 or not may_return():
        return None
    try:
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
    except OSError:  # it has ended
        return None
    timer = threading.Timer(seconds, bring_forward, (pid,))
    timer.daemon = True
    timer.start()
    return timer


def come_forward_at_the_end_of(lifeline: int) -> None:
    """Return this process to normal priority when what has started it, and would do that, has ended.

    At idle priority, this process might otherwise not end for minutes on a busy host.

    Args:
        lifeline: a descriptor whose other end is closed when what has started this process ends.
    """

    def watch() -> None:
        ending = select.poll()
        ending.register(lifeline, 0)  # hang-ups are always reported
        ending.poll()
        bring_forward(os.getpid())

    threading.Thread(target=watch, name="priority", daemon=True).start()


def bring_forward(pid: int) -> None:
    """Return all threads of a process to normal priority. New threads inherit theirs, so look until none is left."""
    with suppress(OSError):  # the process has ended
        while idle := [thread for thread in _threads(pid) if _is_idle(thread)]:
            for thread in idle:
                with suppress(ProcessLookupError):  # it has ended
                    os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def make_as_nice_as_this(pid: int) -> None:
    """Give all threads of a process the nice value of this one, where this user may."""
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    with suppress(OSError):  # the process has ended, or this user may not
        for thread in _threads(pid):
            os.setpriority(os.PRIO_PROCESS, thread, niceness)


def _threads(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]  # noqa: PTH208  the names alone


def _is_idle(thread: int) -> bool:
    try:
        return os.sched_getscheduler(thread) == os.SCHED_IDLE
    except ProcessLookupError:
        return False
