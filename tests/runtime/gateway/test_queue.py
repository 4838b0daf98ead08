"""The queue decides which requests wait, are joined, or are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import Busy
from runtime.gateway.queue import Limits, QueuedRequest, RequestQueue

MS = 1_000_000


def request(key=None, *, rows=1, size=10, at=0, deadline=None, name="") -> QueuedRequest:
    return QueuedRequest(key=key, rows=rows, size_bytes=size, arrived_ns=at, deadline_ns=deadline, item=name)


def names(requests):
    return [one.item for one in requests]


def queue_of(*requests, **limits) -> RequestQueue:
    made = RequestQueue(Limits(**limits))
    for one in requests:
        made.join(one)
    return made


def test_without_batching_they_go_in_one_by_one_in_order():
    made = queue_of(request(name="a"), request(name="b"))
    assert [names(made.next(0)), names(made.next(0)), names(made.next(0))] == [["a"], ["b"], []]


def test_only_requests_of_one_shape_are_joined():
    made = queue_of(*(request(key, name=name) for key, name in zip("xyxxy", "abcde", strict=True)), max_batch=3)
    assert [names(made.next(0)) for _ in range(2)] == [["a", "c", "d"], ["b", "e"]]


def test_a_batch_has_no_more_rows_than_allowed():
    made = queue_of(*(request("x", rows=rows, name=str(rows)) for rows in (3, 2, 1, 9)), max_batch=4)
    assert [names(made.next(0)) for _ in range(3)] == [["3", "1"], ["2"], ["9"]]


def test_a_batch_that_is_not_full_waits_for_more_until_its_first_has_waited_long_enough():
    made = queue_of(request("x", at=5 * MS, name="a"), max_batch=2, max_delay_ns=3 * MS)
    assert made.next(7 * MS) == []
    assert made.due_ns() == 8 * MS
    assert names(made.next(8 * MS)) == ["a"]
    made.join(request("x", at=9 * MS, name="b"))
    made.join(request("x", at=9 * MS, name="c"))
    assert names(made.next(9 * MS)) == ["b", "c"], "a full one waits for nobody"


def test_what_cannot_be_joined_never_waits_for_more():
    made = queue_of(request(None, name="a"), max_batch=2, max_delay_ns=3 * MS)
    assert made.due_ns() is None
    assert names(made.next(0)) == ["a"]


def test_a_full_queue_refuses():
    made = queue_of(request(), request(), requests=2)
    with pytest.raises(Busy, match="2 requests wait"):
        made.join(request())
    made.next(0)
    made.join(request())


def test_bytes_are_bounded_but_one_request_alone_always_fits():
    made = queue_of(request(size=100), size_bytes=50)
    with pytest.raises(Busy, match="100 bytes of requests wait"):
        made.join(request(size=1))
    made.next(0)
    made.join(request(size=1))


def paced(gap_ms=10, latency_ms=20) -> RequestQueue:
    """Return a queue that has measured a steady throughput."""
    made = RequestQueue(Limits())
    for number in range(1, 200):
        made.join(request(at=number * gap_ms * MS))
        made.join(request(at=number * gap_ms * MS))
        made.next(number * gap_ms * MS)
        made.completed(1, (number * gap_ms - latency_ms) * MS, number * gap_ms * MS)
        made.next(number * gap_ms * MS)
    return made


def test_a_request_that_cannot_be_answered_in_time_is_refused_at_once():
    made = paced()
    for _ in range(3):
        made.join(request())
    assert made.expected_ns(1) == pytest.approx(4 * 10 * MS + 20 * MS, rel=0.05)
    with pytest.raises(Busy, match=r"expected in 0\.06. s, and the request has 0\.050 s left"):
        made.join(request(deadline=50 * MS))
    made.join(request(deadline=70 * MS))


def test_a_request_that_is_too_late_is_dropped_before_it_reaches_a_stage():
    made = paced()
    made.join(request(deadline=100 * MS, name="a"))
    made.join(request(deadline=500 * MS, name="b"))
    assert made.late(70 * MS) == []
    assert names(made.late(90 * MS)) == ["a"]
    assert names(made.next(90 * MS)) == ["b"]


def test_a_batch_that_found_no_room_is_put_back_where_it_stood_not_before_those_it_had_passed():
    made = queue_of(*(request(key, name=name) for key, name in zip("xyx", "abc", strict=True)), max_batch=3)
    together = made.next(0)
    assert names(together) == ["a", "c"]
    made.put_back(together)
    assert names(made) == ["a", "b", "c"]


def test_one_slow_answer_does_not_reject_short_deadlines_for_ever():
    made = paced(latency_ms=2000)
    with pytest.raises(Busy, match="the answer is expected in"):
        made.join(request(deadline=200 * MS, name="a"))
    made.join(request(deadline=200 * MS, name="a"), idle=True)
    assert made.late(100 * MS, idle=True) == [], "the pipeline is idle: it may try"
    assert names(made.next(100 * MS)) == ["a"]
    made.join(request(deadline=200 * MS, name="b"), idle=True)
    assert names(made.late(201 * MS, idle=True)) == ["b"], "its time is over"


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("join"), st.sampled_from([None, "x", "y"]), st.integers(1, 5), st.integers(0, 30)),
            st.tuples(st.just("next"), st.booleans()),
            st.tuples(st.just("leave"), st.integers(0, 10)),
        ),
        max_size=60,
    )
)
def test_no_request_is_lost_or_answered_twice(steps):
    made = RequestQueue(Limits(requests=10, size_bytes=100, max_batch=4, max_delay_ns=0))
    there, out = [], []
    for number, step in enumerate(steps):
        if step[0] == "join":
            one = request(step[1], rows=step[2], size=step[3], at=number, name=number)
            try:
                made.join(one)
            except Busy:
                continue
            there.append(one)
        elif step[0] == "next":
            found = made.next(number)
            if step[1]:
                made.put_back(found)
                continue
            assert sum(one.rows for one in found) <= 4 or len(found) < 2
            assert len({one.key for one in found}) < 2
            assert not found or found[0] is there[0], "first come, first served"
            out += found
            there = [one for one in there if one not in found]
        elif there:
            gone = there.pop(step[1] % len(there))
            assert made.leave(gone)
            assert not made.leave(gone)
        assert list(made) == there
        assert made.size_bytes == sum(one.size_bytes for one in there)
    assert len({id(one) for one in out}) == len(out)


def important(level, name="", **settings) -> QueuedRequest:
    made = request(name=name, **settings)
    made.level = level
    return made


def test_priorities_are_levels_and_what_is_no_level_has_the_middle_one():
    limits = Limits(levels=5)
    assert [limits.level(priority) for priority in (0, 1, 5, 6, 2**63)] == [3, 1, 5, 3, 3]
    assert [Limits().level(priority) for priority in (0, 1, 2)] == [1, 1, 1]


def test_with_two_levels_the_first_is_before_requests_without_a_priority():
    assert [Limits(levels=2).level(priority) for priority in (0, 1, 2)] == [2, 1, 2]


def test_a_batch_that_waits_for_more_does_not_hold_up_those_behind_it():
    waiting = queue_of(important(2, "old", key="a"), levels=3, max_batch=4, max_delay_ns=100)
    waiting.join(important(1, "new", key="b", at=90))
    assert waiting.due_ns() == 100
    assert waiting.next(99) == []
    assert names(waiting.next(100)) == ["old"]
    assert waiting.next(189) == []
    assert names(waiting.next(190)) == ["new"]


def test_more_important_requests_enter_first_and_equals_in_their_order():
    made = queue_of(*(important(level, f"{level}{n}") for n, level in enumerate((2, 3, 1, 2, 1))), levels=3)
    assert [names(made.next(0))[0] for _ in range(5)] == ["12", "14", "20", "23", "31"]


def test_what_is_put_back_stands_before_those_of_its_level_that_came_later():
    made = queue_of(important(2, "a"), important(2, "b"), levels=3)
    first = made.next(0)
    made.join(important(1, "c"))
    made.put_back(first)
    assert [names(made.next(0))[0] for _ in range(3)] == ["c", "a", "b"]


def test_a_full_queue_gives_its_least_important_request_up_for_a_more_important_one():
    made = queue_of(important(2, "a"), important(3, "b"), important(3, "c"), levels=3, requests=3)
    assert names(made.join(important(1, "d"))) == ["c"]
    assert names(made.join(important(2, "e"))) == ["b"]
    with pytest.raises(Busy, match="3 requests wait"):
        made.join(important(2, "f"))
    assert [names(made.next(0))[0] for _ in range(3)] == ["d", "a", "e"]


def test_room_for_bytes_is_made_only_if_enough_of_it_is_less_important():
    made = queue_of(important(1, "a", size=50), important(3, "b", size=30), important(3, "c", size=20), levels=3,
                    size_bytes=100)  # fmt: skip
    with pytest.raises(Busy, match="100 bytes of requests wait"):
        made.join(important(2, "d", size=60))
    assert len(made) == 3
    assert made.size_bytes == 100
    assert names(made.join(important(2, "e", size=40))) == ["c", "b"]
    assert made.size_bytes == 90


def test_an_important_request_waits_for_those_before_it_alone():
    made = paced(gap_ms=10, latency_ms=20)
    made.limits = Limits(levels=3)
    for number in range(10):
        made.join(important(3, f"{number}"))
    with pytest.raises(Busy, match="the answer is expected in"):
        made.join(important(3, at=0, deadline=60 * MS))
    assert made.join(important(1, at=0, deadline=60 * MS)) == []


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 40), st.booleans()), max_size=60))
def test_priorities_lose_and_repeat_no_request(steps):
    made, waiting, ended = RequestQueue(Limits(levels=4, requests=5, size_bytes=100)), [], []
    for number, (level, size, takes) in enumerate(steps):
        one = important(level, str(number), size=size)
        try:
            ended += made.join(one)
            waiting.append(one)
        except Busy:
            ended.append(one)
        if takes:
            ended += made.next(0)
        waiting = [other for other in waiting if other not in ended]
        assert list(made) == sorted(waiting, key=lambda other: (other.level, int(other.item)))
        assert made.size_bytes == sum(other.size_bytes for other in waiting)
    assert len({id(one) for one in ended}) == len(ended)
