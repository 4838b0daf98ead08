"""A runtime node: the process that executes one stage.

Two threads. The main one waits for fragments, runs the session and sends what comes out, with no hand-over in
between; the other speaks with the coordinator, so that it answers while the session runs. A node ends when it is
told to, when its coordinator falls silent, and, started by a launcher, as soon as the launching process is gone.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec.structs

from onnxsplit.errors import OnnxsplitError
from runtime import codec
from runtime.errors import ProtocolError
from runtime.messages import (
    CALLER,
    PROTOCOL,
    Assign,
    Beat,
    Cancel,
    Fragment,
    Hello,
    NodeBeat,
    NodeControl,
    Ready,
    Refused,
    Stop,
    Wire,
)
from runtime.node_state import (
    Arrived,
    Assigned,
    Cancelled,
    Connect,
    Effect,
    Event,
    Executed,
    ExecutionFailed,
    Exit,
    Forward,
    Load,
    Loaded,
    LoadFailed,
    NodeState,
    Report,
    Run,
    SayReady,
    SayRefused,
    State,
    StopAsked,
    Wired,
)
from runtime.stage_runner import StageRunner
from runtime.transport import Inlet, Outlet, Sockets, Wakeup, check_address

BEAT_S = 1.0
SILENCE_S = 10.0
"""A coordinator that was heard of and then says nothing for this long is taken for dead."""

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
    with tempfile.TemporaryDirectory(prefix="onnxsplit-node-") as home:
        return _Node(options, Path(home)).serve()


class _Control(threading.Thread):
    """Speaks with the coordinator: hands over what it says, sends what the node has to say, and beats."""

    def __init__(self, node: _Node, address: str, hello: Hello) -> None:
        super().__init__(name="control", daemon=True)
        self._node = node
        self._address = address
        self._outbox: deque[NodeControl] = deque([hello])
        self._wakeup = Wakeup()
        self._ending = False

    def say(self, message: NodeControl) -> None:
        """Send a message soon; callable from any thread."""
        self._outbox.append(message)
        self._wakeup.ring()

    def end(self) -> None:
        """Send what is left and end the thread."""
        self._ending = True
        self._wakeup.ring()
        self.join(_EXIT_GRACE_S)

    def run(self) -> None:
        """Until the node ends or the coordinator falls silent."""
        with Sockets(linger_s=0.5) as sockets:
            link = sockets.connect(self._address, receive=True)
            sockets.watch(self._wakeup.fileno())
            heard: float | None = None
            next_beat = 0.0
            while True:
                ending = self._ending
                while self._outbox:
                    link.send(codec.encode(self._outbox.popleft()))
                if ending:
                    return
                now = time.monotonic()
                if heard is not None and now >= next_beat:
                    link.send(codec.encode(NodeBeat(self._node.progress)))
                    next_beat = now + BEAT_S
                if heard is not None and now - heard > SILENCE_S:
                    self._node.lost(f"the coordinator has been silent for {SILENCE_S:.0f} s")
                    return
                sockets.wait(BEAT_S / 2)
                self._wakeup.clear()
                while (header := link.receive()) is not None:
                    heard = time.monotonic()
                    self._take(header)

    def _take(self, header: bytes) -> None:
        try:
            message = codec.decode_coordinator_control(header)
        except ProtocolError as error:
            _log.warning("dropped: %s", error)
            return
        match message:
            case Assign():
                self._node.post(Assigned(message))
            case Wire(addresses):
                self._node.post(Wired(addresses))
            case Cancel(request):
                self._node.post(Cancelled(request))
            case Stop(reason):
                self._node.lost(reason)
            case Beat():
                pass


class _Node:
    """The main thread: performs the effects of :class:`~runtime.node_state.NodeState`."""

    def __init__(self, options: NodeOptions, home: Path) -> None:
        self._options = options
        self._home = home
        self._machine = NodeState()
        self._posted: deque[Event] = deque()
        self._wakeup = Wakeup()
        self._links: dict[tuple[int, int], Outlet] = {}
        self._runner: StageRunner | None = None
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
            inlet = sockets.bind(options.bind or self._default_address())
            sockets.watch(self._wakeup.fileno())
            hello = Hello(PROTOCOL, os.getpid(), socket.gethostname(), inlet.address, options.stage, options.replica)
            control = _Control(self, options.connect, hello)
            control.start()
            self._loop(sockets, inlet, control)
            control.end()
        assert self._exit is not None
        _log.info("ending: %s", self._exit.reason)
        return 1 if self._refused else 0

    def _default_address(self) -> str:
        if self._options.connect.startswith("tcp://"):
            return "tcp://127.0.0.1:*"
        return f"ipc://{self._home / f'node-{os.getpid()}'}"

    def _loop(self, sockets: Sockets, inlet: Inlet, control: _Control) -> None:
        while self._exit is None:
            sockets.wait(60.0)
            self._wakeup.clear()
            while self._posted and self._exit is None:
                self._handle(self._posted.popleft(), sockets, control)
            while self._exit is None and (message := inlet.receive()) is not None:
                _, header, frames = message
                event = _arrival(header, frames)
                if event is not None and self._machine.state is State.READY:
                    self._handle(event, sockets, control)
                if self._posted:
                    break

    def _handle(self, event: Event, sockets: Sockets, control: _Control) -> None:
        if isinstance(event, Cancelled) and self._machine.state is not State.READY:
            return
        effects = deque(self._machine.handle(event))
        while effects and self._exit is None:
            answer = self._perform(effects.popleft(), sockets, control)
            if answer is not None:
                effects.extend(self._machine.handle(answer))

    def _perform(self, effect: Effect, sockets: Sockets, control: _Control) -> Event | None:
        match effect:
            case Run(request, inputs):
                return self._run(request, inputs)
            case Forward():
                heads, frames = codec.encode_tensors(effect.tensors)
                source = self._assign.stage
                header = Fragment(effect.request, source, effect.route, effect.wanted, heads)
                self._links[effect.stage, effect.replica].send(codec.encode(header), frames)
            case Report(message):
                self._links[CALLER, 0].send(codec.encode(message))
            case Load(assign):
                return self._load(assign)
            case Connect(addresses):
                self._links[CALLER, 0] = sockets.connect(self._assign.address)
                for stage, replicas in addresses.items():
                    for replica, address in enumerate(replicas):
                        self._links[stage, replica] = sockets.connect(address)
            case SayReady():
                control.say(Ready())
            case SayRefused(reason):
                self._refused = True
                control.say(Refused(reason))
            case Exit():
                self._exit = effect
        return None

    def _load(self, assign: Assign) -> Event:
        self._assign = assign
        folder = self._options.plan or Path(assign.folder)
        if self._options.provider is not None:
            assign = msgspec.structs.replace(assign, provider=self._options.provider)
        try:
            self._runner = StageRunner(folder, assign, threads=self._options.threads)
        except OnnxsplitError as error:
            return LoadFailed(str(error))
        return Loaded(self._runner.plan)

    def _run(self, request: int, inputs: object) -> Event:
        assert self._runner is not None
        started = time.monotonic_ns()
        try:
            outputs = self._runner.run(inputs)  # type: ignore[arg-type]
        except OnnxsplitError as error:
            return ExecutionFailed(request, str(error))
        return Executed(request, outputs, started, time.monotonic_ns())


def _arrival(header: bytes, frames: list[codec.Buffer]) -> Arrived | None:
    try:
        fragment = codec.decode_data(header)
        if not isinstance(fragment, Fragment):
            raise ProtocolError(f"a {type(fragment).__name__} where only fragments come in")
        return Arrived(fragment, codec.decode_tensors(fragment.tensors, frames), time.monotonic_ns())
    except ProtocolError as error:
        _log.warning("dropped: %s", error)
        return None


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
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    return serve(
        NodeOptions(connect=given.connect, stage=given.stage, replica=given.replica, home=given.home, lifeline=True)
    )


if __name__ == "__main__":
    sys.exit(main())
