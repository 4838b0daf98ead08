"""The number of nodes follows the load, without flapping: the rule against simulated stages and load curves."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pages
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.balance.autoscale import Autoscaler, Decision, HostLoad, StageLoad, StageTerms, _Window
from runtime.balance.replicas import ReplicaRange

SECOND = 1_000_000_000
LOOK_S = 0.5
START_S = 2.0
REQUEST_S = 0.1
MOST_WAITING = 32  # what the pipeline admits; other requests wait before it
MIB = 1 << 20

Curve = Callable[[float], float]
"""The work that arrives at a time, in nodes: 1.6 keeps 1.6 nodes busy."""


@dataclass
class SimulatedStage:
    """Nodes that work off what arrives; one that is added is ready after ``START_S``, or never."""

    curve: Curve
    nodes: int
    cpu: float = 1.0
    starts: bool = True
    dead: int = 0  # slots whose nodes do not come back
    backlog: float = 0.0  # in seconds of one node
    starting: list[float] = field(default_factory=list)
    busy: float = 0.0

    def step(self, now_s: float) -> StageLoad:
        self.nodes += sum(at <= now_s for at in self.starting if self.starts)
        self.starting = [at for at in self.starting if at > now_s or not self.starts]
        self.backlog = min(self.backlog + self.curve(now_s) * LOOK_S, MOST_WAITING * REQUEST_S + self.nodes * LOOK_S)
        busy_s = min(self.backlog, self.nodes * LOOK_S)
        self.backlog -= busy_s
        self.busy = busy_s / LOOK_S
        return StageLoad(
            ready=self.nodes,
            pending=len(self.starting) + self.dead,
            starting=len(self.starting),
            busy_s=busy_s,
            needed_s=busy_s * self.cpu,
            waiting=self.backlog / REQUEST_S,
        )


@dataclass
class Run:
    """A host that carries out what the rule decides, and remembers the nodes of each stage over time."""

    stages: Sequence[SimulatedStage]
    ranges: Sequence[ReplicaRange]
    processors: int = 64
    others: float = 0.0  # processors that other programs use
    free_bytes: int = 1 << 40
    threads: int = 1
    down_after_s: float = 30.0
    counts: list[tuple[int, ...]] = field(default_factory=list)
    decisions: list[tuple[float, Decision]] = field(default_factory=list)

    def go(self, seconds: float) -> Run:
        terms = [StageTerms(replicas=each, threads=self.threads, replica_bytes=100 * MIB) for each in self.ranges]
        rule = Autoscaler(terms, up_after_s=3.0, down_after_s=self.down_after_s)
        for look in range(int(seconds / LOOK_S)):
            now_s = look * LOOK_S
            loads = [stage.step(now_s) for stage in self.stages]
            used = self.others + sum(stage.busy * stage.cpu for stage in self.stages)
            host = HostLoad(
                processors=self.processors,
                idle_processors=max(0.0, self.processors - used),
                free_bytes=self.free_bytes,
            )
            for decision in rule.look(look * int(LOOK_S * SECOND), loads, host):
                self.decisions.append((now_s, decision))
                self._carry_out(rule, decision, now_s)
            self.counts.append(tuple(stage.nodes + len(stage.starting) + stage.dead for stage in self.stages))
        return self

    def _carry_out(self, rule: Autoscaler, decision: Decision, now_s: float) -> None:
        stage = self.stages[decision.stage]
        if decision.after > decision.before and stage.starts:
            stage.starting.append(now_s + START_S)
        elif decision.after > decision.before:
            rule.failed(decision.stage, int(now_s * SECOND))
        elif decision.after < decision.before and stage.dead:
            stage.dead -= 1
        elif decision.after < decision.before:
            stage.nodes -= 1

    @property
    def changes(self) -> list[tuple[float, Decision]]:
        return [(at, one) for at, one in self.decisions if one.after != one.before]


def between(least: int, most: int) -> ReplicaRange:
    return ReplicaRange(least=least, most=most)


def one_stage(curve: Curve, *, most: int = 4, seconds: float = 300, cpu: float = 1.0, **host) -> Run:
    return Run([SimulatedStage(curve, 1, cpu)], [between(1, most)], **host).go(seconds)


# Load curves


@pytest.mark.parametrize(("load", "nodes"), [(0.3, 1), (0.75, 1), (0.95, 1), (1.3, 2), (2.0, 3), (3.0, 4), (9.0, 4)])
def test_a_steady_load_gets_the_nodes_that_it_needs_and_nothing_changes_then(load, nodes):
    run = one_stage(lambda _: load)
    assert run.counts[-1] == (nodes,)
    assert len(run.changes) == nodes - 1, "it only grew"
    assert all(at < 60 for at, _ in run.changes)


def test_after_a_step_up_nodes_are_added_one_by_one_after_the_time_that_was_asked_for():
    run = one_stage(lambda now_s: 3.0 if now_s >= 20 else 0.1, most=8, seconds=80)
    times = [at for at, _ in run.changes]
    assert 22.0 <= times[0] <= 24.0
    assert all(later - at >= START_S + 3.0 for at, later in pairwise(times))
    assert run.counts[-1] == (4,)


def test_after_a_step_down_nodes_go_one_by_one_each_after_its_time():
    run = one_stage(lambda now_s: 3.0 if now_s < 40 else 0.2, seconds=300)
    down = [at for at, one in run.changes if one.after < one.before]
    assert run.counts[-1] == (1,)
    assert len(down) == 3
    assert down[0] >= 40 + 30 - 3
    assert all(later - at >= 30 for at, later in pairwise(down))


def test_a_load_that_comes_back_sooner_than_nodes_go_keeps_them():
    """Bursts of eight seconds in every twenty: the nodes for them stay."""
    run = one_stage(lambda now_s: 2.5 if now_s % 20 < 8 else 0.1, seconds=600)
    assert all(one.after > one.before for _, one in run.changes)


def test_a_sawtooth_changes_the_nodes_at_most_twice_in_each_tooth_and_step():
    """The load rises from 0 to 3 nodes in two minutes, and falls at once."""
    run = one_stage(lambda now_s: 3.0 * (now_s % 120) / 120, seconds=1200)
    assert len(run.changes) <= 10 * 2 * 2
    assert max(run.counts) == (3,)


def test_a_burst_that_is_shorter_than_the_time_that_was_asked_for_adds_nothing():
    assert one_stage(lambda now_s: 3.0 if 50 <= now_s < 51 else 0.0).changes == []


def test_requests_that_wait_count_only_where_a_node_would_not_be_removed_again():
    def waits(busy: float, *waiting: float) -> list[Decision]:
        rule = Autoscaler([StageTerms(replicas=between(1, 4), threads=1, replica_bytes=0)])
        host = HostLoad(processors=8, idle_processors=8, free_bytes=0)
        loads = [
            StageLoad(ready=1, pending=0, starting=0, busy_s=busy * LOOK_S, needed_s=0.0, waiting=each)
            for each in waiting * 10
        ]
        return [one for look, load in enumerate(loads) for one in rule.look(int(look * LOOK_S * SECOND), [load], host)]

    assert waits(0.55, 5.0, 5.0) == []
    assert waits(0.65, 10.0, 0.0) == [], "nothing waits half of the time"
    assert str(waits(0.65, 5.0, 5.0)[0]) == "stage 0: 1 to 2 replicas: 5 requests wait, its nodes were busy 65 % of 3 s"


@settings(max_examples=60)
@given(
    levels=st.lists(st.floats(0.0, 6.0), min_size=1, max_size=5),
    noise=st.floats(0.0, 0.1),
    least=st.integers(1, 2),
    span=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_whatever_the_load_the_number_stays_in_its_range_and_settles(levels, noise, least, span, seed):
    source, each_s = random.Random(seed), 300.0

    def curve(now_s: float) -> float:
        return levels[int(now_s // each_s) % len(levels)] * (1 + noise * source.uniform(-1, 1))

    run = Run([SimulatedStage(curve, least)], [between(least, least + span)]).go(each_s * len(levels))
    assert all(least <= count <= least + span for (count,) in run.counts)
    for level in range(len(levels)):
        of_level = [(at, one) for at, one in run.changes if level * each_s <= at < (level + 1) * each_s]
        assert len(of_level) <= span + 1, "it follows the load in one direction; one more where a level just began"
        last = [at for at, one in of_level if one.after > one.before and at >= (level + 1) * each_s - 100]
        assert not last, "what the load needs is there after 200 s"


# Requests that take long


@dataclass
class Queue:
    """Nodes that take requests one by one, first come, first served, in steps of ``LOOK_S``.

    Attributes:
        load: the work that arrives, in nodes.
        service_s: the time of a request.
        regular: whether requests arrive at equal distances; at random ones otherwise (Poisson).
    """

    load: float
    service_s: float
    regular: bool

    def changes(self, looks: int, *, most: int = 8, down_after_s: float = 30.0) -> list[int]:
        """What is added and removed, as 1 and -1."""
        terms = StageTerms(replicas=between(1, most), threads=1, replica_bytes=0)
        rule = Autoscaler([terms], up_after_s=3.0, down_after_s=down_after_s)
        host = HostLoad(processors=64, idle_processors=64.0, free_bytes=0)
        source, gap_s, nodes, changes = random.Random(1), self.service_s / self.load, 1, []
        arrives_s, queue, left = gap_s, 0, list[float]()  # what the running requests still need
        for look in range(looks):
            while arrives_s <= look * LOOK_S:
                queue += 1
                arrives_s += gap_s if self.regular else source.expovariate(1 / gap_s)
            busy_s = 0.0
            for node in range(nodes):
                free_s, at = LOOK_S, node
                while free_s > 0 and (at < len(left) or queue):
                    if at >= len(left):
                        left.append(self.service_s)
                        at, queue = len(left) - 1, queue - 1
                    ran_s = min(free_s, left[at])
                    left[at] -= ran_s
                    free_s, busy_s = free_s - ran_s, busy_s + ran_s
                    if left[at] <= 1e-9:
                        left[at] = self.service_s if queue else 0.0
                        queue -= bool(queue)
                        if not left[at]:
                            break
            left = [each for each in left if each > 0]
            load = StageLoad(ready=nodes, pending=0, starting=0, busy_s=busy_s, needed_s=0.0, waiting=queue)
            for decision in rule.look(int(look * LOOK_S * SECOND), [load], host):
                changes.append(decision.after - decision.before)
                nodes = decision.after
        return changes


LOADS = (0.05, 0.45, 0.75, 1.7, 2.4)
SERVICE_S = (1.0, 5.0, 60.0)


@pytest.mark.parametrize("service_s", SERVICE_S)
@pytest.mark.parametrize("load", LOADS)
def test_a_steady_load_of_long_requests_only_adds_nodes(load, service_s):
    """They arrive at equal distances, for two hours."""
    changes = Queue(load, service_s, regular=True).changes(2 * 7200)
    assert -1 not in changes
    assert len(changes) <= 3


@pytest.mark.parametrize("service_s", SERVICE_S)
@pytest.mark.parametrize("load", LOADS)
def test_the_number_changes_rarely_where_long_requests_arrive_at_random(load, service_s):
    """Each removal that came too soon doubles the time before the next, from 30 s up to an hour, in four hours."""
    changes = Queue(load, service_s, regular=False).changes(4 * 7200)
    assert changes.count(-1) <= 8


def test_a_request_that_runs_alone_is_no_reason_for_another_node():
    assert Queue(5 / 45, 5.0, regular=True).changes(7200) == []


def test_a_load_that_comes_back_after_each_removal_keeps_its_nodes():
    """Five seconds of a load in every 45: longer than nodes without work stay."""
    run = one_stage(lambda now_s: 2.5 if now_s % 45 < 8 else 0.1, seconds=4 * 3600)
    late = [at for at, _ in run.changes if at > 3600]
    assert len(late) <= 2
    assert len(run.changes) <= 24


# Several stages


def test_the_slowest_stage_grows_and_then_the_one_that_is_slowest_then():
    stages = [SimulatedStage(lambda _: 1.2, 1), SimulatedStage(lambda _: 1.9, 1)]
    run = Run(stages, [between(1, 4)] * 2).go(120)
    assert run.changes[0][1].stage == 1
    assert run.counts[-1] == (2, 3)


def test_a_stage_without_a_range_stays_as_it_is():
    stages = [SimulatedStage(lambda _: 3.0, 2), SimulatedStage(lambda _: 0.1, 2)]
    assert Run(stages, [between(2, 2)] * 2).go(200).decisions == []


# The host


def test_what_is_logged_reads_as_the_page_shows():
    def changes(curve: Curve, most: int, processors: int) -> list[Decision]:
        stages = [SimulatedStage(lambda _: 1.0, 2), SimulatedStage(curve, 2)]
        run = Run(stages, [between(2, 2), between(2, most)], processors=processors).go(100)
        return [one for _, one in run.decisions]

    grown, shrunk = changes(lambda now_s: 3.0 if now_s < 20 else 0.16, 3, 64)
    stays, *_ = changes(lambda _: 2.2, 3, 4)
    shown = pages.block_of("docs/running.md", "stage 1: 2 to 3 replicas").splitlines()
    for line, decision in zip(shown, (grown, shrunk, stays), strict=True):
        assert re.fullmatch(pages.pattern(line), str(decision)), str(decision)


def test_no_node_is_added_where_the_nodes_would_have_more_threads_than_there_are_processors():
    run = one_stage(lambda _: 5.0, processors=2)
    assert run.counts[-1] == (2,)
    told = [one for _, one in run.decisions if one.after == one.before]
    assert str(told[0]).startswith("stage 0 stays at 2 replicas: ")
    assert "the nodes take 2 of 2 processors, and another one takes 1" in told[0].reason
    assert len(told) <= 300 / 60 + 1, "it is not said all the time"


def test_the_threads_of_all_stages_count():
    stages = [SimulatedStage(lambda _: 0.2, 1, 2.0), SimulatedStage(lambda _: 3.0, 1, 2.0)]
    run = Run(stages, [between(1, 4)] * 2, processors=6, threads=2).go(200)
    assert run.counts[-1] == (1, 2)


def test_no_node_is_added_while_other_programs_use_the_processors():
    run = one_stage(lambda _: 2.0, processors=4, others=3.0)
    assert run.changes == []
    assert "0 of 4 processors are idle" in run.decisions[0][1].reason


def test_a_stage_that_waits_for_something_else_needs_no_processor():
    run = one_stage(lambda _: 3.5, processors=1, others=1.0, cpu=0.05)
    assert run.counts[-1] == (4,)


def test_no_node_is_added_without_memory_for_it():
    run = one_stage(lambda _: 2.0, free_bytes=99 * MIB)
    assert run.changes == []
    assert "another node takes 100 MiB, and 99 MiB are free" in run.decisions[0][1].reason


def test_memory_that_a_node_will_take_while_it_starts_is_not_free_for_another():
    stages = [SimulatedStage(lambda _: 1.5, 1), SimulatedStage(lambda _: 1.6, 1)]
    first, second, *_ = (at for at, _ in Run(stages, [between(1, 4)] * 2, free_bytes=150 * MIB).go(60).changes)
    assert second - first >= START_S


# Nodes that do not start, and times in which nobody looked


def test_after_a_node_that_did_not_start_the_next_try_comes_later_each_time():
    run = Run([SimulatedStage(lambda _: 2.0, 1, starts=False)], [between(1, 4)]).go(400)
    times = [at for at, _ in run.changes]
    waits = [later - at for at, later in pairwise(times)]
    assert len(waits) == 3
    assert all(wait_s >= least for wait_s, least in zip(waits, (30, 60, 120), strict=True))
    assert waits[0] < waits[1] < waits[2] < 140


def test_time_in_which_the_process_was_stopped_is_not_slack():
    rule = Autoscaler([StageTerms(replicas=between(1, 4), threads=1, replica_bytes=0)])
    host = HostLoad(processors=8, idle_processors=8, free_bytes=0)
    idle = StageLoad(ready=2, pending=0, starting=0, busy_s=0.0, needed_s=0.0, waiting=0.0)
    looks = [*range(20), *range(1000, 1020)]
    assert not any(rule.look(int(look * LOOK_S * SECOND), [idle], host) for look in looks)


def test_a_node_that_does_not_come_back_prevents_no_other():
    run = Run([SimulatedStage(lambda _: 2.5, 1, dead=1)], [between(1, 4)]).go(300)
    assert run.stages[0].nodes == 3
    assert run.counts[-1] == (4,), "it counts against the range"


def test_a_node_that_does_not_come_back_goes_first():
    stage = SimulatedStage(lambda _: 0.1, 2, dead=1)
    run = Run([stage], [between(2, 4)]).go(100)
    assert (stage.nodes, stage.dead, run.counts[-1]) == (2, 0, (2,))
    stage = SimulatedStage(lambda _: 0.4, 1, dead=1)
    Run([stage], [between(1, 4)]).go(100)
    assert (stage.nodes, stage.dead) == (1, 0)


def test_another_node_that_comes_back_does_not_end_the_wait_after_failures():
    rule = Autoscaler([StageTerms(replicas=between(1, 8), threads=1, replica_bytes=0)])
    assert [rule.failed(0, 0) for _ in range(3)] == [30, 60, 120]
    host = HostLoad(processors=8, idle_processors=8, free_bytes=0)
    for look, ready in enumerate((1, 2)):
        load = StageLoad(ready=ready, pending=2 - ready, starting=0, busy_s=0.0, needed_s=0.0, waiting=0.0)
        rule.look(int(look * LOOK_S * SECOND), [load], host)
    assert rule.failed(0, 0) == 240


def test_long_times_keep_few_figures():
    window = _Window(3600 * SECOND)
    for look in range(20_000):
        window.add(look * SECOND, (look + 1) * SECOND, 0.5, 1.0)
    seconds, sums = window.sums()
    assert len(window) <= 66
    assert 3600 <= seconds <= 3600 * (1 + 1 / 64)
    assert sums == (seconds / 2, seconds)


def test_a_node_that_waits_for_a_processor_needs_one():
    """It got a tenth of a processor, and waited for it in the rest of the time."""
    run = one_stage(lambda _: 3.0, processors=2, others=2.0, cpu=0.1 + 0.9)
    assert run.changes == []


def test_nothing_changes_while_a_node_starts():
    rule = Autoscaler([StageTerms(replicas=between(1, 4), threads=1, replica_bytes=0)])
    host = HostLoad(processors=8, idle_processors=8, free_bytes=0)
    full = StageLoad(ready=1, pending=1, starting=1, busy_s=LOOK_S, needed_s=LOOK_S, waiting=9.0)
    assert not any(rule.look(int(look * LOOK_S * SECOND), [full], host) for look in range(100))
