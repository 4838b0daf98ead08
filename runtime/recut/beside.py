"""Starts a plan beside the one that runs, with nodes of the same kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxsplit.errors import InputError
from onnxsplit.memory import free_memory_bytes
from onnxsplit.plan import Plan
from runtime.errors import RecutRefused
from runtime.launch.local import LocalLauncher
from runtime.options import RunOptions
from runtime.recut.running_plan import RunningPlan
from runtime.requests.admission import Admission
from runtime.starting import launch_nodes

_NODE_BYTES = 100 << 20  # of a node process in addition to its stage
_START_S = 120.0


def prepare_beside(
    running: RunningPlan, folder: Path, plan: Plan, admission: Admission, stopped: Callable[[], bool]
) -> RunningPlan:
    """Prepare a plan that is to run beside another. Nothing is started yet.

    Args:
        running: the plan that runs.
        folder: the directory of the new plan.
        plan: the new plan.
        admission: limits the requests in flight of both.
        stopped: tells that the new plan is not wanted any more.

    Raises:
        RecutRefused: its nodes cannot run beside those that run.
    """
    options = _options(running, plan, stopped)
    launcher = running.launcher
    if launcher is None:
        raise RecutRefused("nodes that were started by hand cannot be replaced yet; plan with onnxsplit replan instead")
    if launcher.rendezvous.single_host:
        _require_memory(plan, options)
    if type(launcher) is not LocalLauncher:
        raise RecutRefused(f"a {type(launcher).__name__} cannot start nodes for a second plan")
    try:
        prepared = launch_nodes(folder, None, options, admission)
    except InputError as error:
        raise RecutRefused(f"the options of this pipeline do not fit the new plan: {error}") from error
    return RunningPlan(prepared, running.number + 1)


def _options(running: RunningPlan, plan: Plan, stopped: Callable[[], bool]) -> dict[str, Any]:
    """The options of the new plan: those of the one that runs, and the same length of sequences."""
    present = running.options
    options = {field.name: getattr(present, field.name) for field in dataclasses.fields(present)}
    if isinstance(present.replicas, dict) and len(plan.stages) != len(running.plan.stages):
        raise RecutRefused(
            f"this pipeline was launched with replicas by stage, and the new plan has {len(plan.stages)} stages "
            f"instead of {len(running.plan.stages)}; launch it with one number, or with the plan's numbers"
        )
    limits = running.coordinator.limits
    return options | {
        "abandoned": stopped,
        "progress": lambda _ready, _all: None,
        "start_timeout": present.start_timeout or _START_S,
        "max_length": limits.length if limits is not None else present.max_length,
    }


def _require_memory(plan: Plan, options: dict[str, Any]) -> None:
    """Refuse a plan whose nodes need more memory than this host has free.

    Raises:
        RecutRefused: says how much is needed and how much is free.
    """
    counts = RunOptions.of(options).counts(plan)
    needed = sum(n * (s.peak_memory_bytes + _NODE_BYTES) for n, s in zip(counts, plan.stages, strict=True))
    free = free_memory_bytes()
    if needed > free:
        raise RecutRefused(
            f"the nodes of the new plan need about {needed >> 20} MiB beside those that run, and {free >> 20} MiB are "
            "free; free some memory, or start the pipeline again with the new plan"
        )
