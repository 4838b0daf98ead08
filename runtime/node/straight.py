"""The straight path of a node: an ordinary request goes from one lane to the next in one function.

What is ordinary was decided before, once for each signature: the stage reads from one source only, the shapes of its
outputs are proven, and the session reads and writes in place. :meth:`.NodeState.passes` then says whether nothing
stands in the way of this attempt. Whatever is not ordinary goes through the state machine, which gives the same answer.

    entry -> slot for the outputs -> run -> are the inputs still valid? -> inputs given back -> entries for the readers
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from onnxsplit.errors import OnnxsplitError
from onnxsplit.tensors import Array
from runtime.balance.policies import UNIT_COST
from runtime.errors import ProtocolError, StageFailed
from runtime.memory.arena import Block
from runtime.memory.lane import LaneWriter
from runtime.memory.lanes import Taken, entry_of
from runtime.memory.layouts import Layout
from runtime.memory.outgoing import Attempt, Outgoing
from runtime.memory.payloads import Payloads
from runtime.memory.sender import COORDINATOR, Sender
from runtime.memory.signatures import Known, bytes_of, visits_of
from runtime.node.run_clock import RunClock
from runtime.node.stage_runner import StageRunner
from runtime.node.state import NodeState
from runtime.wire.messages.control import Assign
from runtime.wire.messages.data import Failed, Visit

_WAYS = 256  # signatures whose ways are kept
_PATIENCE_NS = 2_000_000  # how long a result may wait for the next ones
_RUNS = 256  # pairs of slots whose bindings are kept, for each way


@dataclass(slots=True)
class _Target:
    """A reader of a stage's outputs.

    Attributes:
        stage: the reading stage, or the caller.
        names: the outputs that it gets.
        key: what its fragments share.
        start: where the first of its tensors lies in the slot.
        numbers: the signature of the key, by the number of the reading process.
    """

    stage: int
    names: tuple[str, ...]
    key: Hashable
    start: int
    numbers: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Way:
    """How the requests of one signature pass the stage.

    Attributes:
        layout: where the outputs lie in their slot.
        targets: who gets them.
        runs: runs that are bound to their memory, by the slots of inputs and outputs and by their places.
    """

    layout: Layout
    targets: tuple[_Target, ...]
    runs: dict[tuple[int, int, int, int], Callable[[], None]] = field(default_factory=dict)


class Straight:
    """Runs ordinary requests of one node.

    Args:
        payloads: the node's side of shared memory.
        sender: sends what its readers do not know yet.
        runner: runs the stage.
        clock: measures the runs.
        assign: the stage.
        report: tells the coordinator that outputs cannot be sent.
    """

    def __init__(
        self,
        payloads: Payloads,
        sender: Sender,
        runner: StageRunner,
        clock: RunClock,
        assign: Assign,
        report: Callable[[Failed], None],
    ) -> None:
        self._payloads = payloads
        self._sender = sender
        self._runner = runner
        self._clock = clock
        self._assign = assign
        self._report = report
        self._ways: dict[Known, _Way] = {}
        self._waiting_since_ns = 0  # since when results wait that the coordinator was not told of; 0 for none

    def forget(self) -> None:
        """Find all ways anew, because processes have come or gone."""
        self._ways.clear()

    def run(self, taken: Taken, machine: NodeState, *, following_cost: int) -> bool:
        """Execute a request that was taken from a lane.

        Args:
            taken: the request.
            machine: says whether it may run now.
            following_cost: cost of the next request if several wait, else 0. The result of this one may then wait for
                that of the next one until the coordinator is woken. :meth:`ring` must be called before the node waits.

        Returns:
            False, with nothing done, if it must be queued instead.
        """
        entry, known = taken.entry, taken.known
        if not machine.passes(entry.request, entry.attempt, entry.view):
            return False
        arrived_ns = time.monotonic_ns()
        if entry.deadline_ns and arrived_ns > entry.deadline_ns:
            self._payloads.return_slot(known.sender, entry)
            return True
        tensors = known.tensors(entry)
        way = self._ways.get(known) or self._find(taken, tensors, machine)
        block = None if way is None else self._payloads.block(way.layout)
        if way is None or block is None:
            return False
        places = entry.slot, entry.offset, block.number, block.offset
        execute = way.runs.get(places) or self._bind(way, places, tensors, block)
        started_ns = self._clock.begin(entry.request, entry.attempt, entry.cost)
        try:
            execute()
        except (OnnxsplitError, MemoryError):  # the usual way finds out whether a shape has changed
            block.lend(())
            del self._ways[known]
            self._clock.end(started_ns, time.monotonic_ns(), entry.cost)
            return False
        ended_ns = time.monotonic_ns()
        self._clock.done(entry.request, entry.attempt)
        machine.executed += 1
        valid = known.holds(entry)
        self._payloads.return_slot(known.sender, entry)
        try:
            if valid:
                place, layout = self._assign, way.layout
                times = arrived_ns, started_ns, ended_ns, time.monotonic_ns()
                visit = Visit(place.stage, place.replica, *times, layout.size_bytes, layout.shared_bytes)
                self._forward(way, taken, block, visit, following_cost)
            else:  # the sender took its inputs back meanwhile, so another attempt has replaced this one
                block.lend(())
        finally:
            self._clock.end(started_ns, ended_ns, entry.cost)
        return True

    def ring(self) -> None:
        """Wake the coordinator if results wait for it that it was not told of, because more were to follow."""
        if self._waiting_since_ns:
            self._waiting_since_ns = 0
            lane = self._payloads.lanes.writer(COORDINATOR)
            if lane is not None:
                lane.ring()

    def _may_wait(self, following_cost: int, now_ns: int) -> bool:
        """Whether the coordinator need not be told of a result before the next one is there."""
        if not following_cost:
            self._waiting_since_ns = 0
            return False
        since = self._waiting_since_ns or now_ns
        wait_ns = now_ns - since + self._clock.service_ns * following_cost // UNIT_COST
        self._waiting_since_ns = since if wait_ns <= _PATIENCE_NS else 0
        return wait_ns <= _PATIENCE_NS

    def _find(self, taken: Taken, tensors: Mapping[str, Array], machine: NodeState) -> _Way | None:
        """Find the way of a signature; None if its requests are not ordinary, or not yet."""
        shapes = self._runner.proven(tensors)
        layout = self._payloads.layout(shapes)
        if not self._runner.session.binds_once or len(layout.shared) != len(self._runner.session.outputs):
            return None
        same = taken.known.signature
        targets = []
        for stage, names in machine.leaving(taken.known.fragment(taken.entry, 0)):
            if any(self._payloads.lanes.writer(number) is None for number in self._sender.readers_of(stage)):
                return None
            start = layout.start(names)
            assert start is not None
            key = layout, names, self._assign.stage, same.route, same.wanted
            targets.append(_Target(stage, names, key, start))
        if len(self._ways) >= _WAYS:
            self._ways.clear()
        way = self._ways[taken.known] = _Way(layout, tuple(targets))
        return way

    def _bind(
        self, way: _Way, places: tuple[int, int, int, int], tensors: Mapping[str, Array], block: Block
    ) -> Callable[[], None]:
        """A run that reads and writes in these slots."""
        if len(way.runs) >= _RUNS:
            way.runs.clear()
        run = way.runs[places] = self._runner.bound(tensors, self._payloads.arrays(block, way.layout))
        return run

    def _forward(self, way: _Way, taken: Taken, block: Block, visit: Visit, following_cost: int) -> None:
        """Send the outputs to their readers: as entries if all of them know the signatures."""
        entry, route = taken.entry, taken.known.signature.route
        found: list[tuple[int, LaneWriter, int, int]] = []
        readers: dict[int, tuple[str, ...]] = {}
        for target in way.targets:
            number = self._sender.reader(target.stage, route, entry.cost, way.layout.size_bytes)
            if number is None:
                continue
            readers[number] = target.names
            lane = self._payloads.lanes.writer(number)
            if lane is not None:
                signature = target.numbers.get(number, 0)
                if not lane.knows(signature):
                    signature = target.numbers[number] = lane.signature(target.key)
                if lane.knows(signature):
                    found.append((number, lane, signature, target.start))
        if len(found) < len(readers):
            self._send(way, taken, block, visit, readers, lent=False)
            return
        self._payloads.lend_block(block, readers)
        visits = entry.visits + bytes_of(visit)
        for number, lane, signature, start in found:
            waits = number == COORDINATOR and self._may_wait(following_cost, visit.sent_ns)
            if lane.write(entry_of(entry, entry.deadline_ns, signature, block, start, visits), more=waits):
                self._sender.sent(number, entry.cost)
            else:  # the ring is full
                self._send(way, taken, block, visit, {number: readers[number]}, lent=True)

    def _send(
        self, way: _Way, taken: Taken, block: Block, visit: Visit, readers: dict[int, tuple[str, ...]], *, lent: bool
    ) -> None:
        """Send the outputs to readers of which some need a message; ``lent`` if the slot is lent to all readers."""
        entry, same = taken.entry, taken.known.signature
        outgoing = Outgoing(
            self._payloads.arrays(block, way.layout),
            {name: block.place(at) for name, at in way.layout.shared.items()},
            [block],
            layout=way.layout,
        )
        try:
            attempt = Attempt(
                request=entry.request,
                attempt=entry.attempt,
                view=entry.view,
                cost=entry.cost,
                budget_ns=max(1, entry.deadline_ns - visit.sent_ns) if entry.deadline_ns else 0,
                route=same.route,
                wanted=same.wanted,
                history=(*visits_of(entry.visits), visit),
            )
            self._sender.send(readers, attempt, outgoing, self._assign.stage, keep=lent)
        except (StageFailed, ProtocolError) as error:
            block.lend(())
            place = self._assign
            self._report(Failed(entry.request, entry.attempt, place.stage, place.replica, str(error)))
