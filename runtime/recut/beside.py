"""Starts a plan beside the one that runs, with nodes of the same kind.

Nodes that a launcher starts come from another launcher of the same kind. Nodes that were started by hand start their
successors themselves, each on its own device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

from onnxsplit.errors import InputError
from onnxsplit.memory import free_memory_bytes
from onnxsplit.plan import Plan
from runtime.background import BACKGROUND_S
from runtime.coordinator.succession import Places
from runtime.errors import LaunchFailed, PipelineError, RecutRefused
from runtime.launching import beside
from runtime.options import RunOptions
from runtime.recut.door import Door
from runtime.recut.running_plan import RunningPlan
from runtime.recut.watching import device_of
from runtime.requests.admission import Admission
from runtime.starting import PreparedPipeline, launch_nodes, wait_for_nodes

_NODE_BYTES = 100 << 20  # of a node process in addition to its stage
_START_S = 120.0
_LOOK_S = 0.1


class PlanBeside:
    """A plan that starts beside another.

    Args:
        old: the plan that runs.
        folder: the directory of the new plan.
        plan: the new plan.
        door: where requests enter.
        stopped: tells that the new plan is not wanted any more.

    Attributes:
        running: the new plan. Its nodes are not started yet.

    Raises:
        RecutRefused: its nodes cannot run beside those that run.
    """

    def __init__(self, old: RunningPlan, folder: Path, plan: Plan, door: Door, stopped: Callable[[], bool]) -> None:
        self._old, self._plan, self._stopped = old, plan, stopped
        self._options = _options(old, plan, stopped)
        self._counts = RunOptions.of(self._options).counts(plan)
        try:
            if old.launcher is not None:
                prepared = self._launched(folder, door.admission)
            else:
                prepared = self._by_hand(folder, door.admission)
        except InputError as error:
            raise RecutRefused(f"this pipeline cannot run the new plan: {error}") from error
        self.running = RunningPlan(prepared, door.next_number())

    def start(self) -> None:
        """Start the nodes, and wait until all are ready.

        Raises:
            LaunchFailed, PipelineError: they did not become ready, or the new plan is not wanted any more.
        """
        new = self.running
        if self._old.launcher is not None:
            new.wait()
            return
        coordinator, handover = self._old.coordinator, new.coordinator.handover
        places = self._places()

        def succeed() -> None:
            while not self._stopped():
                try:
                    address = handover.listening.result(_LOOK_S)
                    break
                except FutureTimeout:
                    continue
            else:
                raise LaunchFailed("the new plan is not wanted any more")
            coordinator.succeed(address, places, background_s=BACKGROUND_S).result()

        try:
            new.wait(succeed, lambda: self._stopped() or bool(coordinator.handover.lost_successors))
        except LaunchFailed as error:
            if lost := coordinator.handover.lost_successors:
                raise LaunchFailed(lost[0]) from error
            raise

    def _launched(self, folder: Path, admission: Admission) -> PreparedPipeline:
        launcher = self._old.launcher
        assert launcher is not None
        if not hasattr(launcher, "beside"):
            raise RecutRefused(
                f"the nodes of this pipeline were started by a {type(launcher).__name__}, which has no method beside, "
                "so it cannot start those of a second plan"
            )
        if launcher.rendezvous.single_host:
            self._require_memory()
        another = launcher.beside(self._plan, replicas=self._counts, background_s=BACKGROUND_S)
        return launch_nodes(folder, another, self._options | {"custom_ops": ()}, admission)

    def _by_hand(self, folder: Path, admission: Admission) -> PreparedPipeline:
        old = self._old
        assert old.bind is not None
        self._places()  # refuses what has no places
        return wait_for_nodes(folder, beside(old.bind, old.options.ports), self._options, admission, succeeds=True)

    def _places(self) -> Places:
        """For the nodes that run, by slot, the slot of the new plan that is on the same device.

        Raises:
            RecutRefused: the new plan needs more nodes than there are.
        """
        free = {
            (node.stage, node.replica): device_of(self._old.plan, node.stage, node.replica)
            for node in self._old.coordinator.nodes()
        }
        wanted = [(stage, replica) for stage, count in enumerate(self._counts) for replica in range(count)]
        if len(wanted) > len(free):
            raise RecutRefused(
                f"the new plan needs {len(wanted)} nodes, and {len(free)} that were started by hand take part; plan "
                "for fewer devices, or launch the pipeline with elastic (serve --elastic) and start more with --stage"
            )
        places = {}
        for among_same in (True, False):  # first the nodes on the same device, then any
            for slot in list(wanted):
                device = device_of(self._plan, *slot)
                old = next((each for each, name in free.items() if name == device or not among_same), None)
                if old is not None:
                    del free[old]
                    wanted.remove(slot)
                    places[old] = slot, self._plan.stages[slot[0]].peak_memory_bytes + _NODE_BYTES
        return places

    def _require_memory(self) -> None:
        """Refuse a plan whose nodes need more memory than this host has free.

        Raises:
            RecutRefused: says how much is needed and how much is free.
        """
        sizes = [stage.peak_memory_bytes + _NODE_BYTES for stage in self._plan.stages]
        needed = sum(count * size for count, size in zip(self._counts, sizes, strict=True))
        free = free_memory_bytes()
        if needed > free:
            raise RecutRefused(
                f"the nodes of the new plan need about {needed >> 20} MiB beside those that run, and {free >> 20} MiB "
                "are free; free some memory, or start the pipeline again with the new plan"
            )


def _options(old: RunningPlan, plan: Plan, stopped: Callable[[], bool]) -> dict[str, Any]:
    """The options of the new plan: those of the one that runs, and the same length of sequences."""
    present = old.options
    options = {field.name: getattr(present, field.name) for field in dataclasses.fields(present)}
    if isinstance(present.replicas, dict) and len(plan.stages) != len(old.plan.stages):
        raise RecutRefused(
            f"this pipeline was launched with replicas by stage, and the new plan has {len(plan.stages)} stages "
            f"instead of {len(old.plan.stages)}; launch it with one number, or with the plan's numbers"
        )
    counts = old.coordinator.planned
    if len(plan.stages) == len(counts) and old.scaled and not isinstance(present.replicas, dict):
        options["replicas"] = dict(enumerate(counts))
    limits = old.coordinator.limits
    return options | {
        "abandoned": stopped,
        "progress": lambda _ready, _all: None,
        "start_timeout": present.start_timeout or _START_S,
        "max_length": limits.length if limits is not None else present.max_length,
    }


def take_over(new: RunningPlan, address: str) -> None:
    """Let nodes that are started by hand find a new plan at the address of the pipeline, once the old one has closed.

    Raises:
        PipelineError: it cannot listen there.
    """
    if new.launcher is not None or new.address == address:
        return
    try:
        new.coordinator.take_over(address).result(_START_S)
    except FutureTimeout:
        raise PipelineError(f"{address} is still in use, so further nodes cannot join there") from None
