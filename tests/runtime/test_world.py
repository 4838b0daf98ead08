"""In every order of events and faults, every request is answered once, with the right tensors of one attempt."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import build
import pytest
from fault_rules import FaultRules
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from runtime.coordinator import events as c
from runtime.coordinator.node_record import Phase
from runtime.node import events as n
from runtime.testing.lanes import SimulatedLanes
from runtime.testing.pipeline import SimulatedPipeline

_MADE: list = []


def diamond():
    """A diamond in four stages: 0 feeds 1 and 2, which 3 joins."""
    if not _MADE:
        folder = Path(tempfile.mkdtemp())
        partition(build.save(build.diamond(), folder), stages=4, out=folder / "m.plan", costs="analytic")
        _MADE.append(load_plan(folder / "m.plan"))
    return _MADE[0]


class Faults(FaultRules):
    """Requests, messages in any order, and faults."""

    simulated = SimulatedPipeline

    @initialize(replicas=st.tuples(*[st.integers(1, 2)] * 4), seed=st.integers(0, 2**32))
    def begin(self, replicas, seed):
        self.pipeline = self.simulated(diamond(), replicas, random.Random(seed))
        self.pipeline.settle()
        self.given_up = set()

    @rule(wanted=st.sampled_from([("y",), ("a", "y"), ("left",)]))
    def submit(self, wanted):
        self.pipeline.submit(wanted)

    @rule(data=st.data(), count=st.integers(1, 20))
    def go_on(self, data, count):
        self.proceed(data, count)

    @rule(stage=st.integers(0, 3), replicas=st.integers(1, 3), tentative=st.booleans())
    def scale(self, stage, replicas, tentative):
        self.pipeline.tell(c.Scaled(stage, replicas, self.pipeline.now_ns, tentative))

    @rule(data=st.data())
    def give_up(self, data):
        open_ = [number for number, answers in self.pipeline.answers.items() if not answers]
        if open_:
            number = data.draw(st.sampled_from(open_))
            self.pipeline.tell(c.GivenUp(number))
            del self.pipeline.answers[number]
            self.pipeline.answers[number] = []
            self.given_up.add(number)

    @invariant()
    def all_is_right(self):
        if hasattr(self, "pipeline"):
            for number in self.given_up:
                assert not self.pipeline.answers[number]
            self.pipeline.check()

    def teardown(self):
        if hasattr(self, "pipeline"):
            for number in self.given_up:
                del self.pipeline.answers[number]
            self.pipeline.settle()
            self.pipeline.check()
            assert not self.pipeline.coordinator.roster.departing
            phases = {record.phase for record in self.pipeline.coordinator.roster.nodes.values()}
            assert phases == {Phase.READY}


class FaultsInLanes(Faults):
    """The same where most fragments go through lanes, and some by both ways."""

    simulated = SimulatedLanes

    @rule(data=st.data())
    def send_by_both_ways(self, data):
        lanes = [link for link in self.pipeline.waiting() if link[2] == "lane"]
        if lanes:
            sender, to, _ = link = data.draw(st.sampled_from(lanes))
            self.pipeline.send((sender, to, "data"), self.pipeline.links[link][0])


class MoreFaults(Faults):
    """The same with longer runs."""


class MoreFaultsInLanes(FaultsInLanes):
    """The same with longer runs."""


Faults.TestCase.settings = settings(max_examples=150, stateful_step_count=60)
FaultsInLanes.TestCase.settings = settings(max_examples=150, stateful_step_count=60)
MoreFaults.TestCase.settings = settings(max_examples=10_000, stateful_step_count=120)
MoreFaultsInLanes.TestCase.settings = settings(max_examples=10_000, stateful_step_count=120)
TestFaults = Faults.TestCase
TestFaultsInLanes = FaultsInLanes.TestCase
TestMoreFaults = pytest.mark.exhaustive(MoreFaults.TestCase)
TestMoreFaultsInLanes = pytest.mark.exhaustive(MoreFaultsInLanes.TestCase)


@pytest.mark.parametrize("seed", range(10))
def test_lanes_and_messages_give_the_same_answers(seed):
    answers, executed = [], []
    for simulated in SimulatedPipeline, SimulatedLanes:
        pipeline = simulated(diamond(), (1, 2, 2, 1), random.Random(seed))
        pipeline.settle()
        for wanted in [("y",), ("a", "y"), ("left",)] * 10:
            pipeline.submit(wanted)
        pipeline.settle()
        pipeline.check()
        answers.append(pipeline.answers)
        executed.append(sum(node.state.executed for node in pipeline.nodes.values()))
    assert answers[0] == answers[1]
    assert executed[0] == executed[1]


@pytest.mark.parametrize("simulated", [SimulatedPipeline, SimulatedLanes])
@pytest.mark.parametrize("seed", range(3))
def test_without_harm_nothing_is_made_twice(seed, simulated):
    pipeline = simulated(diamond(), (2, 2, 2, 2), random.Random(seed))
    pipeline.settle()
    for _ in range(50):
        pipeline.submit(("y",))
    pipeline.settle()
    pipeline.check()
    assert pipeline.coordinator.requests.retries == 0


@pytest.mark.parametrize("seed", range(20))
def test_requests_on_their_way_when_the_last_node_of_a_stage_leaves_are_answered(seed):
    pipeline = SimulatedPipeline(diamond(), (1, 1, 1, 1), random.Random(seed))
    pipeline.settle()
    for _ in range(5):
        pipeline.submit(("y",))
    number = next(p.number for p in pipeline.nodes.values() if p.slot == (1, 0))
    pipeline.nodes[number].events.append(n.LeaveAsked("SIGTERM"))
    pipeline.settle()
    pipeline.check()
    assert pipeline.coordinator.requests.retries == 0


def timed(seed=0, **options):
    """Return a pipeline in simulated time with two ready replicas of every stage."""
    pipeline = SimulatedPipeline(diamond(), (2, 2, 2, 2), random.Random(seed), delay_ns=50_000, **options)
    while not pipeline.ready:
        assert pipeline.step()
    return pipeline


def go_on(pipeline, seconds=2):
    """Process events until there are none, with ticks of the coordinator in between."""
    for _ in range(2 * seconds):
        while pipeline.step():
            pass
        pipeline.pass_time(0.5)


def test_in_simulated_time_a_request_takes_the_delays_of_its_way():
    pipeline = timed()
    begun = pipeline.now_ns
    number = pipeline.submit(("y",))
    while not pipeline.answers[number]:
        assert pipeline.step()
    assert pipeline.now_ns - begun == 4 * 50_000, "to stage 0, to 1 and 2, to 3, and back"
    pipeline.check()


def test_a_killed_process_is_detected_and_replaced_in_simulated_time():
    pipeline = timed()
    numbers = [pipeline.submit(("y",)) for _ in range(10)]
    pipeline.kill(1)
    go_on(pipeline)
    assert all(pipeline.answers[number] for number in numbers)
    assert not pipeline.coordinator.roster.missing()
    pipeline.check()


def test_what_is_sent_to_a_stopped_process_or_over_a_parted_link_waits():
    pipeline = timed()
    pipeline.stop(1)
    pipeline.part(0, 2)
    numbers = [pipeline.submit(("y",)) for _ in range(10)]
    go_on(pipeline)
    assert not any(pipeline.answers[number] for number in numbers)
    pipeline.wake(1)
    pipeline.mend(0, 2)
    go_on(pipeline)
    assert all(pipeline.answers[number] for number in numbers)
    assert pipeline.coordinator.requests.retries == 0
    pipeline.check()
