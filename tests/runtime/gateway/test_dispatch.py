"""Which worker of a service executes which call."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from runtime.gateway.services.dispatch import Dispatch


def sent(dispatch: Dispatch) -> list[tuple[str, str]]:
    found = []
    while (pair := dispatch.next()) is not None:
        found.append(pair)
    return found


def with_workers(*names: str, capacity: int = 2) -> Dispatch[str, str]:
    dispatch: Dispatch[str, str] = Dispatch(capacity)
    for name in names:
        dispatch.up(name)
    return dispatch


def test_calls_go_in_turn_to_the_worker_with_the_fewest():
    dispatch = with_workers("v", "w")
    for call in "abcde":
        dispatch.add(call)
    assert sent(dispatch) == [("a", "v"), ("b", "w"), ("c", "v"), ("d", "w")]
    assert dispatch.over("d") == "w"
    assert sent(dispatch) == [("e", "w")]


def test_calls_of_a_dead_worker_run_alone():
    dispatch = with_workers("v")
    for call in "abc":
        dispatch.add(call)
    assert sent(dispatch) == [("a", "v"), ("b", "v")]
    for call in dispatch.down("v"):
        dispatch.add(call, suspected=True)
    dispatch.up("w")
    (first,) = sent(dispatch)
    assert first[0] in "ab"
    dispatch.over(first[0])
    (second,) = sent(dispatch)
    assert {first[0], second[0]} == {"a", "b"}
    dispatch.over(second[0])
    assert sent(dispatch) == [("c", "w")]


def test_a_call_that_is_over_before_it_was_sent_is_forgotten():
    dispatch = with_workers()
    dispatch.add("a")
    assert dispatch.over("a") is None
    dispatch.up("v")
    assert not sent(dispatch)


class AnyCourse(RuleBasedStateMachine):
    """Calls, workers and deaths in any order: no call is lost, and suspected ones are alone."""

    calls = Bundle("calls")
    workers = Bundle("workers")

    def __init__(self) -> None:
        super().__init__()
        self.dispatch: Dispatch[int, int] = Dispatch(3)
        self.waiting: set[int] = set()
        self.running: dict[int, set[int]] = {}
        self.suspected: set[int] = set()
        self.numbers = iter(range(10**6))

    @rule(target=calls)
    def add(self):
        call = next(self.numbers)
        self.dispatch.add(call)
        self.waiting.add(call)
        return call

    @rule(target=workers)
    def up(self):
        worker = next(self.numbers)
        self.dispatch.up(worker)
        self.running[worker] = set()
        return worker

    @rule(worker=consumes(workers))
    def down(self, worker):
        lost = self.dispatch.down(worker)
        assert set(lost) == self.running.pop(worker)
        for call in lost:
            self.dispatch.add(call, suspected=True)
        self.waiting |= set(lost)
        self.suspected |= set(lost)

    @rule(call=calls)
    def over(self, call):
        worker = next((w for w, running in self.running.items() if call in running), None)
        assert self.dispatch.over(call) == worker
        self.waiting.discard(call)
        self.suspected.discard(call)
        if worker is not None:
            self.running[worker].remove(call)

    @rule(most=st.integers(1, 5))
    def send(self, most):
        for _ in range(most):
            pair = self.dispatch.next()
            if pair is None:
                break
            call, worker = pair
            assert call in self.waiting
            self.waiting.remove(call)
            self.running[worker].add(call)

    @invariant()
    def holds(self):
        assert self.dispatch.waiting == len(self.waiting)
        assert self.dispatch.executing == sum(map(len, self.running.values()))
        for running in self.running.values():
            assert len(running) <= (1 if running & self.suspected else 3)

    def teardown(self):
        """With a worker, every call is executed in the end."""
        self.up()
        while self.waiting:
            self.send(5)
            for running in list(self.running.values()):
                for call in list(running):
                    self.over(call)


TestAnyCourse = AnyCourse.TestCase
