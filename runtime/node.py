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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec.structs

from onnxsplit.errors import OnnxsplitError
from runtime import codec
from runtime.arena import Step
from runtime.errors import ProtocolError
from runtime.messages import PROTOCOL, Assign, Fragment, Hello, Peer, Ready, Refused
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
    Load,
    Loaded,
    LoadFailed,
    NodeState,
    Report,
    Run,
    SayReady,
    SayRefused,
    Share,
    State,
    StopAsked,
    Turn,
)
from runtime.payloads import Outgoing, Payloads
from runtime.pinned import cuda_pin
from runtime.stage_runner import StageRunner
from runtime.transport import Inlet, Outlet, Sockets, Wakeup, check_address, private_folder

DEFAULT_MEMORY_BYTES = 1 << 30
"""Of a node's outputs in shared memory at once; what does not fit is copied through sockets."""

_EXIT_GRACE_S = 2.0
_log = logging.getLogger("runtime.node")


@dataclass(frozen=True)
class NodeOptions:
    """What a node is started with.

    Attributes:
        connect: control address of the coordinator.
        bind: where to take fragments; a free port or path of the coordinator's kind when None.
        stage: the stage it wants, -1 for any.
        replica: the replica it wants to be, -1 for any.
        plan: its own copy of the plan directory; the coordinator's folder when None.
        provider: overrides the coordinator's choice.
        threads: overrides the plan's number; 0 does not.
        memory_bytes: of shared memory for its outputs at most; 0 for none.
        home: a folder of the launcher's, removed when the launcher dies. Set together with ``lifeline``.
        lifeline: end when standard input does.
    """

    connect: str
    bind: str | None = None
    stage: int = -1
    replica: int = -1
    plan: Path | None = None
    provider: str | None = None
    threads: int = 0
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    home: Path | None = None
    lifeline: bool = False


def serve(options: NodeOptions) -> int:
    """Be a node until told to stop; returns the exit code.

    Raises:
        PipelineError: an address cannot be used.
    """
    check_address(options.connect)
    if options.home is not None:
        return _Node(options, options.home).serve()
    home = private_folder()
    try:
        return _Node(options, home).serve()
    finally:
        shutil.rmtree(home, ignore_errors=True)


class _Node:
    """The main thread: performs the effects of :class:`~runtime.node_state.NodeState`."""

    def __init__(self, options: NodeOptions, home: Path) -> None:
        self._options = options
        self._home = home
        self._machine = NodeState()
        self._posted: deque[Event] = deque()
        self._wakeup = Wakeup()
        self._payloads = Payloads(options.memory_bytes)
        self._mapped: tuple[int, ...] = ()
        self._links: dict[int, Outlet] = {}
        self._runner: StageRunner | None = None
        self._ran = _Ran({}, Outgoing(), valid=False)
        self._refused = False
        self._exit: Exit | None = None

    @property
    def progress(self) -> int:
        """Requests executed so far."""
        return self._machine.executed

    def post(self, event: Event) -> None:
        """Hand an event to the main thread."""
        self._posted.append(event)
        self._wakeup.ring()

    def lost(self, reason: str) -> None:
        """End soon; at the latest in two seconds, whatever the session does."""
        timer = threading.Timer(_EXIT_GRACE_S, os._exit, (1,))
        timer.daemon = True
        timer.start()
        self.post(StopAsked(reason))

    def serve(self) -> int:
        """Until an :class:`Exit` effect."""
        options = self._options
        for number in (signal.SIGTERM, signal.SIGINT):
            if options.lifeline and number == signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)  # Ctrl-C in the terminal is the launcher's to handle
            else:
                signal.signal(number, lambda number, _: self.lost(f"received {signal.Signals(number).name}"))
        if options.lifeline:
            threading.Thread(target=_watch_lifeline, args=(self._home,), daemon=True).start()
        with Sockets() as sockets:
            shortcut = self._home / f"node-{os.getpid()}.fragments" if options.memory_bytes else None
            inlet = sockets.inlet(options.bind or self._default_address(), shortcut=shortcut)
            sockets.watch(self._wakeup.fileno())
            hello = Hello(
                protocol=PROTOCOL,
                pid=os.getpid(),
                host=socket.gethostname(),
                address=inlet.address,
                stage=options.stage,
                replica=options.replica,
                shortcut=str(shortcut or ""),
                memory=self._payloads.memory,
            )
            control = ControlLink(self, options.connect, hello)
            control.start()
            self._loop(sockets, inlet, control)
            if self._runner is not None:
                self._runner.close()
            control.end()
        assert self._exit is not None
        _log.info("ending: %s", self._exit.reason)
        return 1 if self._refused else 0

    def _default_address(self) -> str:
        if self._options.connect.startswith("tcp://"):
            return "tcp://127.0.0.1:*"
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
                if event is not None and machine.state is State.READY:
                    self._handle(event, sockets, control)
            if machine.ready and self._exit is None:
                self._handle(Turn(), sockets, control)

    def _handle(self, event: Event, sockets: Sockets, control: ControlLink) -> None:
        if isinstance(event, Cancelled) and self._machine.state is not State.READY:
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
                    self._payloads.give_back(fragment)
            case Discard():
                self._payloads.drop(self._ran.going)
            case Report(message):
                self._links[0].send(codec.encode(message))
            case Load(assign):
                return self._load(assign)
            case Connect(me, neighbours, targets):
                self._connect(me, neighbours, targets, sockets)
            case Share(readers):
                self._payloads.share(readers)
            case SayReady():
                control.say(Ready(self._mapped))
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
        try:
            self._runner = StageRunner(folder, assign, home=self._home, threads=self._options.threads)
        except OnnxsplitError as error:
            return LoadFailed(str(error))
        return Loaded(self._runner.plan)

    def _connect(self, me: int, neighbours: Mapping[int, Peer], targets: frozenset[int], sockets: Sockets) -> None:
        self._mapped = self._payloads.meet(me, neighbours)
        if self._assign.provider.startswith("cuda") and (pin := cuda_pin()) is not None:
            self._payloads.pin(pin)
        for number in targets:
            peer = neighbours[number]
            shortcut = peer.shortcut if number in self._mapped else ""
            self._links[number] = sockets.connect(peer.address, shortcut=shortcut)
        gc.freeze()  # what is here now stays; requests make no cycles, so there is little to look for
        gc.set_threshold(100_000, 50, 50)

    def _arrival(self, header: codec.Buffer, frames: list[codec.Buffer]) -> Arrived | None:
        try:
            fragment = codec.decode_data(header)
            if not isinstance(fragment, Fragment):
                raise ProtocolError(f"a {type(fragment).__name__} where only fragments come in")
            return Arrived(fragment, self._payloads.receive(fragment, frames), time.monotonic_ns())
        except ProtocolError as error:
            _log.warning("dropped: %s", error)
            return None

    def _run(self, run: Run) -> Event:
        assert self._runner is not None
        payloads, request, targets = self._payloads, run.request, run.targets
        going = payloads.reserve(self._runner.proven(run.inputs), targets)
        payloads.record(request, Step.RUNNING)
        started = time.monotonic_ns()
        try:
            outputs = self._runner.run(run.inputs, going.arrays)
        except OnnxsplitError as error:
            payloads.drop(going)
            return ExecutionFailed(request, str(error))
        ended = time.monotonic_ns()
        payloads.complete(going, outputs, targets)
        payloads.record(request, Step.DONE)
        self._ran = _Ran(targets, going, payloads.hold(run.fragments))
        return Executed(request, started, ended, time.monotonic_ns(), going.size_bytes, going.shared_bytes)

    def _forward(self, effect: Forward) -> None:
        if not self._ran.valid:  # the inputs were taken away meanwhile: somebody else does this request
            self._payloads.drop(self._ran.going)
            return
        for number, names in self._ran.targets.items():
            self._payloads.send(
                self._links[number],
                number,
                self._ran.going,
                names,
                request=effect.request,
                source=self._assign.stage,
                route=effect.route,
                wanted=effect.wanted,
                history=effect.history,
            )


@dataclass
class _Ran:
    """The request that ran last: its outputs, who gets which, and whether its inputs were there to the end."""

    targets: Mapping[int, tuple[str, ...]]
    going: Outgoing
    valid: bool


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
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--memory", type=int, required=True)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    return serve(
        NodeOptions(
            connect=given.connect,
            stage=given.stage,
            replica=given.replica,
            memory_bytes=given.memory,
            home=given.home,
            lifeline=True,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
