"""Starts a plan: checks its options, makes its coordinator, and waits until the nodes are ready. Ends a dropped one."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxsplit.plan import Plan
from onnxsplit.plan_files import load_plan
from onnxsplit.session import threads_per_node
from runtime.coordinator.loop import Coordinator
from runtime.coordinator.setup import Setup
from runtime.descriptors import require_descriptors
from runtime.errors import LaunchFailed
from runtime.launch.local import LocalLauncher
from runtime.launcher import Launcher
from runtime.launching import (
    custom_ops_of,
    meeting_point,
    plan_folder,
    refuse_custom_ops,
    refuse_ranges,
    security_of,
    setup_of,
)
from runtime.options import RunOptions, enough_inflight, memory_for_requests_bytes
from runtime.requests.admission import Admission
from runtime.requests.checks import RequestCheck
from runtime.requests.entrance import Entrance
from runtime.requests.microbatch import batch_size

START_TIMEOUT_S = 120.0
_LOOK_S = 0.2
_GROUPS = 4  # a caller that submits one request after another is woken when this part of them has been answered
_NODE_DESCRIPTORS = 8


@dataclass(frozen=True)
class PreparedPipeline:
    """The parts of a pipeline whose coordinator is not started yet.

    Attributes:
        plan: the plan.
        folder: the plan directory.
        options: how it is run.
        coordinator: runs the nodes.
        admission: limits the requests in flight.
        entrance: checks and admits requests.
    """

    plan: Plan
    folder: Path
    options: RunOptions
    coordinator: Coordinator
    admission: Admission
    entrance: Entrance

    def wait(self) -> str:
        """Start the coordinator, and wait until all nodes are ready; returns the address to which they connect.

        Raises:
            LaunchFailed, PipelineError: they did not become ready, or the launch was abandoned.
        """
        ready, abandoned = self.coordinator.start(), self.options.abandoned
        while not wait((ready,), None if abandoned is None else _LOOK_S).done:
            if abandoned is not None and abandoned():
                raise LaunchFailed("the launch was given up before all nodes were ready")
        return ready.result()


def launch_nodes(plan: str | Path, launcher: Launcher | None, options: Mapping[str, Any]) -> PreparedPipeline:
    """Prepare a pipeline that starts its nodes; see :meth:`runtime.pipeline.Pipeline.launch`."""
    try:
        folder, wanted = plan_folder(plan), RunOptions.of(options)
        loaded = load_plan(folder)
        nodes = sum(wanted.most_counts(loaded))
        require_descriptors(_NODE_DESCRIPTORS * nodes, f"a pipeline of {nodes} nodes")
        memory_bytes = wanted.inflight_bytes or memory_for_requests_bytes()
        if launcher is None:
            shared_bytes = memory_bytes if wanted.shared_memory else 0
            launcher = LocalLauncher(memory_bytes=shared_bytes, custom_ops=custom_ops_of(loaded, wanted))
        else:
            refuse_custom_ops(wanted, "the launcher that starts the nodes", "RayLauncher(custom_ops=[...])")
        shares_cores = launcher.rendezvous.single_host
        if not shares_cores:
            refuse_ranges(wanted, "With this launcher, Pipeline.scale changes it while requests go on")
        setup = setup_of(
            folder,
            loaded,
            wanted,
            launcher.rendezvous,
            memory_bytes=memory_bytes,
            threads=wanted.threads or (threads_per_node(nodes) if shares_cores else 0),
            launcher=launcher,
            start_timeout_s=wanted.start_timeout or START_TIMEOUT_S,
        )
        return _started(setup, wanted, memory_bytes)
    except BaseException:
        if launcher is not None:
            launcher.close(keep_logs=False)
        raise


def wait_for_nodes(plan: str | Path, bind: str, options: Mapping[str, Any]) -> PreparedPipeline:
    """Prepare a pipeline whose nodes are started by hand; see :meth:`runtime.pipeline.Pipeline.listen`."""
    wanted = RunOptions.of(options)
    refuse_ranges(wanted, "Nodes that are started by hand come and go with elastic=True")
    refuse_custom_ops(wanted, "each node that is started by hand", "onnxsplit node --custom-ops FILE.so")
    security, keys = security_of(bind, wanted)
    folder = plan_folder(plan)
    loaded = load_plan(folder)
    rendezvous = meeting_point(bind, wanted.ports, security, keys)
    try:
        memory_bytes = wanted.inflight_bytes or memory_for_requests_bytes()
        setup = setup_of(
            folder,
            loaded,
            wanted,
            rendezvous,
            memory_bytes=memory_bytes,
            threads=wanted.threads or 0,
            launcher=None,
            start_timeout_s=wanted.start_timeout,
        )
        return _started(setup, wanted, memory_bytes)
    except BaseException:
        shutil.rmtree(rendezvous.home, ignore_errors=True)
        raise


def _started(setup: Setup, options: RunOptions, memory_bytes: int) -> PreparedPipeline:
    plan = setup.plan
    rows = batch_size(plan) if options.micro_batch is None else options.micro_batch
    enough = enough_inflight(plan, options.most_counts(plan), batches=max(1, rows // batch_size(plan)))
    inflight = 1 if options.mode == "sync" else options.inflight or enough
    group = 1 if options.inflight else max(1, inflight // _GROUPS)
    check, admission = RequestCheck(setup.folder, plan, rows), Admission(inflight, memory_bytes, group)
    coordinator = Coordinator(setup)
    entrance = Entrance(plan, check, admission, coordinator.requests)
    return PreparedPipeline(plan, setup.folder, options, coordinator, admission, entrance)


def end_dropped(coordinator: Coordinator, name: str, owner: int) -> None:
    """End a pipeline that nobody refers to any more, when its requests are answered.

    It may run in any thread, inside any function, so it waits for nothing.
    """
    if os.getpid() != owner or coordinator.ended:
        return
    coordinator.close_when_drained()
    warnings.warn(
        f"the pipeline of {name} was dropped without close(); its nodes end now. Use a with statement, or close it",
        ResourceWarning,
        stacklevel=2,
    )
