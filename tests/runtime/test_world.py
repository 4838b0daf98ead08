"""Whatever happens in whatever order: every request is answered once, with the right tensors, of one attempt."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import build
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from world import SECOND, World

from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from runtime.coordinator import events as c
from runtime.coordinator.roster import Phase
from runtime.node import events as n

_MADE: list = []


def diamond():
    """A diamond in four stages: 0 feeds 1 and 2, which 3 joins."""
    if not _MADE:
        folder = Path(tempfile.mkdtemp())
        partition(build.save(build.diamond(), folder), stages=4, out=folder / "m.plan", costs="analytic")
        _MADE.append(load_plan(folder / "m.plan"))
    return _MADE[0]


class Faults(RuleBasedStateMachine):
    """Requests, messages in any order, and harm."""

    @initialize(replicas=st.tuples(*[st.integers(1, 2)] * 4), seed=st.integers(0, 2**32))
    def begin(self, replicas, seed):
        self.world = World(diamond(), replicas, random.Random(seed))
        self.world.settle()
        self.given_up = set()

    @rule(wanted=st.sampled_from([("y",), ("a", "y"), ("left",)]))
    def submit(self, wanted):
        self.world.submit(wanted)

    @rule(data=st.data(), count=st.integers(1, 20))
    def go_on(self, data, count):
        for _ in range(count):
            keys, busy = self.world.waiting(), self.world.busy()
            if not keys and not busy:
                return
            at = data.draw(st.integers(0, len(keys) + len(busy) - 1))
            if at < len(keys):
                self.world.deliver(keys[at])
            else:
                self.world.work(busy[at - len(keys)])

    def pick(self, data, **wanted):
        there = [p.number for p in self.world.processes.values() if all(getattr(p, k) == v for k, v in wanted.items())]
        return data.draw(st.sampled_from(there)) if there else None

    @rule(data=st.data())
    def kill(self, data):
        number = self.pick(data, alive=True)
        if number is not None:
            self.world.kill(number)

    @precondition(lambda self: self.world.exits)
    @rule()
    def notice_an_exit(self):
        self.world.notice(self.world.exits.pop(0))

    @rule(data=st.data())
    def stop(self, data):
        number = self.pick(data, alive=True, stopped=False)
        if number is not None:
            self.world.processes[number].stopped = True

    @rule(data=st.data())
    def wake(self, data):
        number = self.pick(data, alive=True, stopped=True)
        if number is not None:
            self.world.processes[number].stopped = False

    @rule(data=st.data())
    def take_for_dead(self, data):
        number = self.pick(data, alive=True)
        if number is not None:
            self.world.notice(number)

    @rule(data=st.data())
    def deliver_twice(self, data):
        keys = [key for key in self.world.waiting() if key[2] == "data"]
        if keys:
            queue = self.world.links[data.draw(st.sampled_from(keys))]
            queue.append(queue[0])

    @rule(data=st.data())
    def lose_a_message(self, data):
        keys = [key for key in self.world.waiting() if key[2] == "data"]
        if keys:
            self.world.lose(data.draw(st.sampled_from(keys)))

    @rule(seconds=st.integers(1, 200))
    def wait(self, seconds):
        self.world.now += seconds * SECOND
        self.world.tell(c.Tick(self.world.now))

    @rule(stage=st.integers(0, 3), replicas=st.integers(1, 3))
    def scale(self, stage, replicas):
        self.world.tell(c.Scaled(stage, replicas, self.world.now))

    @rule(data=st.data())
    def leave(self, data):
        number = self.pick(data, alive=True, stopped=False)
        if number is not None:
            self.world.processes[number].events.append(n.LeaveAsked("SIGTERM"))

    @rule(data=st.data())
    def give_up(self, data):
        open_ = [number for number, answers in self.world.answers.items() if not answers]
        if open_:
            number = data.draw(st.sampled_from(open_))
            self.world.tell(c.GivenUp(number))
            del self.world.answers[number]
            self.world.answers[number] = []
            self.given_up.add(number)

    @invariant()
    def all_is_right(self):
        if hasattr(self, "world"):
            for number in self.given_up:
                assert not self.world.answers[number]
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            for number in self.given_up:
                del self.world.answers[number]
            self.world.settle()
            self.world.check()
            assert not self.world.coordinator.roster.departing
            phases = {record.phase for record in self.world.coordinator.roster.nodes.values()}
            assert phases == {Phase.READY}


class MoreFaults(Faults):
    """The same at length."""


Faults.TestCase.settings = settings(max_examples=150, stateful_step_count=60)
MoreFaults.TestCase.settings = settings(max_examples=10_000, stateful_step_count=120)
TestFaults = Faults.TestCase
TestMoreFaults = pytest.mark.exhaustive(MoreFaults.TestCase)


@pytest.mark.parametrize("seed", range(3))
def test_without_harm_nothing_is_made_twice(seed):
    world = World(diamond(), (2, 2, 2, 2), random.Random(seed))
    world.settle()
    for _ in range(50):
        world.submit(("y",))
    world.settle()
    world.check()
    assert world.coordinator.retries == 0


@pytest.mark.parametrize("seed", range(20))
def test_requests_on_their_way_when_the_last_node_of_a_stage_leaves_are_answered(seed):
    world = World(diamond(), (1, 1, 1, 1), random.Random(seed))
    world.settle()
    for _ in range(5):
        world.submit(("y",))
    number = next(p.number for p in world.processes.values() if p.slot == (1, 0))
    world.processes[number].events.append(n.LeaveAsked("SIGTERM"))
    world.settle()
    world.check()
    assert world.coordinator.retries == 0
