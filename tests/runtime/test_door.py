"""The door of a pipeline: no request enters a plan that is not current any more, and none keeps it for ever."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest

from runtime.recut.door import Door
from runtime.requests.admission import Admission


class Running:
    """A plan that notes who has entered it, and whether it was current then."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.leases: WeakSet[object] = WeakSet()
        self.limits = (4 * number, 1)
        self.plan = SimpleNamespace(cuts=())
        self.closed = False
        self.coordinator: Any = SimpleNamespace(
            retries=number, incidents=(), stats=tuple, ended=False, handover=SimpleNamespace(role="")
        )
        self.entrance: Any = SimpleNamespace(forget=lambda tensors: None, close=lambda: None)

    def close(self) -> None:
        self.closed = True


def door() -> tuple[Any, Any, Any]:
    first, second = Running(1), Running(2)
    made: Any = Door(first, Admission(4, 1 << 20))  # type: ignore[arg-type]
    assert made.add(second)
    return made, first, second


def test_a_call_keeps_the_plan_that_it_has_entered():
    made, first, second = door()
    with made.entering() as entered:
        assert entered is first
        assert made.swap(second)
        assert len(first.leases) == 1
        with made.entering() as later:
            assert later is second
    assert not first.leases
    assert not second.leases
    assert made.admission.requests == second.limits[0]


def test_a_call_that_is_interrupted_keeps_nothing():
    made, first, _ = door()
    with pytest.raises(KeyboardInterrupt), made.entering():
        raise KeyboardInterrupt
    assert not first.leases
    lease = made.entering()
    lease.__enter__()  # as if an interrupt came right after this
    assert first.leases
    del lease
    assert not first.leases


def test_nobody_enters_a_plan_after_it_was_found_without_leases():
    """Threads enter while the plan changes to and fro; a plan that is idle and not current is entered by nobody."""
    made, first, second = door()
    stop, problems = threading.Event(), []

    def call() -> None:
        while not stop.is_set():
            with made.entering() as entered:
                if entered.closed:
                    problems.append(entered.number)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(400):
        left, entered = (first, second) if turn % 2 == 0 else (second, first)
        entered.closed = False
        made.swap(entered)
        while left.leases:
            pass
        left.closed = True
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems


def test_what_was_seen_of_plans_that_ended_counts_on():
    made, first, second = door()
    assert made.retries == 3
    made.swap(second)
    made.remove(first)
    assert first.closed
    assert made.retries == 3
    assert made.plans == (second,)
    second.coordinator.retries = 7
    assert made.retries == 8


def test_a_closed_door_takes_no_plan():
    made, _, second = door()
    for running in made.plans:
        running.coordinator.close = lambda: None
    made.close()
    assert not made.add(Running(3))
    assert not made.swap(second)
