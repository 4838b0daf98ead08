"""Starts a plan: checks its options, makes its coordinator, and waits until the nodes are ready. Ends a dropped one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
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
        admission: limits the requests in flight, perhaps together with those of another plan.
        entrance: checks and admits requests.
        limits: the most requests in flight in this plan alone, and how many of them wake a caller that waits.
        plan_id: the plan's identity.
        launcher: starts the nodes; None for nodes that are started by hand.
        bind: the address for nodes that are started by hand, as the caller gave it; None for others.
    """

    plan: Plan
    folder: Path
    options: RunOptions
    coordinator: Coordinator
    admission: Admission
    entrance: Entrance
    limits: tuple[int, int]
    plan_id: str
    launcher: Launcher | None
    bind: str | None

    def wait(self, begin: Callable[[], None] = lambda: None, abandoned: Callable[[], bool] | None = None) -> str:
        """Start the coordinator, and wait until all nodes are ready; returns the address to which they connect.

        Args:
            begin: is called when the coordinator has started.
            abandoned: tells that the nodes are not wanted any more; that of the options when None.

        Raises:
            LaunchFailed, PipelineError: they did not become ready, or the launch was abandoned.
        """
        ready, abandoned = self.coordinator.start(), abandoned or self.options.abandoned
        begin()
        while not wait((ready,), None if abandoned is None else _LOOK_S).done:
            if abandoned is not None and abandoned():
                raise LaunchFailed("the launch was given up before all nodes were ready")
        return ready.result()


def launch_nodes(
    plan: str | Path, launcher: Launcher | None, options: Mapping[str, Any], admission: Admission | None = None
) -> PreparedPipeline:
    """Prepare a pipeline that starts its nodes; see :meth:`runtime.pipeline.Pipeline.launch`.

    Args:
        plan: the plan directory.
        launcher: starts the nodes, and is closed with the pipeline; None for nodes on this host.
        options: the attributes of :class:`~runtime.options.RunOptions`.
        admission: limits the requests in flight; None for one of its own.
    """
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
        return _prepared(setup, wanted, memory_bytes, admission)
    except BaseException:
        if launcher is not None:
            launcher.close(keep_logs=False)
        raise


def wait_for_nodes(
    plan: str | Path,
    bind: str,
    options: Mapping[str, Any],
    admission: Admission | None = None,
    *,
    succeeds: bool = False,
) -> PreparedPipeline:
    """Prepare a pipeline whose nodes are started by hand; see :meth:`runtime.pipeline.Pipeline.listen`.

    Args:
        plan: the plan directory.
        bind: the address for nodes.
        options: the attributes of :class:`~runtime.options.RunOptions`.
        admission: as for :func:`launch_nodes`.
        succeeds: whether nodes of another pipeline start its nodes
            (:meth:`runtime.coordinator.loop.Coordinator.succeed`). If one of these is lost before all are ready, the
            launch fails.
    """
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
            succeeds=succeeds,
        )
        return _prepared(setup, wanted, memory_bytes, admission, bind)
    except BaseException:
        shutil.rmtree(rendezvous.home, ignore_errors=True)
        raise


def _prepared(
    setup: Setup, options: RunOptions, memory_bytes: int, admission: Admission | None, bind: str | None = None
) -> PreparedPipeline:
    plan = setup.plan
    rows = batch_size(plan) if options.micro_batch is None else options.micro_batch
    enough = enough_inflight(plan, options.most_counts(plan), batches=max(1, rows // batch_size(plan)))
    inflight = 1 if options.mode == "sync" else options.inflight or enough
    group = 1 if options.inflight else max(1, inflight // _GROUPS)
    check, admission = RequestCheck(setup.folder, plan, rows), admission or Admission(inflight, memory_bytes, group)
    coordinator = Coordinator(setup)
    return PreparedPipeline(
        plan=plan,
        folder=setup.folder,
        options=options,
        coordinator=coordinator,
        admission=admission,
        entrance=Entrance(plan, check, admission, coordinator.requests),
        limits=(inflight, group),
        plan_id=setup.plan_id,
        launcher=setup.launcher,
        bind=bind,
    )
