"""What can be seen of a running plan: its nodes, their figures, and what went wrong."""

from __future__ import annotations

from html import escape
from typing import Any

from onnxsplit.drawing.stages import StageBox, drawing_of
from onnxsplit.plan import Plan
from runtime.coordinator.loop import Coordinator
from runtime.coordinator.node_record import Incident
from runtime.coordinator.status import NodeInfo, SequenceStats, StageReplicas
from runtime.node_table import NodeTable
from runtime.recut.door import Door
from runtime.topology import StageGraph
from runtime.trace import RequestTrace, chrome_trace


class PipelineStatus:
    """The state of a running plan. :class:`~runtime.pipeline.Pipeline` adds what can be done with it.

    Args:
        door: as ``entrance`` below.

    Attributes:
        address: the address to which nodes connect.
        admission: counts the requests in flight; tells a caller that was refused when another try makes sense.
        entrance: checks and admits requests, into the plan that runs when they come.
        max_length: the most tokens of a sequence, prompt included; None where the plan has no decoder.
    """

    def __init__(self, door: Door) -> None:
        self.address = ""
        self.admission = door.admission
        self.entrance = door
        limits = door.current.coordinator.limits
        self.max_length = None if limits is None else limits.length
        self._folder = door.current.folder
        self._name = self._folder.resolve().name

    @property
    def plan(self) -> Plan:
        """The plan that it runs. It changes with :meth:`~runtime.pipeline.Pipeline.recut`."""
        return self.entrance.current.plan

    @property
    def inflight(self) -> int:
        """The number of requests, or micro-batches, that it admits at once."""
        return self.admission.requests

    @property
    def _coordinator(self) -> Coordinator:
        """The coordinator of the plan that runs; an error in a fork of the process that launched the pipeline."""
        self.entrance.check_process()
        return self.entrance.current.coordinator

    def __repr__(self) -> str:
        stages = len(self.plan.stages)
        return f"<Pipeline {self._name}: {stages} stage{'s' * (stages != 1)}, {self._condition}>"

    @property
    def _condition(self) -> str:
        if not self.entrance.is_own:
            return "belongs to another process"
        if self._coordinator.ended:
            return "closed"
        nodes = self.nodes
        ready = sum(node.state == "ready" for node in nodes)
        return f"{ready} of {len(nodes)} nodes ready, {self.admission.inside} of {self.inflight} requests in flight"

    def _repr_html_(self) -> str:
        """A drawing of the stages with their figures, for notebooks."""
        if not self.entrance.is_own or self._coordinator.ended:
            return f"<p>{escape(repr(self))}</p>"
        stats = self.stats()
        boxes = []
        for stage in self.plan.stages:
            nodes = [node for node in stats if node.stage == stage.index]
            ready = sum(node.state == "ready" for node in nodes)
            runs = sum(node.requests for node in nodes)
            mean_ms = sum(node.ran_ns for node in nodes) / max(1, runs) / 1e6
            took = f"{mean_ms:.3g} ms" if runs else "no request yet"
            lines = (f"{ready} of {len(nodes)} nodes ready", f"{took}, planned {stage.predicted_time_ns / 1e6:.3g} ms")
            boxes.append(StageBox(f"stage {stage.index}", lines, good=ready > 0))
        return drawing_of(f"{self._name}: {self._condition}", boxes, self.plan.edges())

    @property
    def nodes(self) -> tuple[NodeInfo, ...]:
        """The present nodes, by stage and replica."""
        return self._coordinator.nodes()

    def stats(self) -> NodeTable:
        """Counts and times per stage and replica, since the plan that runs has got its nodes."""
        return NodeTable(self._coordinator.stats())

    @property
    def replicas(self) -> tuple[StageReplicas, ...]:
        """The number of nodes of every stage: now, and the least and the most that the load may make of it."""
        return self._coordinator.replicas()

    @property
    def sequences(self) -> SequenceStats | None:
        """Counts of the sequences that ``generate`` continues; None where the plan has no decoder."""
        return self._coordinator.sequences()

    @property
    def unreachable(self) -> str | None:
        """Why no request can pass although every stage has a node, naming the dead links; None when requests can pass.

        A pipeline for which this is not None is not ready to serve.
        """
        return self._coordinator.unreachable

    @property
    def incidents(self) -> tuple[Incident, ...]:
        """The lost nodes and dead links, oldest first, at most a hundred."""
        self.entrance.check_process()
        return self.entrance.incidents

    @property
    def retries(self) -> int:
        """The number of attempts that were repeated."""
        self.entrance.check_process()
        return self.entrance.retries

    @property
    def losses(self) -> int:
        """The number of processes of nodes that were lost, also by plans that ran before."""
        self.entrance.check_process()
        return self.entrance.losses

    @property
    def ended(self) -> bool:
        """True when it no longer processes requests: it was closed, or one of its threads has failed."""
        return self._coordinator.ended

    @property
    def trouble(self) -> str | None:
        """Why this pipeline answers no requests, for example a failed thread; None when it does, or may soon."""
        return self._coordinator.trouble

    @property
    def traced(self) -> list[RequestTrace]:
        """The answered requests with their visits, for pipelines launched with ``trace``. The list may be cleared."""
        return self._coordinator.requests.traced

    @property
    def lent_bytes(self) -> int:
        """Bytes of inputs in shared memory that nodes have not returned yet."""
        self.entrance.check_process()
        return self.entrance.lent_bytes

    def trace(self) -> dict[str, Any]:
        """The run so far as a timeline, in Chrome's trace event format, for pipelines launched with ``trace``.

        It has the requests of the plan that runs now.
        Once the pipeline is closed, it contains the profiles of the sessions (``trace_ops``).
        """
        return chrome_trace(self.traced, StageGraph(self.plan).readers, self._coordinator.profiles)
