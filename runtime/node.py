"""A runtime node: the process that executes one stage.

Two threads. The main one waits for fragments, runs the session and sends what comes out, with no hand-over in
between; the other speaks with the coordinator, so that it answers while the session runs. A node ends when it is
told to, when its coordinator falls silent, and, started by a launcher, as soon as the launching process is gone.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec.structs

from onnxsplit.errors import OnnxsplitError
from onnxsplit.plan import Plan
from runtime import codec, node_state
from runtime.arena import Step
from runtime.balance import Gauge
from runtime.errors import ProtocolError
from runtime.keys import Keys
from runtime.logs import Drops, log_event
from runtime.messages import (
    ANY,
    CALLER,
    PROTOCOL,
    Assign,
    Fragment,
    Hello,
    Leaving,
    NodeBeat,
    Ready,
    Receipt,
    Refused,
    Started,
)
from runtime.node_control import ControlLink
from runtime.node_state import (
    Arrived,
    Cancelled,
    Connect,
    Discard,
    Effect,
    Event,
    Executed,
    ExecutionFailed,
    Exit,
    Forward,
    GiveBack,
    LeaveAsked,
    Load,
    Loaded,
    LoadFailed,
    NodeState,
    Passed,
    Report,
    Run,
    SayLeaving,
    SayReady,
    SayRefused,
    Share,
    State,
    StopAsked,
    Turn,
    sources,
)
from runtime.payloads import Attempt, Outgoing, Payloads
from runtime.pinned import cuda_pin
from runtime.router import Router
from runtime.stage_runner import StageRunner
from runtime.transport import (
    Inlet,
    Outlet,
    Security,
    Sockets,
    Wakeup,
    check_address,
    own_address,
    private_folder,
)
from runtime.watch import Timings

DEFAULT_MEMORY_BYTES = 1 << 30
"""Of a node's outputs in shared memory at once; what does not fit is copied through sockets."""

_EXIT_GRACE_S = 2.0
_SERVING = (State.READY, State.LEAVING)
_log = logging.getLogger("runtime.node")
_drops = Drops(_log)


@dataclass(frozen=True)
class NodeOptions:
    """What a node is started with.

    Attributes:
        connect: control address of the coordinator.
        bind: where to take fragments; a free port or path of the coordinator's kind when None.
        stage: the stage it wants, -1 for any.
        replica: the replica it wants to be, -1 for any.
        number: given by its launcher; 0 for none.
        plan: its own copy of the plan directory; the coordinator's folder when None.
        provider: overrides the coordinator's choice.
        threads: overrides the plan's number; 0 does not.
        memory_bytes: of shared memory for its outputs at most; 0 for none.
        home: a folder of the launcher's, removed when the launcher dies. Set together with ``lifeline``.
        lifeline: end when standard input does.
        drain_s: wait so long to be relieved of work before ending on a signal.
        rejoin_s: without a lifeline, look so long for a coordinator that fell silent before ending.
        advertise: the address that others are told, where it is another than ``bind``.
        keys: folder with the keys that protect links by tcp; None leaves them plain.
        insecure: plain links may leave this host.
    """

    connect: str
    bind: str | None = None
    stage: int = -1
    replica: int = -1
    number: int = 0
    plan: Path | None = None
    provider: str | None = None
    threads: int = 0
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    home: Path | None = None
    lifeline: bool = False
    drain_s: float = Timings().drain_s
    rejoin_s: float = 60.0
    advertise: str | None = None
    keys: Path | None = None
    insecure: bool = False


def serve(options: NodeOptions) -> int:
    """Be a node until told to stop; returns the exit code.

    A coordinator that was there and fell silent is looked for, with nothing of the work for it left.

    Raises:
        PipelineError: an address cannot be used.
        InputError: the keys cannot be used.
    """
    keys = Keys(options.keys) if options.keys is not None else None
    check_address(options.connect, Security(pair=keys.pair if keys else None, insecure=options.insecure))
    if options.home is not None:
        return _Node(options, options.home, keys).serve()
    patience = None
    while True:
        home = private_folder()
        try:
            node = _Node(options, home, keys, patience)
            code = node.serve()
        finally:
            shutil.rmtree(home, ignore_errors=True)
        if not node.deserted:
            return code
        patience = options.rejoin_s
        _log.warning("looking for the coordinator for %.0f s", patience)


class _Node:
    """The main thread: performs the effects of :class:`~runtime.node_state.NodeState`."""

    def __init__(self, options: NodeOptions, home: Path, keys: Keys | None, patience_s: float | None = None) -> None:
        self._options = options
        self._home = home
        self._keys = keys
        self._patience_s = patience_s
        self._trusted: frozenset[str] = frozenset()
        self.deserted = False
        self._timer: threading.Timer | None = None
        self._machine = NodeState()
        self._posted: deque[Event] = deque()
        self._wakeup = Wakeup()
        self._payloads = Payloads(options.memory_bytes)
        self._router = Router("completion", self._payloads.board)
        self._gauge = Gauge()
        self._mapped: tuple[int, ...] = ()
        self._me = -1
        self._links: dict[int, Outlet] = {}
        self._receipts: dict[int, Outlet] = {}  # to senders who cannot read this node's board, and have a choice
        self._sources: dict[int, list[int]] = {}  # of every stage
        self._expected: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {}  # names and types from each source
        self._shared: dict[node_state.Leaving, tuple[str, ...]] = {}
        self._runner: StageRunner | None = None
        self._ran = _Ran(Outgoing(), valid=False)
        self._began: tuple[int, int] | None = None
        self._refused = False
        self._asked = False
        self._exit: Exit | None = None

    @property
    def beat(self) -> NodeBeat:
        """A sign of life, as of now."""
        began = self._began
        if began is None:
            return NodeBeat(self._machine.executed, 0, 0, self._gauge.longest_ns)
        running_ns = max(1, time.monotonic_ns() - began[0])
        return NodeBeat(self._machine.executed, running_ns, began[1], self._gauge.longest_ns)

    def post(self, event: Event) -> None:
        """Hand an event to the main thread."""
        self._posted.append(event)
        self._wakeup.ring()

    def trust(self, keys: frozenset[str]) -> None:
        """Let the owners of these public keys send."""
        self._trusted = keys

    def lost(self, reason: str) -> None:
        """End soon; at the latest in two seconds, whatever the session does."""
        self._timer = threading.Timer(_EXIT_GRACE_S, os._exit, (1,))
        self._timer.daemon = True
        self._timer.start()
        self.post(StopAsked(reason))

    def silent(self, reason: str) -> None:
        """The coordinator is gone: drop the work, and be ready to begin anew."""
        self.deserted = not self._options.lifeline
        self.lost(reason)

    def unwelcome(self, reason: str) -> None:
        """The coordinator will never take this node."""
        self._refused = True
        _log.error("%s", reason)
        self.lost(reason)

    def _asked_to_end(self, what: str) -> None:
        """By a signal: end when the work is done, or after a while; a second one ends it soon."""
        if self._asked:
            self.lost(f"received {what} again")
            return
        self._asked = True
        timer = threading.Timer(self._options.drain_s, self.lost, (f"received {what}",))
        timer.daemon = True
        timer.start()
        self.post(LeaveAsked(f"received {what}"))

    def serve(self) -> int:
        """Until an :class:`Exit` effect."""
        options = self._options
        for number in (signal.SIGTERM, signal.SIGINT):
            if options.lifeline and number == signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)  # Ctrl-C in the terminal is the launcher's to handle
            else:
                signal.signal(number, lambda number, _: self._asked_to_end(signal.Signals(number).name))
        if options.lifeline:
            threading.Thread(target=_watch_lifeline, args=(self._home,), daemon=True).start()
        keys = self._keys
        security = Security(
            pair=keys.pair if keys else None,
            allows=lambda key: key in self._trusted or (keys is not None and key in keys.allowed),
            insecure=options.insecure,
        )
        with Sockets(security=security) as sockets:
            shortcut = self._home / f"node-{os.getpid()}.fragments" if options.memory_bytes else None
            inlet = sockets.inlet(options.bind or self._default_address(), shortcut=shortcut)
            sockets.watch(self._wakeup.fileno())
            hello = Hello(
                protocol=PROTOCOL,
                number=options.number,
                pid=os.getpid(),
                host=socket.gethostname(),
                address=options.advertise or inlet.address,
                stage=options.stage,
                replica=options.replica,
                shortcut=str(shortcut or ""),
                memory=self._payloads.memory,
                key=keys.pair.public if keys else "",
            )
            key = keys.of("coordinator") if keys else ""
            control = ControlLink(self, options.connect, hello, security=security, key=key, patience_s=self._patience_s)
            control.start()
            self._loop(sockets, inlet, control)
            if self._runner is not None:
                self._runner.close()
            control.end()
        if self._timer is not None:
            self._timer.cancel()
        self._payloads.close()
        self._wakeup.close()
        assert self._exit is not None
        _log.info("ending: %s", self._exit.reason)
        return 1 if self._refused else 0

    def _default_address(self) -> str:
        if self._options.connect.startswith("tcp://"):
            return f"tcp://{own_address(self._options.connect)}:*"
        return f"ipc://{self._home / f'node-{os.getpid()}'}"

    def _loop(self, sockets: Sockets, inlet: Inlet, control: ControlLink) -> None:
        """What the coordinator says goes first, then what comes in, then one request at a time."""
        machine = self._machine
        while self._exit is None:
            ready = sockets.wait(0.0 if machine.ready else 60.0)
            if self._posted or self._wakeup.fileno() in ready:
                self._wakeup.clear()
                while self._posted and self._exit is None:
                    self._handle(self._posted.popleft(), sockets, control)
            if (message := inlet.receive(ready)) is not None:
                event = self._arrival(*message)
                if event is not None and machine.state in _SERVING:
                    self._handle(event, sockets, control)
            if machine.ready and self._exit is None:
                self._handle(Turn(time.monotonic_ns()), sockets, control)

    def _handle(self, event: Event, sockets: Sockets, control: ControlLink) -> None:
        if isinstance(event, Cancelled | Passed) and self._machine.state not in _SERVING:
            return
        effects = deque(self._machine.handle(event))
        while effects and self._exit is None:
            answer = self._perform(effects.popleft(), sockets, control)
            if answer is not None:
                effects.extend(self._machine.handle(answer))

    def _perform(self, effect: Effect, sockets: Sockets, control: ControlLink) -> Event | None:
        match effect:
            case Run():
                return self._run(effect)
            case Forward():
                self._forward(effect)
            case GiveBack(fragments):
                for fragment in fragments:
                    self._give_back(fragment)
            case Discard():
                self._payloads.drop(self._ran.going)
            case Report(message):
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
            case Load(assign):
                return self._load(assign)
            case Connect():
                self._connect(effect, sockets)
            case Share(readers):
                self._payloads.share(readers)
                self._shared.clear()
            case SayReady():
                control.say(Ready(self._mapped))
            case SayLeaving():
                control.say(Leaving())
            case SayRefused(reason):
                self._refused = True
                control.say(Refused(reason))
            case Exit():
                self._exit = effect
        return None

    def _load(self, assign: Assign) -> Event:
        folder = self._options.plan or Path(assign.folder)
        if self._options.provider is not None:
            assign = msgspec.structs.replace(assign, provider=self._options.provider)
        self._assign = assign
        self._router = Router(assign.balance, self._payloads.board)
        try:
            self._runner = StageRunner(folder, assign, home=self._home, threads=self._options.threads)
        except OnnxsplitError as error:
            return LoadFailed(str(error))
        plan = self._runner.plan
        self._sources = {stage.index: sorted(sources(plan, stage.index)) for stage in plan.stages}
        self._expected = expected_tensors(plan, assign.stage)
        log_event(
            _log, logging.INFO, "stage loaded", stage=assign.stage, replica=assign.replica, provider=assign.provider
        )
        return Loaded(plan)

    def _connect(self, connect: Connect, sockets: Sockets) -> None:
        first = not self._links
        peers = {peer.number: peer for peer in connect.peers}
        self._mapped = self._payloads.meet(connect.me, {n: peers[n] for n in connect.neighbours})
        self._router.learn(connect.me, connect.peers, self._payloads.boards())
        self._shared.clear()
        for number in self._links.keys() - connect.targets:
            self._links.pop(number).close()
        for number in connect.targets - self._links.keys():
            peer = peers[number]
            shortcut = peer.shortcut if number in self._mapped else ""
            self._links[number] = sockets.connect(peer.address, shortcut=shortcut, key=peer.key)
        self._me = connect.me
        for number in self._receipts.keys() - peers.keys():
            self._receipts.pop(number).close()
        siblings = sum(peer.stage == self._assign.stage and peer.takes for peer in connect.peers)
        for number in connect.neighbours - self._receipts.keys() if siblings > 1 else ():
            if not self._router.mapped(number) and peers[number].stage in self._sources[self._assign.stage]:
                self._receipts[number] = sockets.connect(peers[number].address, key=peers[number].key)
        if not first:
            return
        if self._assign.provider.startswith("cuda") and (pin := cuda_pin()) is not None:
            self._payloads.pin(pin)
        gc.freeze()  # what is here now stays; requests make no cycles, so there is little to look for
        gc.set_threshold(100_000, 50, 50)

    def _arrival(self, header: codec.Buffer, frames: list[codec.Buffer]) -> Arrived | None:
        try:
            said = codec.decode_data(header)
            if isinstance(said, Fragment):
                self._check(said)
                return Arrived(said, self._payloads.receive(said, frames), time.monotonic_ns())
            if not isinstance(said, Receipt):
                raise ProtocolError(f"a {type(said).__name__}, which is not for nodes")
            self._router.told(said, time.monotonic_ns())
            return None
        except ProtocolError as error:
            _drops.note(error)
            return None

    def _check(self, fragment: Fragment) -> None:
        """Refuse a fragment that is not what its source has for this stage.

        Raises:
            ProtocolError: saying what is wrong with it.
        """
        expected = self._expected.get(fragment.source)
        if expected is not None and (
            len(fragment.route) != len(self._sources)
            or tuple([head.name for head in fragment.tensors]) != expected[0]
            or tuple([head.dtype for head in fragment.tensors]) != expected[1]
        ):
            raise ProtocolError(f"a fragment from stage {fragment.source} that is none of this plan's")

    def _give_back(self, fragment: Fragment) -> None:
        self._payloads.give_back(fragment)
        sender = fragment.sender
        if not self._router.mapped(sender) and (link := self._receipts.get(sender)) is not None:
            board = self._payloads.board
            service_ns, peak_ns, *_ = board.times
            me = self._me
            link.send(codec.encode(Receipt(me, board.done(sender), service_ns, peak_ns)))

    def _run(self, run: Run) -> Event:
        assert self._runner is not None
        payloads, board = self._payloads, self._payloads.board
        shared = self._shared.get(run.leaving)
        if shared is None:
            shared = self._shared[run.leaving] = self._find_shared(run.leaving)
        going = payloads.reserve(self._runner.proven(run.inputs), shared)
        if not self._router.mapped(0):
            self._links[0].send(codec.encode(Started(*run.key, self._me)))
        payloads.record(*run.key, Step.RUNNING)
        started = time.monotonic_ns()
        self._began = started, run.cost
        board.began(run.cost, started)
        try:
            outputs = self._runner.run(run.inputs, going.arrays)
        except OnnxsplitError as error:
            payloads.drop(going)
            return ExecutionFailed(str(error))
        finally:
            ended = time.monotonic_ns()
            self._began = None
            self._gauge.ran(ended - started, run.cost, ended)
            board.ended(self._gauge, ended)
        payloads.complete(going, outputs, shared)
        payloads.record(*run.key, Step.DONE)
        self._ran = _Ran(going, payloads.hold(run.fragments))
        return Executed(started, ended, time.monotonic_ns(), going.size_bytes, going.shared_bytes)

    def _forward(self, effect: Forward) -> None:
        going, fragment = self._ran.going, effect.fragment
        if not self._ran.valid:  # the inputs were taken away meanwhile: somebody else does this request
            self._payloads.drop(going)
            return
        readers = {}
        for stage, names in effect.leaving:
            if stage == CALLER:
                readers[0] = names
                continue
            number: int | None = fragment.route[stage]
            if number == ANY:
                number = self._choose(stage, names, going, fragment.cost)
            if number is not None and number in self._links:  # else that node is lost, and others do this request
                readers[number] = names
                self._router.sent(number, fragment.cost)
        self._payloads.lend(going, readers)
        attempt = Attempt(
            request=fragment.request,
            attempt=fragment.attempt,
            view=fragment.view,
            cost=fragment.cost,
            budget_ns=effect.budget_ns,
            route=fragment.route,
            wanted=fragment.wanted,
            history=effect.history,
        )
        for number, names in readers.items():
            self._payloads.send(self._links[number], number, going, names, attempt, self._assign.stage)

    def _find_shared(self, leaving: node_state.Leaving) -> tuple[str, ...]:
        """The outputs that somebody may read in place."""
        shared: set[str] = set()
        for stage, names in leaving:
            numbers = (0,) if stage == CALLER else self._router.nodes(stage)
            if any(self._payloads.lends_to(number) for number in numbers):
                shared.update(names)
        return tuple(sorted(shared))

    def _choose(self, stage: int, names: tuple[str, ...], going: Outgoing, cost: int) -> int | None:
        if len(self._router.nodes(stage)) == 1:
            return self._router.nodes(stage)[0]
        size = sum(going.arrays[name].nbytes for name in names)
        return self._router.choose(stage, self._sources[stage], cost, size, time.monotonic_ns())


@dataclass
class _Ran:
    """The request that ran last: its outputs, and whether its inputs were there to the end."""

    going: Outgoing
    valid: bool


def expected_tensors(plan: Plan, stage: int) -> dict[int, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Names and types of what each source sends to a stage."""
    found = {}
    for source in sources(plan, stage):
        if source == CALLER:
            names = tuple(name for name in plan.stages[stage].inputs if name in plan.inputs)
        else:
            names = tuple(n for n in plan.stages[source].outputs if n in plan.stages[stage].inputs)
        found[source] = names, tuple(plan.tensors[name].dtype for name in names)
    return found


def _watch_lifeline(home: Path) -> None:
    """End the process when standard input ends or the parent changes: the launching process is gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], 1.0)
        if readable and not os.read(0, 4096):
            break
    shutil.rmtree(home, ignore_errors=True)
    os._exit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command a launcher starts."""
    parser = argparse.ArgumentParser(prog="python -m runtime.node")
    parser.add_argument("--connect", required=True)
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--replica", type=int, required=True)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--memory", type=int, required=True)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    return serve(
        NodeOptions(
            connect=given.connect,
            stage=given.stage,
            replica=given.replica,
            number=given.number,
            memory_bytes=given.memory,
            home=given.home,
            lifeline=True,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
