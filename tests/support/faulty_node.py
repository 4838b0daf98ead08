"""A node with injected faults: ``python -m faulty_node`` with the arguments of ``runtime.node``.

The environment variable FAULTS holds a JSON list of faults. A fault is an object with these fields:

    what      kill, segfault, stop    the process
              hang                    the session
              freeze                  the interpreter
              slow                    the run takes ``seconds`` longer
              poison                  kills every node that runs a request whose input holds 1e30
              hold                    waits until the launcher calls ``release``
              count                   adds to the launcher's ``happened``, and does nothing else
    at        the step, one of ``STEPS``; or ``starting``, before the node does anything
    stage     the stage whose node fails; null for any
    replica   the replica that fails; null for any
    request   the number of the request; null for any
    once      a file that is made when the fault happens, so that it happens once
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from runtime.launch.local import LocalLauncher
from runtime.memory import lane
from runtime.memory.lanes import Incoming
from runtime.node import serve
from runtime.node.caches.caches import Caches
from runtime.node.run_clock import RunClock
from runtime.node.stage_runner import StageRunner
from runtime.node.straight import Straight
from runtime.node.worker import Worker

RELEASED = "released"
STEPS = ("received", "before the run", "in the run", "after the run", "writing an entry", "sent")


class FaultyLauncher(LocalLauncher):
    """Starts nodes with injected faults."""

    module = "faulty_node"

    def __init__(self, *faults: dict[str, Any], memory_bytes: int = 256 << 20) -> None:
        super().__init__(memory_bytes=memory_bytes)
        faults = tuple(dict(fault) for fault in faults)  # the caller's stay as they are
        for number, fault in enumerate(faults):
            fault["folder"] = str(self.folder)
            if fault["what"] != "count" and fault.pop("only_once", True):
                fault["once"] = str(self.folder / f"fault-{number}")
        self.faults = faults

    def start(self, **of: Any) -> Any:
        """Start one node."""
        here = Path(__file__).parent
        os.environ["FAULTS"] = json.dumps(self.faults)
        paths = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parents[1])])
        try:
            return super().start(**of)
        finally:
            del os.environ["FAULTS"]
            if paths is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = paths

    @property
    def happened(self) -> int:
        """Number of faults that have happened."""
        return len(list(self.folder.glob("fault-*")))

    def release(self) -> None:
        """Let nodes continue that wait at a ``hold`` fault."""
        (self.folder / RELEASED).touch()


def fail(fault: dict[str, Any], request: int) -> None:
    """Carry out a fault at a request."""
    what, folder = fault["what"], Path(fault["folder"])
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "segfault":
        ctypes.string_at(0)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "hang":
        time.sleep(600)
    elif what == "freeze":
        ctypes.PyDLL(None).sleep(600)  # keeps the interpreter's lock, as a stuck extension does
    elif what == "slow":
        time.sleep(fault.get("seconds", 0.05))
    elif what == "hold":
        while not (folder / RELEASED).exists():
            time.sleep(0.01)
    elif what == "count":
        (folder / f"fault-request-{request}").touch()


def patch(step: Callable[[str, int], None], poisons: list[dict[str, Any]]) -> None:
    """Let a node call ``step`` at each step of a request, whether it comes as a message or through a lane."""
    arrival, take, begin, done = Worker.arrival, Incoming.take, RunClock.begin, RunClock.done
    execute, bound, forward, pass_on = StageRunner.run, StageRunner.bound, Worker.forward, Straight._forward
    run_step = Caches.run
    running = [0]

    def faulty_arrival(self: Any, *message: Any) -> Any:
        event = arrival(self, *message)
        if event is not None:
            step("received", event.fragment.request)
        return event

    def faulty_take(self: Any) -> Any:
        taken = take(self)
        if taken is not None:
            step("received", taken.entry.request)
        return taken

    def faulty_begin(self: Any, request: int, attempt: int, cost: int) -> int:
        running[0] = request
        step("before the run", request)
        return begin(self, request, attempt, cost)

    def faulty_done(self: Any, request: int, attempt: int) -> None:
        done(self, request, attempt)
        step("after the run", request)

    def in_the_run(inputs: Any) -> None:
        step("in the run", running[0])
        for fault in poisons:
            if any((np.asarray(a) == np.float32(1e30)).any() for a in inputs.values()):
                fail({**fault, "what": "segfault"}, running[0])

    def faulty_execute(self: Any, inputs: Any, into: Any) -> Any:
        in_the_run(inputs)
        return execute(self, inputs, into)

    def faulty_bound(self: Any, inputs: Any, into: Any) -> Any:
        run = bound(self, inputs, into)

        def faulty_run() -> None:
            in_the_run(inputs)
            run()

        return faulty_run

    def faulty_run_step(self: Any, *of: Any) -> Any:
        step("in the run", running[0])
        return run_step(self, *of)

    def faulty_forward(self: Any, effect: Any) -> None:
        forward(self, effect)
        step("sent", effect.fragment.request)

    def faulty_pass_on(self: Any, way: Any, taken: Any, *others: Any, **options: Any) -> None:
        pass_on(self, way, taken, *others, **options)
        step("sent", taken.entry.request)

    class FaultyHead:
        """Packs an entry and then takes a step, before the entry is published."""

        def pack_into(self, memory: Any, at: int, request: int, *others: int) -> None:
            head.pack_into(memory, at, request, *others)
            step("writing an entry", request)

        def unpack_from(self, memory: Any, at: int) -> Any:
            return head.unpack_from(memory, at)

    head = lane._HEAD
    lane._HEAD = FaultyHead()
    Worker.arrival, Incoming.take, RunClock.begin, RunClock.done = (
        faulty_arrival,
        faulty_take,
        faulty_begin,
        faulty_done,
    )
    Caches.run = faulty_run_step
    StageRunner.run, StageRunner.bound, Worker.forward, Straight._forward = (
        faulty_execute,
        faulty_bound,
        faulty_forward,
        faulty_pass_on,
    )


def main() -> int:
    """Patch the classes of a node, then run one."""
    stage = int(sys.argv[sys.argv.index("--stage") + 1])
    replica = int(sys.argv[sys.argv.index("--replica") + 1])
    faults = [
        fault
        for fault in json.loads(os.environ["FAULTS"])
        if fault.get("stage") in (stage, None) and fault.get("replica") in (replica, None)
    ]

    def step(name: str, request: int) -> None:
        for fault in faults:
            if fault.get("at", "in the run") == name and fault.get("request") in (request, None):
                if "once" in fault:
                    try:
                        with Path(fault["once"]).open("x") as claim:
                            claim.write(f"{time.monotonic()}")
                    except FileExistsError:
                        continue
                fail(fault, request)

    step("starting", 0)
    patch(step, [fault for fault in faults if fault["what"] == "poison"])
    return serve.main()


if __name__ == "__main__":
    sys.exit(main())
