"""The successors of a node that was started by hand, as the process that the user has started sees them.

    user, systemd, container     starts and ends the first process
    └── first process            runs a node itself until that is succeeded; then it waits, without session and weights
        ├── successor            serves
        └── its successor        loads, and is given up or serves next

The first process starts all successors, those of successors too. It ends when the last of them has ended, with the exit
code of that one, unless a place was lost: then it asks for one at its original address. While it lives, it passes
signals on, removes the folders of successors, and writes the health file. When it ends, its successors end at once.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from onnxsplit.errors import OnnxsplitError
from onnxsplit.memory import free_memory_bytes, return_freed_memory
from runtime.background import hold_back
from runtime.errors import ProtocolError
from runtime.home import hold, private_folder
from runtime.node.command_line import successor_of, why_no_successor, words_of
from runtime.node.health import write_health
from runtime.node.options import NodeOptions
from runtime.node.origin import LOST, Say, ToEnd, Told, decode_request, receive, send
from runtime.node.state import NodePhase
from runtime.wire.addresses import reachable
from runtime.wire.messages.control import Succeed, Succeeded, SucceedRefused, SuccessorEnded
from runtime.wire.security import Security, check_address

_MIB = 1 << 20
_KILL_S = 5.0  # time for successors to end after a repeated signal
_SERVED_S = 5.0  # time in which a successor that serves has said so
_ENDING_S = 3.0  # the time that the own node may take to end, and a little more
_KILLED_S = 2.0  # time for one that was killed to be gone
_log = logging.getLogger("runtime.node")


@dataclass(eq=False)
class _Successor:
    """A successor that lives.

    Attributes:
        process: its process.
        link: this end of the socket pair.
        home: its folder.
        held: the descriptor that marks the folder as in use.
        parent: the successor that it succeeds; None where that is the first process's own node.
        say: tells the coordinator of the node that it succeeds.
        timer: ends its time at idle priority; None for none.
        served: whether it has been ready.
        given_up: whether it was killed here, because its plan was given up.
    """

    process: subprocess.Popen[bytes]
    link: socket.socket
    home: Path
    held: int
    parent: _Successor | None
    say: Say
    timer: threading.Timer | None
    served: bool = False
    given_up: bool = False


@dataclass
class Outcome:
    """How the first process goes on when its own node and all successors have ended.

    Attributes:
        lost: whether it asks for a place at its original address.
        code: the exit code with which it ends otherwise.
    """

    lost: bool = False
    code: int = 0

    def note(self, code: int, *, is_last: bool) -> None:
        """Note the end of the successor that was to serve.

        If it ends otherwise than it was told, and another one lives, then its place is lost: that one may be given up.

        Args:
            code: its exit code; -N if signal N has killed it.
            is_last: whether no other one lives.
        """
        self.code = code if code >= 0 else 128 - code
        self.lost = self.lost or code == LOST if is_last else code != 0


class Successors:
    """The origin of a node that was started by hand, see :class:`~runtime.node.origin.NodeOrigin`. Thread-safe.

    Args:
        options: the options of the process.
        security: how its links are protected.
        key: the coordinator's public key; empty where links are not encrypted.

    Attributes:
        asked: set when a signal has asked the process to end.
    """

    def __init__(self, options: NodeOptions, security: Security, key: str) -> None:
        self._options = options
        self._security = security
        self._key = key
        self._living: list[_Successor] = []  # oldest first
        self._count = 0
        self._own_runs = True
        self._outcome = Outcome()
        self._died: tuple[float, int] | None = None  # when one that served died beside the own node, and its exit code
        self._changed = threading.Condition()
        self.asked = threading.Event()

    # The origin of the own node

    def watch(self, home: Path, told: Told) -> None:  # noqa: ARG002
        """Note that the process runs a node itself from now on."""
        with self._changed:
            self._own_runs, self._died = True, None

    def succeed(self, wish: Succeed, say: Say) -> None:
        """Start a successor of the own node."""
        self._begin(wish, say, None)

    def report(self, phase: str) -> None:
        """Write the health file."""
        if self._options.health is not None:
            write_health(self._options.health, phase)

    def signalled(self) -> None:
        """Pass a signal on to all successors. Also called in a signal's handler."""
        if self.asked.is_set():  # it is repeated, so do not even wait for successors that are stopped
            timer = threading.Timer(_KILL_S, self._kill)
            timer.daemon = True
            timer.start()
        self.asked.set()
        for successor in list(self._living):
            send(successor.link, ToEnd())

    def outlive(self) -> bool:
        """Wait until no successor lives, because the own node cannot be ended without this process."""
        with self._changed:
            if not self._living:
                return False
            self._own_runs = False
            self._changed.wait_for(lambda: not self._living)
        return True

    # The time after the own node

    def wait(self, *, lost: bool) -> Outcome | None:
        """Wait until no successor lives; called when the own node has ended and its memory is not needed any more.

        Args:
            lost: whether the own node has lost its place or its coordinator.

        Returns:
            None if no successor has outlived the own node.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.signalled())  # the handlers of the node refer to it
        gc.collect()
        return_freed_memory()
        with self._changed:
            self._own_runs, self._outcome = False, Outcome(lost)
            if not self._living:
                if lost or self._died is None or time.monotonic() - self._died[0] > _ENDING_S:
                    return None
                self._outcome.note(self._died[1], is_last=True)  # it served while the own node was ending
                return self._outcome
            _log.info("waiting for its successor, process %d", self._living[-1].process.pid)
            if not lost:  # the coordinator has closed: either another plan serves now, or its successor is of no use
                self._changed.wait_for(lambda: all(each.served for each in self._living), _SERVED_S)
                for draft in list(self._living):
                    self._give_up(draft)
        with self._changed:
            self._changed.wait_for(lambda: not self._living)
            return self._outcome

    def close(self) -> None:
        """Kill the successors that live."""
        self._kill()
        with self._changed:
            self._changed.wait_for(lambda: not self._living)

    @staticmethod
    def _give_up(successor: _Successor) -> None:
        """Kill a successor that has never served."""
        if not successor.served:
            successor.given_up = True
            successor.process.kill()

    def _kill(self) -> None:
        for successor in list(self._living):
            successor.process.kill()

    # Successors

    def _begin(self, wish: Succeed, say: Say, parent: _Successor | None) -> None:
        try:
            with self._changed:
                successor = self._start(wish, say, parent)
        except (OnnxsplitError, OSError) as error:
            _log.warning("no successor for %s: %s", wish.address, error)
            say(SucceedRefused(str(error)))
            return
        if self.asked.is_set():  # it was not there when the others were told
            send(successor.link, ToEnd())
        pid = successor.process.pid
        _log.info("started a successor, process %d, for stage %d at %s", pid, wish.stage, wish.address)
        say(Succeeded(pid))
        threading.Thread(target=self._follow, args=(successor,), name=f"successor-{pid}", daemon=True).start()

    def _start(self, wish: Succeed, say: Say, parent: _Successor | None) -> _Successor:
        """Start a successor.

        Raises:
            OnnxsplitError, OSError: why it cannot be started.
        """
        options, address = self._options, reachable(wish.address, self._options.connect)
        self._check(wish, address, parent)
        self._count += 1
        home = private_folder()
        held = hold(home)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            ahead = successor_of(
                options, connect=address, stage=wish.stage, replica=wish.replica, home=home, count=self._count,
                background=wish.background_ns > 0,
            )  # fmt: skip
            command = [sys.executable, "-P", "-m", "runtime.node", *words_of(ahead)]
            with theirs, _signals_blocked():
                process = subprocess.Popen(command, stdin=theirs.fileno())
        except BaseException:
            ours.close()
            shutil.rmtree(home, ignore_errors=True)
            os.close(held)
            raise
        timer = hold_back(process.pid, wish.background_ns / 1e9)
        successor = _Successor(process, ours, home, held, parent, say, timer)
        self._living.append(successor)
        return successor

    def _check(self, wish: Succeed, address: str, parent: _Successor | None) -> None:
        """Check that a successor can be started now.

        Raises:
            PipelineError: the address cannot be used.
            OnnxsplitError: it cannot, for another reason.
        """
        if self.asked.is_set():
            raise OnnxsplitError("a signal has asked it to end")
        if (earlier := next((each for each in self._living if each.parent is parent), None)) is not None:
            earlier.served = False  # its plan was given up: otherwise no other one would be wanted
            self._give_up(earlier)
            if not self._changed.wait_for(lambda: earlier not in self._living, _KILLED_S):
                raise OnnxsplitError(f"its earlier successor, process {earlier.process.pid}, has not ended yet")
        if reason := why_no_successor(self._options):
            raise OnnxsplitError(reason)
        check_address(address, self._security)
        if wish.key != self._key:
            raise OnnxsplitError(f"the coordinator at {address} has another key than allowed/coordinator.key says")
        if (free := free_memory_bytes()) < wish.needed_bytes:
            raise OnnxsplitError(
                f"its successor needs {wish.needed_bytes / _MIB:.0f} MiB of memory beside it, and only "
                f"{free / _MIB:.0f} MiB are free"
            )

    def _follow(self, successor: _Successor) -> None:
        """Answer a successor until it ends."""

        def tell(message: object) -> None:
            assert isinstance(message, SucceedRefused | Succeeded | SuccessorEnded)
            send(successor.link, message)

        while (packet := receive(successor.link)) is not None:
            with suppress(ProtocolError):
                said = decode_request(packet)
                if isinstance(said, Succeed):
                    self._begin(said, tell, successor)
                    continue
                with self._changed:
                    successor.served |= said.name == NodePhase.READY.name.lower()
                    self._changed.notify_all()
                if not self._own_runs and self._living[0] is successor:
                    self.report(said.name)
        if successor.timer is not None:
            successor.timer.cancel()
        code = successor.process.wait()
        shutil.rmtree(successor.home, ignore_errors=True)
        os.close(successor.held)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        with self._changed:
            parent_lives = self._own_runs if successor.parent is None else successor.parent in self._living
            self._note_end(successor, code)
            self._changed.notify_all()
        successor.link.close()
        _log.log(logging.INFO if code == 0 else logging.WARNING, "successor %d %s", successor.process.pid, how)
        if parent_lives and not successor.given_up:
            successor.say(SuccessorEnded(successor.process.pid, how))

    def _note_end(self, successor: _Successor, code: int) -> None:
        """Note how a successor has ended, unless it is a draft: then the one before it serves on."""
        index = self._living.index(successor)
        self._living.remove(successor)
        was_told = (self.asked.is_set() or successor.given_up) and not successor.served
        if not self._own_runs and index == 0 and not was_told:
            self._outcome.note(code, is_last=not self._living)
        elif self._own_runs and successor.served and not was_told and code:
            self._died = time.monotonic(), code


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that this thread starts never get the signals that ask for their end, not even before they run."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
