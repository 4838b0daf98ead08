"""A plan that runs, with its own coordinator and nodes. A pipeline that is being cut anew has two of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from weakref import WeakSet

from runtime.coordinator.moving import move_requests
from runtime.coordinator.node_record import Phase
from runtime.coordinator.status import NodeInfo
from runtime.requests.generator import Generator
from runtime.starting import PreparedPipeline

_LOOK_S = 0.01


class RunningPlan:
    """A plan that runs.

    Args:
        prepared: its parts.
        number: its generation: 1 for the plan that the pipeline was launched with.

    Attributes:
        number: as given.
        plan: the plan.
        folder: the plan directory.
        plan_id: the plan's identity.
        options: how it is run.
        limits: the most requests in flight in it, and how many of them wake a caller that waits.
        launcher: starts its nodes; None for nodes that are started by hand.
        bind: the address for nodes that are started by hand, as the caller gave it.
        coordinator: runs its nodes.
        entrance: checks and admits its requests.
        generator: starts its generations of tokens.
        address: the address to which its nodes connect; empty before all nodes were ready.
        leases: the calls that are about to send a request to it.
        has_served: whether requests have entered it.
    """

    def __init__(self, prepared: PreparedPipeline, number: int) -> None:
        self.number = number
        self.plan = prepared.plan
        self.folder = prepared.folder
        self.plan_id = prepared.plan_id
        self.options = prepared.options
        self.limits = prepared.limits
        self.launcher = prepared.launcher
        self.bind = prepared.bind
        self.coordinator = prepared.coordinator
        self.entrance = prepared.entrance
        self.generator = Generator(prepared.coordinator, prepared.plan, prepared.entrance.check_open)
        self.address = ""
        self.has_served = number == 1
        self.leases: WeakSet[object] = WeakSet()
        self._prepared = prepared

    def wait(self, begin: Callable[[], None] = lambda: None, abandoned: Callable[[], bool] | None = None) -> None:
        """Start the coordinator, and wait until all nodes are ready; as :meth:`.PreparedPipeline.wait`."""
        self.address = self._prepared.wait(begin, abandoned)

    @property
    def is_idle(self) -> bool:
        """Whether no request or sequence is on its way to it or in it."""
        return not self.leases and not self.entrance.in_parts and not self.coordinator.in_flight

    @property
    def scaled(self) -> bool:
        """Whether its stages have other numbers of nodes than at the start, by the caller's will."""
        ranges = self.coordinator.ranges
        return all(each.is_fixed for each in ranges) and self.coordinator.planned != tuple(r.least for r in ranges)

    @property
    def is_full(self) -> bool:
        """Whether a further request would have to wait for admission now."""
        return self._prepared.admission.is_full

    @property
    def why_broken(self) -> str:
        """Why some requests cannot be answered until somebody helps, in words; empty if all can."""
        if self.coordinator.ended:
            return f"its pipeline has ended: {self.coordinator.trouble}"
        for node in self._without_stage():
            if self.launcher is None or node.state == Phase.OPEN.value:
                return f"stage {node.stage} has no node that is ready: {node.state}"
        return ""

    @property
    def is_whole(self) -> bool:
        """Whether every stage has a node that is ready."""
        return not self._without_stage()

    def _without_stage(self) -> list[NodeInfo]:
        """The nodes of stages of which none is ready."""
        nodes = self.coordinator.nodes()
        ready = {node.stage for node in nodes if node.state == Phase.READY.value}
        return [node for node in nodes if node.stage not in ready]

    def wait_until_idle(self, until: Callable[[], object]) -> bool:
        """Wait until it is idle; returns False if ``until`` is true first, or the coordinator has ended."""
        while not self.is_idle:
            if self.coordinator.ended or until():
                return False
            time.sleep(_LOOK_S)
        return True

    def move_requests(self, other: RunningPlan) -> None:
        """Let another plan answer the requests that are here. New ones may no longer come; sequences stay."""
        while self.leases:
            time.sleep(_LOOK_S)
        move_requests(self.coordinator.requests, other.coordinator.requests, self.plan.outputs)

    def close(self) -> None:
        """Stop its nodes; requests that are left fail with :class:`~runtime.errors.PipelineClosed`."""
        self.entrance.close()
        self.coordinator.close()
