"""The grace for which a version stays ready while a stage has no node."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.gateway.models.grace import ReadyGrace


def test_the_grace_begins_with_each_loss_and_ends_after_its_seconds():
    grace = ReadyGrace(10)
    looks = [(0, True), (1, False), (10.9, False), (11, False), (12, True), (13, False), (22.9, False), (23, False)]
    held = [grace.holds(complete=complete, now_s=now_s) for now_s, complete in looks]
    assert held == [True, True, True, False, True, True, True, False]


def test_a_loss_right_after_the_start_has_the_whole_grace():
    grace = ReadyGrace(2)
    assert [grace.holds(complete=False, now_s=now_s) for now_s in (7, 8.9, 9)] == [True, True, False]


@given(st.lists(st.tuples(st.floats(0, 9), st.booleans())), st.floats(0, 20))
def test_it_holds_while_complete_and_for_the_grace_since_the_first_look_that_found_a_loss(steps, seconds):
    grace, now_s, lost_s = ReadyGrace(seconds), 0.0, None
    for pause_s, complete in steps:
        now_s += pause_s
        lost_s = None if complete else now_s if lost_s is None else lost_s
        assert grace.holds(complete=complete, now_s=now_s) == (lost_s is None or now_s - lost_s < seconds)
