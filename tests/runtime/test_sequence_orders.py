"""In every order of answers, losses and ends, every token of a sequence comes once, and every sequence ends once."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sequence_driver import TIMINGS, Driver, decoder_plan

from runtime.coordinator.events import Expired, GivenUp, LeaveWanted, LinksSeen, Reported, Scaled, Tick
from runtime.coordinator.node_record import Phase
from runtime.wire.messages.data import Failed

SECOND = 1_000_000_000
_FOLDER = Path(tempfile.mkdtemp())


class Orders(RuleBasedStateMachine):
    """A coordinator with sequences, and everything that can happen to them."""

    @initialize(
        replicas=st.tuples(st.integers(1, 2), st.integers(1, 3)),
        rows=st.sampled_from(["right", "equal", "one"]),
        chunk=st.sampled_from(["one-row", "none"]),
        max_rows=st.integers(1, 6),
        groups=st.one_of(st.none(), st.integers(1, 3)),
        size=st.integers(1, 5),
        cache_bytes=st.sampled_from([300, 1 << 30]),
        attempts=st.sampled_from([1, 2, 3, 10**6]),
    )
    def begin(self, replicas, rows, chunk, max_rows, groups, size, cache_bytes, attempts):
        plan = decoder_plan(_FOLDER, stages=2, rows=rows, chunk=chunk)
        self.driver = Driver(
            _FOLDER,
            replicas,
            attempts=attempts,
            plan=plan,
            max_rows=max_rows,
            decode_groups=groups,
            prefill_chunk=size,
            cache_bytes=cache_bytes,
        )
        self.late = []
        self.dead = frozenset()

    def pick(self, data, things):
        things = list(things)
        return data.draw(st.sampled_from(things)) if things else None

    @rule(prompt=st.integers(1, 12), max_tokens=st.integers(1, 12), wait=st.booleans(), scores=st.booleans())
    def submit(self, prompt, max_tokens, wait, scores):
        self.driver.submit(prompt, max_tokens, wait=wait, scores=scores)

    @rule(data=st.data(), count=st.integers(1, 12))
    def steps_come_back(self, data, count):
        for _ in range(count):
            number = self.pick(data, self.driver.steps)
            if number is not None:
                self.late.append(self.driver.answer(self.driver.steps[number]))
                self.driver.come(number)

    @rule(data=st.data())
    def a_step_comes_twice_or_late(self, data):
        event = self.pick(data, self.late)
        if event is not None:
            self.driver.do(event)

    @rule(data=st.data())
    def a_step_is_lost(self, data):
        number = self.pick(data, self.driver.steps)
        if number is not None:
            self.late.append(self.driver.answer(self.driver.steps.pop(number)))

    @rule(data=st.data(), stage=st.integers(0, 1))
    def a_step_fails(self, data, stage):
        number = self.pick(data, self.driver.steps)
        if number is not None:
            step = self.driver.steps.pop(number)
            slot = next((node.slot for node in self.driver.machine.roster if node.number == step.route[stage]), (9, 9))
            self.driver.do(Reported(Failed(number, 1, *slot, "no")))

    @rule(data=st.data(), running=st.booleans())
    def a_node_is_lost(self, data, running):
        number = self.pick(data, [node.number for node in self.driver.machine.roster if node.number > 0])
        if number is not None:
            through = [step for step, sent in self.driver.steps.items() if number in sent.route]
            self.driver.lose(number, running=through[:1] if running else ())

    @rule()
    def nodes_arrive(self):
        self.driver.arrive()

    @rule(data=st.data())
    def a_node_leaves(self, data):
        identity = self.pick(data, [node.identity for node in self.driver.machine.roster if node.identity])
        if identity is not None:
            self.driver.do(LeaveWanted(identity, self.driver.now_ns))

    @rule(stage=st.integers(0, 1), replicas=st.integers(1, 3), tentative=st.booleans())
    def scale(self, stage, replicas, tentative):
        self.driver.do(Scaled(stage, replicas, self.driver.now_ns, tentative))

    @rule(data=st.data())
    def links_die_and_work_again(self, data):
        numbers = [0, *(node.number for node in self.driver.machine.roster if node.number > 0)]
        links = [(one, other) for one in numbers for other in numbers if one != other]
        self.dead = frozenset(data.draw(st.lists(st.sampled_from(links), max_size=2)) if links else ())
        self.driver.do(LinksSeen(self.dead, self.driver.now_ns))

    @rule(data=st.data(), expires=st.booleans())
    def give_up(self, data, expires):
        number = self.pick(data, self.driver.tokens.keys() - self.driver.ends.keys())
        if number is not None:
            self.driver.do(Expired(number, {}) if expires else GivenUp(number))

    @rule(seconds=st.integers(1, 60))
    def wait(self, seconds):
        self.driver.now_ns += seconds * SECOND
        self.driver.do(Tick(self.driver.now_ns))

    @precondition(lambda self: hasattr(self, "driver"))
    @invariant()
    def all_is_right(self):
        driver = self.driver
        assert driver.is_right()
        chains = driver.machine.sequences.scheduler.chains
        used = {node.number: chains.used_bytes(node.number) for node in driver.machine.roster}
        assert all(0 <= bytes_ <= driver.limits.cache_bytes for bytes_ in used.values())

    def teardown(self):
        if not hasattr(self, "driver"):
            return
        driver = self.driver
        self.driver.do(LinksSeen(frozenset(), driver.now_ns))
        for _ in range(10_000):
            driver.arrive()
            driver.run()
            if not len(driver.machine.sequences) and not driver.machine.roster.missing():
                break
            driver.now_ns += int(TIMINGS.lost_s + 1) * SECOND
            self.driver.do(Tick(driver.now_ns))
        driver.check_end()
        assert {node.phase for node in driver.machine.roster} <= {Phase.READY}


class MoreOrders(Orders):
    """The same with longer runs."""


Orders.TestCase.settings = settings(max_examples=150, stateful_step_count=60)
MoreOrders.TestCase.settings = settings(max_examples=3_000, stateful_step_count=120)
TestOrders = Orders.TestCase
TestMoreOrders = pytest.mark.exhaustive(MoreOrders.TestCase)
