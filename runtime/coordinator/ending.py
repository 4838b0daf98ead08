"""The end of a coordinator."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from typing import Any

from runtime.coordinator.setup import Setup
from runtime.topology import ReplicaKey

_log = logging.getLogger("runtime.coordinator")


def end_in_order(*steps: Callable[[], None]) -> None:
    """Take steps one after the other, even if some fail."""
    for step in steps:
        try:
            step()
        except Exception:
            _log.exception("the coordinator could not end in order")


def remove_files(
    setup: Setup, slots: Iterable[ReplicaKey], *, keep_logs: bool
) -> dict[ReplicaKey, list[dict[str, Any]]]:
    """Close the launcher, and remove the pipeline's files.

    Args:
        setup: how the plan was run.
        slots: the slots of nodes.
        keep_logs: whether the nodes' logs stay.

    Returns:
        The profiles of the nodes' sessions, if they were requested.
    """
    if setup.launcher is None:
        shutil.rmtree(setup.rendezvous.home, ignore_errors=True)
        return {}
    profiles = {slot: setup.launcher.profile(*slot) for slot in slots} if setup.profile else {}
    setup.launcher.close(keep_logs=keep_logs)
    return profiles
