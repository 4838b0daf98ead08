"""A runtime node: the process that executes one stage.

A node has two threads. The main thread receives fragments, runs the session and sends the outputs, without handing a
request over to another thread. The control thread communicates with the coordinator, also while the session runs.

A node drops its work when the coordinator falls silent or says that another node has replaced this one. A node that was
started by hand then asks for a place again. A node that a launcher started ends, as it also does when the launching
process has ended.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections import deque
from pathlib import Path

import msgspec.structs

from onnxsplit.file_cache import cache_folder
from runtime.background import bring_forward
from runtime.balance.policies import UNIT_COST
from runtime.files.stage import StageFiles
from runtime.files.stage_cache import StageCache
from runtime.node.control import ControlLink
from runtime.node.events import (
    AttemptCancelled,
    ClearSlots,
    Connect,
    Discard,
    Exit,
    Forward,
    GiveBack,
    LeaveAsked,
    LendMemory,
    Load,
    NodeEffect,
    NodeEvent,
    Passed,
    ReportFailure,
    Run,
    SayLeaving,
    SayReady,
    SayRefused,
    StopAsked,
    Turn,
)
from runtime.node.options import NodeOptions
from runtime.node.origin import LOST, NodeOrigin, Say
from runtime.node.state import NodePhase, NodeState
from runtime.node.worker import Worker
from runtime.wire.addresses import own_address, reachable
from runtime.wire.keys import Keys
from runtime.wire.links import Inlet
from runtime.wire.messages.control import (
    PROTOCOL,
    Hello,
    Leaving,
    NodeBeat,
    Ready,
    Refused,
    Succeed,
    SucceedRefused,
)
from runtime.wire.security import Security
from runtime.wire.sockets import Sockets
from runtime.wire.wakeup import Wakeup

_EXIT_GRACE_S = 2.0
_MOST_A_TURN = 8  # entries of each lane that are handled before the node looks for messages
_LOOK_S = 0.2  # after this time a node looks at its lanes, in case that a doorbell was lost
_SERVING = (NodePhase.READY, NodePhase.LEAVING)
_log = logging.getLogger("runtime.node")


class NodeProcess:
    """The main thread of a node: performs the effects of :class:`~runtime.node.state.NodeState`.

    Args:
        options: the options of the node.
        home: a private folder for its socket and profile.
        keys: its keys; None leaves links plain.
        origin: what has started it.
        patience_s: seconds to wait for the coordinator's first message; None waits without limit.
        asked_before: whether an earlier node of this process has asked for a place without success.

    Attributes:
        rejoins: whether another node is to begin in this process when this one has ended.
        had_place: whether the coordinator has assigned a stage to it.
        ended: set when a signal has asked it to end.

    Raises:
        InputError: the coordinator's public key is missing.
    """

    def __init__(
        self,
        options: NodeOptions,
        home: Path,
        keys: Keys | None,
        origin: NodeOrigin,
        patience_s: float | None = None,
        *,
        asked_before: bool = False,
    ) -> None:
        self._options = options
        self._home = home
        self._origin = origin
        self._own_key = keys.pair.public if keys else ""
        self._coordinator_key = keys.of("coordinator") if keys else ""
        self._patience_s = patience_s
        self._asked_before = asked_before
        self._trusted: frozenset[str] = frozenset()
        self._revoked: frozenset[str] = frozenset()
        self.rejoins = False
        self.had_place = False
        self._timers: list[threading.Timer] = []
        self._machine = NodeState()
        self._posted: deque[NodeEvent] = deque()
        self._wakeup = Wakeup()
        self._worker = Worker(options.memory_bytes)
        self._cache = StageCache(cache_folder("stages"), options.cache_bytes)
        self._security = Security(
            pair=keys.pair if keys else None,
            allows=lambda key: key in self._trusted or (keys is not None and key in keys.allowed),
            learns=True,
            insecure=options.insecure,
            revoked=lambda: self._revoked,
        )
        self._files = StageFiles(
            own=options.plan,
            shared=not options.fetch,
            cache=self._cache,
            coordinator=options.connect,
            security=self._security,
            key=self._coordinator_key,
            custom_ops=options.custom_ops,
            strict=not options.succeeds,
        )
        self._refused = self._lost = False
        self.ended = threading.Event()
        self._exit: Exit | None = None
        self._turn_ns = 0  # when the main thread last began to work; 0 while it waits

    @property
    def beat(self) -> NodeBeat:
        """A heartbeat, as of now."""
        self._origin.report(self._machine.state.name.lower())
        began, longest_ns = self._worker.clock.began, self._worker.clock.longest_ns
        if began is None and self._turn_ns and self._machine.state in _SERVING:
            began = self._turn_ns, UNIT_COST  # other work, such as sending, should not take longer than a request
        running_ns, cost = (max(1, time.monotonic_ns() - began[0]), began[1]) if began is not None else (0, 0)
        machine, unreachable = self._machine, self._worker.unreachable_peers()
        return NodeBeat(
            machine.executed, running_ns, cost, longest_ns, unreachable, machine.sequences, machine.state_bytes
        )

    def post(self, event: NodeEvent) -> None:
        """Pass an event to the main thread. Thread-safe."""
        self._posted.append(event)
        self._wakeup.ring()

    def trust(self, keys: frozenset[str]) -> None:
        """Accept connections from the owners of these public keys, and nothing more from those trusted before."""
        self._revoked = (self._revoked | self._trusted) - keys
        self._trusted = keys

    def end_soon(self, reason: str) -> None:
        """End within two seconds, even if the session is still running."""
        self._end_within(_EXIT_GRACE_S, reason)

    def _end_within(self, seconds: float, reason: str) -> None:
        timer = threading.Timer(seconds, self._exit_now, (seconds, reason))
        timer.daemon = True
        timer.start()
        self._timers.append(timer)
        self.post(StopAsked(reason))

    def _exit_now(self, seconds: float, reason: str) -> None:
        _log.error("ending: work was still running %.0f s after the node was to stop: %s", seconds, reason)
        if self._origin.outlive() and self._exit is not None:
            return
        if not self._options.lifeline:  # otherwise the launcher removes the folder
            shutil.rmtree(self._home, ignore_errors=True)
        os._exit(LOST if self._lost else 1)

    def coordinator_silent(self, reason: str) -> None:
        """The coordinator has fallen silent: drop the work and ask for a place again; see :meth:`rejoin`."""
        self.rejoin(reason)

    def rejoin(self, reason: str) -> None:
        """Drop the work and ask for a place again. A node that a launcher started ends instead.

        A stage that is loading, or a request that runs, may finish first; the result is dropped.
        """
        if self._options.lifeline:
            self._lost = self._options.succeeds
            self.end_soon(reason)
        elif not self.rejoins and not self._refused and self._exit is None:  # else another coordinator is there already
            self.rejoins = True
            self._end_within(max(_EXIT_GRACE_S, self._options.rejoin_s), reason)

    def be_refused(self, reason: str) -> None:
        """End soon, because the coordinator will never accept this node."""
        if not self._refused:
            _log.error("%s", reason)
        self._refused, self.rejoins, self._lost = True, False, False
        self.end_soon(reason)

    def succeed(self, wish: Succeed, say: Say) -> None:
        """Let a successor be started; ``say`` gets the answer. Thread-safe."""
        if self._machine.state is NodePhase.READY:
            self._origin.succeed(wish, say)
        else:
            say(SucceedRefused(f"it is {self._machine.state.name.lower()}, and only a ready node can be succeeded"))

    def _asked_to_end(self, what: str) -> None:
        """Told by a signal, say: finish the work within ``drain_s``; without work, or when it is repeated, end soon."""
        self._origin.signalled()
        if self._exit is not None:
            self.ended.set()
            return
        if self.ended.is_set():
            self.end_soon(f"received {what} again")
            return
        self.ended.set()
        if self._machine.state not in _SERVING:  # it may be fetching or loading, which cannot be interrupted
            self.end_soon(f"received {what}")
            return
        timer = threading.Timer(self._options.drain_s, self.end_soon, (f"received {what}",))
        timer.daemon = True
        timer.start()
        self._timers.append(timer)
        self.post(LeaveAsked(f"received {what}"))

    def serve(self) -> int:
        """Execute requests until an :class:`~runtime.node.events.Exit` effect; returns the process's exit code."""
        options = self._options
        for number in (signal.SIGTERM, signal.SIGINT):
            if options.succeeds or (options.lifeline and number == signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # what has started it gets the signal, as of Ctrl-C
            else:
                signal.signal(number, lambda number, _: self._asked_to_end(signal.Signals(number).name))
        with Sockets(security=self._security) as sockets:
            shortcut = self._home / f"node-{os.getpid()}.fragments" if options.memory_bytes else None
            inlet = sockets.inlet(options.bind or self._default_address(), shortcut=shortcut)
            self._origin.watch(self._home, self._asked_to_end)  # it may remove the folder, so the sockets come first
            sockets.watch(self._wakeup.fileno())
            control = ControlLink(
                self,
                options.connect,
                self._hello(inlet.address, shortcut),
                security=self._security,
                key=self._coordinator_key,
                patience_s=self._patience_s,
            )
            control.start()
            self._loop(sockets, inlet, control)
            self._worker.close()
            self._cache.close()
            control.end()
        for timer in self._timers:
            timer.cancel()
        self._wakeup.close()
        assert self._exit is not None
        self._log_end(self._exit.reason)
        return 1 if self._refused else LOST if self._lost else 0

    def _hello(self, address: str, shortcut: Path | None) -> Hello:
        options = self._options
        return Hello(
            protocol=PROTOCOL,
            number=options.number,
            pid=os.getpid(),
            host=options.host or socket.gethostname(),
            address=options.advertise or address,
            stage=options.stage,
            replica=options.replica,
            shortcut=str(shortcut or ""),
            memory=self._worker.payloads.memory,
            key=self._own_key,
        )

    def _log_end(self, reason: str) -> None:
        if not self.rejoins:
            _log.info("ending: %s", reason)
        elif self.had_place:
            _log.warning("dropped all work: %s", reason)
        else:  # logged once, and not each time that the node asks
            level = logging.DEBUG if self._asked_before else logging.INFO
            _log.log(level, "%s; asking again for %.0f s", reason, self._options.rejoin_s)

    def _default_address(self) -> str:
        if self._options.connect.startswith("tcp://"):
            return f"tcp://{own_address(self._options.connect)}:*"
        return f"ipc://{self._home / f'node-{os.getpid()}'}"

    def _loop(self, sockets: Sockets, inlet: Inlet, control: ControlLink) -> None:
        """Handle events of the control thread first, then arriving fragments, then run one request."""
        machine, worker = self._machine, self._worker
        while self._exit is None:
            ready = self._wait(sockets)
            if self._posted or self._wakeup.fileno() in ready:
                self._wakeup.clear()
                while self._posted and self._exit is None:
                    self._handle(self._posted.popleft(), sockets, control)
            while self._exit is None and (message := inlet.receive(ready)) is not None:
                event = worker.arrival(*message)
                if event is not None and machine.state in _SERVING:
                    self._handle(event, sockets, control)
                if not worker.receipts.needed:  # else receive everything first, so that receipts are correct
                    break
            if machine.state in _SERVING:
                self._take_from_lanes(sockets, control)
            if worker.receipts.needed and self._exit is None:
                worker.receipts.send(time.monotonic())
            if machine.ready and self._exit is None:
                self._handle(Turn(time.monotonic_ns()), sockets, control)

    def _take_from_lanes(self, sockets: Sockets, control: ControlLink) -> None:
        """Execute or queue some of the requests that wait in lanes."""
        for _ in range(_MOST_A_TURN):
            waited = False
            for lane in self._worker.payloads.lanes.incoming:
                found, event = self._worker.from_lane(lane, self._machine)
                waited |= found
                if event is not None:
                    self._handle(event, sockets, control)
            if not waited or self._machine.ready or self._posted or self._exit is not None:
                return
            self._turn_ns = time.monotonic_ns()

    def _wait(self, sockets: Sockets) -> set[object]:
        """Wait until there is something to do; returns what can be read."""
        self._turn_ns = 0
        lanes = self._worker.payloads.lanes
        seconds = 0.0
        if not lanes.waiting:
            self._worker.ring()
            if not self._machine.ready and lanes.fall_asleep():
                seconds = min(self._worker.receipts.due_s(time.monotonic()), _LOOK_S)
        ready = sockets.wait(seconds)
        lanes.wake_up()
        self._turn_ns = time.monotonic_ns()
        return ready

    def _handle(self, event: NodeEvent, sockets: Sockets, control: ControlLink) -> None:
        if isinstance(event, AttemptCancelled | Passed) and self._machine.state not in _SERVING:
            return
        effects = deque(self._machine.handle(event))
        while effects and self._exit is None:
            answer = self._perform(effects.popleft(), sockets, control)
            if answer is not None:
                effects.extend(self._machine.handle(answer))

    def _perform(self, effect: NodeEffect, sockets: Sockets, control: ControlLink) -> NodeEvent | None:
        worker = self._worker
        match effect:
            case Run():
                return worker.run(effect)
            case Forward():
                worker.forward(effect)
            case GiveBack(fragments):
                for fragment in fragments:
                    worker.give_back(fragment)
            case Discard():
                worker.discard()
            case ClearSlots(slots):
                worker.clear(slots)
            case ReportFailure(message):
                worker.report(message)
            case Load(assign):
                self.had_place, options = True, self._options
                if options.provider is not None:
                    assign = msgspec.structs.replace(assign, provider=options.provider)
                return worker.load(self._files, assign, home=self._home, threads=options.threads)
            case Connect(peers=peers):
                by = self._options.connect
                here = tuple(msgspec.structs.replace(p, address=reachable(p.address, by)) for p in peers)
                worker.connect(msgspec.structs.replace(effect, peers=here), sockets)
            case LendMemory(readers):
                worker.share(readers)
            case SayReady():
                self._origin.report(NodePhase.READY.name.lower())
                if self._options.background:
                    bring_forward(os.getpid())
                control.say(Ready(worker.mapped, worker.why_unguided, worker.left_to_cpu))
            case SayLeaving():
                control.say(Leaving())
            case SayRefused(reason):
                self._refused = True
                control.say(Refused(reason))
            case Exit():
                self._exit = effect
        return None
