"""The tensor side of a node: receives fragments, executes the stage and sends its outputs."""

from __future__ import annotations

import gc
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from onnxsplit.errors import OnnxsplitError, PlanError, one_line
from onnxsplit.memory import return_freed_memory
from onnxsplit.plan import CALLER
from runtime.balance.router import Router
from runtime.errors import MemoryWithdrawn, ProtocolError, StageFailed
from runtime.files.stage import StageFiles
from runtime.logs import DropLog, log_event
from runtime.memory.lanes import Incoming
from runtime.memory.outgoing import Attempt, Outgoing
from runtime.memory.payloads import Payloads
from runtime.memory.pinned import cuda_pin
from runtime.memory.sender import Sender
from runtime.node.compression import Compression
from runtime.node.events import (
    Arrived,
    Connect,
    Executed,
    ExecutionFailed,
    Forward,
    Loaded,
    LoadFailed,
    NodeEvent,
    OutputsByTarget,
    Run,
)
from runtime.node.executor import Executor
from runtime.node.receipts import Receipts
from runtime.node.run_clock import RunClock
from runtime.node.state import NodeState
from runtime.node.straight import Straight
from runtime.topology import StepGraph, expected_tensors, sources
from runtime.wire import codec
from runtime.wire.links import Outlet
from runtime.wire.messages.control import Assign
from runtime.wire.messages.data import Failed, Fragment, Receipt, Started
from runtime.wire.sockets import Sockets

_log = logging.getLogger("runtime.node")
_drops = DropLog(_log)
_MOST_REASON_CHARACTERS = 500


class Worker:
    """The worker of a node's main thread; ``clock`` and ``unreachable_peers`` are thread-safe.

    Args:
        memory_bytes: the largest size of its outputs in shared memory at once; 0 for no shared memory.

    Attributes:
        payloads: this process's shared memory, and that of its peers.
        mapped: the numbers of the peers whose memory is mapped.
        clock: measures the runs.
        receipts: tells senders on other hosts what has arrived and what is finished.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.payloads = Payloads(memory_bytes)
        self.mapped: tuple[int, ...] = ()
        self.clock = RunClock(self.payloads)
        self._router = Router("completion", self.payloads.board)
        self._me = -1
        self._links: dict[int, Outlet] = {}
        self._sources: dict[int, list[int]] = {}  # the sources of every stage
        self._expected: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {}  # names and types, by source
        self._shared: dict[OutputsByTarget, tuple[str, ...]] = {}
        self._executor: Executor | None = None
        self._expected_in_steps = self._expected
        self._compression = Compression()
        self.receipts = Receipts(self.payloads.board, self._compression)
        self._sender = Sender(self.payloads, self._router, self._links, self._sources, self._compression.names)
        self._ran = _Ran(Outgoing(), valid=False)
        self._straight: Straight | None = None  # None for a stage whose requests are never ordinary
        self._assign: Assign  # set by load(), before anything reads it

    def close(self) -> None:
        """Close the session and release all memory."""
        if self._executor is not None:
            self._executor.close()
        self._executor = self._straight = None
        self.payloads.close()
        gc.unfreeze()

    def unreachable_peers(self) -> tuple[int, ...]:
        """The numbers of the targets that cannot be reached now; the router avoids them from now on."""
        numbers = tuple(sorted(number for number, link in list(self._links.items()) if not link.connected))
        self._router.unreachable = frozenset(numbers)
        return numbers

    @property
    def left_to_cpu(self) -> dict[str, int]:
        """The ops of the stage that its provider left to the CPU: their number by op type."""
        return self._executor.left_to_cpu if self._executor is not None else {}

    @property
    def why_unguided(self) -> str:
        """Why no sequence can follow a grammar on this node; empty before a stage is loaded."""
        return self._executor.why_unguided if self._executor is not None else ""

    def share(self, readers: tuple[int, ...]) -> None:
        """Lend memory to these peers from now on."""
        self.payloads.share(readers, self._links)
        self._forget_readers()

    def _forget_readers(self) -> None:
        """Find out anew who reads which outputs in place."""
        self._shared.clear()
        if self._straight is not None:
            self._straight.forget()

    def report(self, message: Failed) -> None:
        """Tell the coordinator that this stage could not execute a request."""
        log_event(
            _log,
            logging.WARNING,
            "request failed",
            request=message.request,
            attempt=message.attempt,
            stage=message.stage,
            reason=message.reason,
        )
        self._links[0].send(codec.encode(message))

    def _announce(self, request: int, attempt: int) -> None:
        """Tell a coordinator that cannot read this node's memory that a run begins."""
        self._links[0].send(codec.encode(Started(request, attempt, self._me)))

    def discard(self) -> None:
        """Drop the outputs of the request that ran last."""
        self._ran.outgoing.drop()

    def load(self, files: StageFiles, assign: Assign, *, home: Path, threads: int) -> NodeEvent:
        """Find the stage's files and open the session.

        Args:
            files: where to find them.
            assign: the stage.
            home: folder for the profile.
            threads: threads of the session; the assigned number when 0.

        Returns:
            :class:`~runtime.node.events.Loaded` or :class:`~runtime.node.events.LoadFailed`.
        """
        self._assign = assign
        self._router = Router(assign.balance, self.payloads.board)
        own = files.custom_ops
        try:
            plan, folder = files.find(assign)
            try:
                self._executor = Executor(plan, folder, assign, home=home, threads=threads, custom_ops=own)
            except PlanError:
                if not files.discard(folder):
                    raise
                plan, folder = files.find(assign)
                self._executor = Executor(plan, folder, assign, home=home, threads=threads, custom_ops=own)
        except (OnnxsplitError, MemoryError) as error:
            return LoadFailed(str(error) or "out of memory")
        self._sources = {stage.index: sorted(sources(plan, stage.index)) for stage in plan.stages}
        self._compression.learn(plan, assign.stage)
        self._sender = Sender(self.payloads, self._router, self._links, self._sources, self._compression.names)
        self._expected = expected_tensors(plan, assign.stage)
        if len(self._sources[assign.stage]) == 1:
            runner = self._executor.runner
            self._straight = Straight(self.payloads, self._sender, runner, self.clock, assign, self.report)
        if plan.decoder is not None:
            self._expected_in_steps = StepGraph(plan).expected(assign.stage)
        return_freed_memory()  # the stage's file, and weights as they were before they were packed
        log_event(
            _log, logging.INFO, "stage loaded", stage=assign.stage, replica=assign.replica, provider=assign.provider
        )
        if left := self.left_to_cpu:
            kinds = ",".join(f"{kind}:{count}" for kind, count in left.items())
            log_event(
                _log, logging.WARNING, "ops left to the CPU", stage=assign.stage, ops=sum(left.values()), types=kinds
            )
        return Loaded(plan)

    def connect(self, connect: Connect, sockets: Sockets) -> None:
        """Map the memory of new neighbours, and open and close links so that they match the targets."""
        first = not self._links
        peers = {peer.number: peer for peer in connect.peers}
        self.mapped = self.payloads.meet(connect.me, {n: peers[n] for n in connect.neighbours})
        self._router.learn(connect.me, connect.peers, self.payloads.boards())
        self._forget_readers()
        for number in self._links.keys() - connect.targets:
            self._links.pop(number).close()
        for number in connect.targets - self._links.keys():
            peer = peers[number]
            shortcut = peer.shortcut if number in self.mapped else ""
            self._links[number] = sockets.connect(peer.address, shortcut=shortcut, key=peer.key)
        self._me = connect.me
        self._compression.connect(peers, self.mapped)
        self.clock.announce = None if self._router.mapped(0) else self._announce
        stage = self._assign.stage
        senders = [
            n for n in connect.neighbours if peers[n].stage in self._sources[stage] and not self._router.mapped(n)
        ]
        siblings = sum(peer.stage == stage and peer.takes for peer in connect.peers) > 1
        far = {number for number in senders if not self._router.mapped(number)}
        self.receipts.connect(connect.me, peers, far, sockets, siblings=siblings)
        if not first:
            return
        if self._assign.provider.startswith("cuda") and (pin := cuda_pin()) is not None:
            self.payloads.pin(pin)
        gc.freeze()  # these objects stay until it is closed, and requests make no cycles, so collections find little
        gc.set_threshold(100_000, 50, 50)

    def arrival(self, header: codec.Buffer, frames: list[codec.Buffer]) -> Arrived | None:
        """Handle a message of a data link.

        A fragment that cannot be read is reported to the coordinator, because another attempt would fail as well.

        Args:
            header: the first frame.
            frames: the frames that follow it.

        Returns:
            The event for a fragment; None for any other message, and for one that was dropped.
        """
        message: object = None
        try:
            message = codec.decode_data(header)
            if isinstance(message, Fragment):
                return self._fragment(message, frames)
            if not isinstance(message, Receipt):
                raise ProtocolError(f"a {type(message).__name__}, which nodes do not receive")
            self._router.told(message, time.monotonic_ns())
            self._compression.told(message)
        except MemoryWithdrawn as error:
            _drops.note(error)
        except Exception as error:  # any error concerns this request alone
            _drops.note(error)
            if isinstance(message, Fragment):
                source = "the caller" if message.source == CALLER else f"stage {message.source}"
                reason = one_line(error, _MOST_REASON_CHARACTERS)
                self._fail(message, f"the fragment from {source} cannot be read: {reason}")
        return None

    def from_lane(self, lane: Incoming, machine: NodeState) -> tuple[bool, Arrived | None]:
        """Handle the next entry of a lane.

        Returns:
            Whether there was one, and the event for an entry that was not executed at once.
        """
        try:
            taken = lane.take()
            if taken is None:
                return False, None
            if self._straight is not None and self._straight.run(taken, machine, following_cost=lane.following_cost):
                return True, None
            fragment, tensors = self.payloads.lift(taken)
        except ProtocolError as error:
            _drops.note(error)
            return True, None
        self.receipts.arrived(fragment)
        return True, Arrived(fragment, tensors, time.monotonic_ns())

    def ring(self) -> None:
        """Tell the coordinator of results that wait for it, before the node waits itself."""
        if self._straight is not None:
            self._straight.ring()

    def _fragment(self, fragment: Fragment, frames: list[codec.Buffer]) -> Arrived | None:
        tensors = self.payloads.receive(fragment, frames)
        self.receipts.arrived(fragment)
        if self._is_foreign(fragment):
            self.give_back(fragment)
            _drops.note(f"a fragment from stage {fragment.source} that is not of this plan")
            return None
        self.payloads.lanes.learn(fragment)
        return Arrived(fragment, tensors, time.monotonic_ns())

    def _fail(self, fragment: Fragment, reason: str) -> None:
        """Tell the coordinator that this stage cannot execute an attempt."""
        if 0 in self._links:
            stage, replica = self._assign.stage, self._assign.replica
            self.report(Failed(fragment.request, fragment.attempt, stage, replica, reason))

    def _is_foreign(self, fragment: Fragment) -> bool:
        """Whether a fragment does not hold the tensors that its source sends to this stage."""
        if fragment.rows and not (self._executor and self._executor.runs_steps):
            return False  # the state machine says why such a step fails
        expected = (self._expected_in_steps if fragment.rows else self._expected).get(fragment.source)
        return expected is not None and (
            len(fragment.route) != len(self._sources)
            or tuple([head.name for head in fragment.tensors]) != expected[0]
            or tuple([head.dtype for head in fragment.tensors]) != expected[1]
        )

    def give_back(self, fragment: Fragment) -> None:
        """Return a fragment's memory to its sender, and count its work as finished."""
        self.payloads.give_back(fragment)
        self.receipts.settled(fragment)

    def run(self, run: Run) -> NodeEvent:
        """Execute the stage once, and keep the outputs for :meth:`forward` or :meth:`discard`.

        Returns:
            :class:`~runtime.node.events.Executed` or :class:`~runtime.node.events.ExecutionFailed`.
        """
        assert self._executor is not None
        payloads = self.payloads
        shared = self._shared.get(run.leaving)
        if shared is None:
            shared = self._shared[run.leaving] = self._read_in_place(run.leaving)
        outgoing = payloads.reserve(self._executor.proven(run), shared)
        started = self.clock.begin(*run.key, run.cost)
        try:
            outputs, drawn = self._executor.execute(run, outgoing.arrays)
        except (OnnxsplitError, MemoryError) as error:
            outgoing.drop()
            return ExecutionFailed(str(error) or "out of memory")
        finally:
            ended = time.monotonic_ns()
            self.clock.end(started, ended, run.cost)
        payloads.complete(outgoing, outputs, shared)
        self.clock.done(*run.key)
        self._ran = _Ran(outgoing, payloads.hold(run.fragments))
        return Executed(started, ended, time.monotonic_ns(), outgoing.size_bytes, outgoing.shared_bytes, drawn)

    def clear(self, slots: tuple[int, ...]) -> None:
        """Forget the sequences in some slots, and give their memory back to the system."""
        if self._executor is not None:
            self._executor.clear(slots)

    def forward(self, effect: Forward) -> None:
        """Send the outputs of the request that ran last to their readers."""
        outgoing, fragment = self._ran.outgoing, effect.fragment
        if not self._ran.valid:  # a sender took its inputs back meanwhile, so another attempt has replaced this one
            outgoing.drop()
            return
        attempt = Attempt(
            request=fragment.request,
            attempt=fragment.attempt,
            view=fragment.view,
            cost=fragment.cost,
            budget_ns=effect.budget_ns,
            route=fragment.route,
            wanted=fragment.wanted,
            history=effect.history,
            rows=fragment.rows,
            drawn=effect.drawn,
        )
        readers = self._sender.readers(effect.leaving, attempt, outgoing)
        try:
            self._sender.send(readers, attempt, outgoing, self._assign.stage, keep=False)
        except StageFailed as error:
            outgoing.drop()
            self._fail(fragment, str(error))

    def _read_in_place(self, targets: OutputsByTarget) -> tuple[str, ...]:
        """The outputs that some peer may read in place."""
        shared: set[str] = set()
        for stage, names in targets:
            if any(self.payloads.lends_to(number) for number in self._sender.readers_of(stage)):
                shared.update(names)
        return tuple(sorted(shared))


@dataclass
class _Ran:
    """The request that ran last: its outputs, and whether no sender took its inputs back before it ended."""

    outgoing: Outgoing
    valid: bool
