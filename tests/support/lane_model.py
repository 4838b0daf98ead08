"""Processes on one x86 machine: each load and store of a word is a step, and a scheduler chooses the order of steps.

A store goes into the buffer of its process. Buffers are emptied into memory one store at a time, oldest first, whenever
the scheduler says so. A load sees the stores in its own buffer, then memory. A fence empties the buffer. This is the
model x86-TSO. It has more orders than an x86 machine, because one pack, unpack or copy touches its words in any order.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial


class Killed(Exception):
    """The process was killed."""


class _Over(BaseException):
    """The world has ended, so the process ends where it is."""


@dataclass(frozen=True)
class Action:
    """What can happen next: a process makes its ``step``, its oldest store is ``drain``ed, or a ``nudge`` wakes it."""

    kind: str
    process: Process = field(repr=False)

    def happen(self) -> None:
        if self.kind == "drain":
            self.process.drain()
            return
        if self.kind == "nudge":
            self.process.world.nudges -= 1
        self.process.world.running = self.process
        self.process.resume()


Choose = Callable[[Sequence[Action]], Action]
"""Chooses what happens next. The first of the actions goes on with the process that has run last, if that can run."""


def by_bytes(schedule: bytes, inertia: int) -> Choose:
    """Let each byte choose, and after the last one everything in turn; of 256 values, ``inertia`` change nothing."""
    numbers = itertools.chain(schedule, itertools.cycle(range(256)))

    def choose(actions: Sequence[Action]) -> Action:
        number = next(numbers)
        return actions[0 if number >= 256 - inertia else number % len(actions)]

    return choose


def one_after_another(*names: str) -> Choose:
    """Run one process as far as it gets, then the next one; stores stay in their buffers as long as any can run."""

    def choose(actions: Sequence[Action]) -> Action:
        return min(actions, key=lambda action: (action.kind != "step", names.index(action.process.name)))

    return choose


class World:
    """Processes, their memory, and the order of their steps.

    Args:
        choose: chooses what happens next.
        seed: determines the order of the words of a copy; None for the order of the program.
        nudges: how often a process that waits wakes up without a reason.

    Attributes:
        memory: the words that were ever written, by the name of their region and their place in it.
        running: the process that runs, or has run last; None before the world begins.
    """

    def __init__(self, choose: Choose, seed: int | None = None, nudges: int = 0) -> None:
        self.memory: dict[tuple[str, int], int] = {}
        self.processes: list[Process] = []
        self.running: Process | None = None
        self.over = False
        self.nudges = nudges
        self.version = 0  # number of stores that have reached memory
        self.back = threading.Lock()  # released to give the baton to the scheduler
        self.back.acquire()
        self._choose = choose
        self._random = None if seed is None else random.Random(seed)

    def process(self, name: str, *, fenced: bool = True) -> Process:
        """Add a process; its fences do nothing unless ``fenced``."""
        self.processes.append(Process(self, name, fenced))
        return self.processes[-1]

    def order(self, count: int) -> Iterable[int]:
        """The order in which the words of one copy are touched."""
        return range(count) if self._random is None else self._random.sample(range(count), count)

    def fence(self) -> None:
        """Make a fence of the process that runs."""
        if self.running is not None:
            self.running.step()
            while self.running.fenced and self.running.buffer:
                self.running.drain()

    @property
    def state(self) -> tuple[object, ...]:
        """All that decides what can happen from now on."""
        return frozenset(self.memory.items()), self.nudges, *[process.state for process in self.processes]

    def _actions(self) -> list[Action]:
        ready = [process for process in self.processes if process.ready]
        ready.sort(key=lambda process: process is not self.running)
        actions = [Action("step", process) for process in ready]
        actions += [Action("drain", process) for process in self.processes if process.buffer]
        if actions and self.nudges:
            waiting = [process for process in self.processes if not (process.done or process.ready)]
            actions += [Action("nudge", process) for process in waiting]
        return actions

    def run(self) -> None:
        """Run until nothing can happen any more."""
        try:
            while actions := self._actions():
                self._choose(actions).happen()
        finally:
            self.over = True
            for process in self.processes:
                process.end()
        for process in self.processes:
            if process.error is not None:
                raise process.error


class Process:
    """One process: a thread, which runs only while the scheduler waits.

    Attributes:
        buffer: its stores that nobody else sees yet: region, place and value.
        stores_left: the number of stores after which it is killed; -1 for never.
    """

    def __init__(self, world: World, name: str, fenced: bool) -> None:
        self.world = world
        self.name = name
        self.fenced = fenced
        self.buffer: deque[tuple[str, int, int]] = deque()
        self.stores_left = -1
        self.done = True
        self.error: BaseException | None = None
        self._go = threading.Lock()
        self._go.acquire()
        self._thread: threading.Thread | None = None
        self._until: Callable[[], bool] | None = None
        self._seen = 0  # a hash of its steps and of the values that it has loaded, which decide what it does next

    def begin(self, work: Callable[[], object]) -> None:
        """Let it do this work, when the scheduler says so."""
        self.done = False
        self._thread = threading.Thread(target=self._main, args=(work,), daemon=True)
        self._thread.start()

    def end(self) -> None:
        """End it where it is."""
        if not self.done:
            self.resume()
        if self._thread is not None:
            self._thread.join()

    def _main(self, work: Callable[[], object]) -> None:
        self._go.acquire()
        try:
            if not self.world.over:
                work()
        except (_Over, Killed):
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        self.world.back.release()

    @property
    def ready(self) -> bool:
        """Whether it can make a step."""
        return not self.done and (self._until is None or self._until())

    @property
    def state(self) -> tuple[object, ...]:
        return self._seen, tuple(self.buffer), self.done, self.ready

    def resume(self) -> None:
        """Give it the baton, and wait until it comes back."""
        self._go.release()
        self.world.back.acquire()

    def step(self) -> None:
        """Give the baton back, and wait for it."""
        if self.done:  # it has not begun
            return
        self._seen = hash((self._seen, "step"))
        self.world.back.release()
        self._go.acquire()
        if self.world.over:
            raise _Over

    def wait(self, until: Callable[[], bool]) -> None:
        """Wait until this holds, or for a nudge."""
        self._until = until
        self.step()
        self._until = None

    def wait_for_change(self) -> None:
        """Wait until another store has reached memory."""
        version = self.world.version
        self.wait(lambda: self.world.version != version)

    def load(self, region: str, at: int) -> int:
        """The value of a word."""
        self.step()
        buffered = [value for *place, value in self.buffer if place == [region, at]]
        value = buffered[-1] if buffered else self.world.memory.get((region, at), 0)
        self._seen = hash((self._seen, value))
        return value

    def store(self, region: str, at: int, value: int) -> None:
        """Write a word, which others will see later; at once, before the process has begun."""
        self.step()
        if self.stores_left == 0:
            raise Killed
        self.stores_left -= 1
        self.buffer.append((region, at, value))
        if self.done:
            self.drain()

    def drain(self) -> None:
        """Let everybody see the oldest store in the buffer."""
        *place, value = self.buffer.popleft()
        self.world.memory[tuple(place)] = value
        self.world.version += 1


class Words:
    """Memory as one process sees it, in place of a memoryview: of words, or with ``unit`` 8 of bytes."""

    def __init__(self, process: Process, region: str, unit: int = 1) -> None:
        self._process = process
        self._region = region
        self._unit = unit

    def cast(self, _: str) -> Words:
        return Words(self._process, self._region)

    def release(self) -> None:
        """Do nothing."""

    def __getitem__(self, at: int | slice) -> int | bytes:
        if isinstance(at, slice):
            words = self.get(at.start // self._unit, (at.stop - at.start) // self._unit)
            return b"".join([word.to_bytes(8, "little") for word in words])
        return self._process.load(self._region, at)

    def __setitem__(self, at: int | slice, value: int | bytes | memoryview) -> None:
        if isinstance(at, slice):
            self.put(at.start // self._unit, memoryview(value).cast("B").cast("Q"))
        else:
            self._process.store(self._region, at, value)

    def get(self, first: int, count: int) -> list[int]:
        found = {i: self._process.load(self._region, first + i) for i in self._process.world.order(count)}
        return [found[i] for i in range(count)]

    def put(self, first: int, values: Sequence[int]) -> None:
        for i in self._process.world.order(len(values)):
            self._process.store(self._region, first + i, values[i])


class Head:
    """Packs and unpacks the head of an entry in such memory, in place of a Struct."""

    @staticmethod
    def pack_into(memory: Words, at: int, *values: int) -> None:
        memory.put(at // 8, values)

    @staticmethod
    def unpack_from(memory: Words, at: int) -> list[int]:
        return memory.get(at // 8, 10)


class _Known(Exception):
    """What happens from here on was seen before."""


def every_order(run: Callable[[Choose], None]) -> int:
    """Call ``run`` for every order of events. Where an order leads to a state that was seen before, it ends there.

    Returns:
        the number of states.
    """
    seen: set[object] = set()
    ways: list[tuple[int, ...]] = [()]
    while ways:
        with suppress(_Known):
            run(partial(_go_on, ways.pop(), [], seen, ways))
    return len(seen)


def _go_on(
    way: tuple[int, ...], gone: list[int], seen: set[object], ways: list[tuple[int, ...]], actions: Sequence[Action]
) -> Action:
    """Choose as on this way, then the first action in each new state, and note the other ways from there."""
    if len(gone) < len(way):
        gone.append(way[len(gone)])
        return actions[gone[-1]]
    state = actions[0].process.world.state
    if state in seen:
        raise _Known
    seen.add(state)
    ways.extend((*gone, other) for other in range(1, len(actions)))
    gone.append(0)
    return actions[0]
