"""Admission: which requests enter the pipeline, and in which order."""

from __future__ import annotations

import threading

import pytest
from waiting import wait_until

from runtime.requests import admission
from runtime.requests.admission import Admission


def waiting(entrance: Admission, size: int, log: list, name: str) -> threading.Thread:
    """Start a thread that waits for admission; it is in the queue when this returns."""
    before = len(entrance._waiting)
    thread = threading.Thread(target=lambda: log.append((name, entrance.enter(name, size))))
    thread.start()
    wait_until(lambda: len(entrance._waiting) > before or not thread.is_alive())
    return thread


def test_requests_are_counted():
    entrance = Admission(2, 1000)
    assert entrance.enter("a", 1)
    assert entrance.enter("b", 1)
    assert not entrance.enter("c", 1, block=False)
    entrance.leave("a")
    assert entrance.enter("c", 1, block=False)


def test_bytes_are_counted():
    entrance = Admission(10, 100)
    assert entrance.enter("a", 60)
    assert not entrance.enter("b", 60, block=False)
    assert entrance.enter("b", 40, block=False)


def test_one_request_may_be_larger_than_all_there_is_room_for():
    entrance = Admission(10, 100)
    assert entrance.enter("a", 5000)
    assert not entrance.enter("b", 1, block=False)
    entrance.leave("a")
    assert entrance.enter("b", 1, block=False)


def test_a_wait_ends_in_time():
    entrance = Admission(1, 100)
    entrance.enter("a", 1)
    assert not entrance.enter("b", 1, timeout=0.01)
    entrance.leave("a")
    assert entrance.enter("c", 1, block=False), "who gave up takes no place"


def test_a_place_that_is_given_back_twice_is_free_once():
    entrance = Admission(2, 100)
    entrance.enter("a", 1)
    entrance.enter("b", 1)
    entrance.leave("a")
    entrance.leave("a")
    entrance.leave("nobody")
    assert entrance.inside == 1


def test_an_interrupt_of_a_waiting_thread_takes_no_place(monkeypatch):
    class Interrupted(admission.SimpleQueue):
        def get(self, timeout=None):
            entrance.leave("a")  # the place becomes free at this moment
            raise KeyboardInterrupt

    monkeypatch.setattr(admission, "SimpleQueue", Interrupted)
    entrance = Admission(1, 100)
    entrance.enter("a", 1)
    with pytest.raises(KeyboardInterrupt):
        entrance.enter("b", 1)
    entrance.leave("b")
    assert entrance.inside == 0


def test_first_come_first_served_even_where_a_later_one_would_fit():
    entrance, log = Admission(10, 100), []
    entrance.enter("a", 90)
    large = waiting(entrance, 80, log, "large")
    small = waiting(entrance, 5, log, "small")
    assert log == []
    entrance.leave("a")
    large.join(60)
    small.join(60)
    assert sorted(log) == [("large", True), ("small", True)]


def test_a_request_that_gives_up_does_not_block_the_queue():
    entrance, log = Admission(10, 100), []
    entrance.enter("a", 90)
    gives_up = threading.Thread(target=lambda: log.append(("large", entrance.enter("large", 80, timeout=0.05))))
    gives_up.start()
    small = waiting(entrance, 5, log, "small")
    gives_up.join(60)
    small.join(60)
    assert sorted(log) == [("large", False), ("small", True)]


def test_a_refused_request_hears_of_the_next_release_once():
    admission = Admission(1, 100)
    admission.enter("a", 1)
    releases, told = admission.releases, []
    assert not admission.enter("b", 1, block=False)
    admission.when_released(releases, lambda: told.append("once"))
    admission.leave("b")
    assert told == [], "b had no place, so none is free"
    admission.leave("a")
    admission.enter("c", 1)
    admission.leave("c")
    assert told == ["once"]


def test_a_release_before_the_wait_for_one_counts():
    admission = Admission(1, 100)
    admission.enter("a", 1)
    releases, told = admission.releases, []
    admission.leave("a")
    admission.when_released(releases, lambda: told.append("at once"))
    assert told == ["at once"]


def test_a_caller_that_waits_alone_is_woken_for_a_group_of_places():
    entrance, log = Admission(4, 100, group=2), []
    for place in "abcd":
        assert entrance.enter(place, 0)
    thread = waiting(entrance, 0, log, "e")
    entrance.leave("a")
    assert len(entrance._waiting) == 1
    entrance.leave("b")
    thread.join()
    assert log == [("e", True)]
    assert entrance.enter("f", 0, block=False)
    assert not entrance.enter("g", 0, block=False)


def test_callers_that_wait_together_are_woken_one_by_one():
    entrance, log = Admission(4, 100, group=2), []
    for place in "abcd":
        assert entrance.enter(place, 0)
    threads = [waiting(entrance, 0, log, name) for name in "ef"]
    entrance.leave("a")
    threads[0].join()
    assert log == [("e", True)]
    entrance.leave("b")
    entrance.leave("c")
    threads[1].join()
    assert log == [("e", True), ("f", True)]


def test_requests_that_wait_without_blocking_stand_in_the_same_line():
    entrance, log = Admission(1, 100), []
    assert entrance.join("a", 1, None)
    assert not entrance.join("refused", 1, None)
    assert not entrance.join("b", 1, lambda: log.append("b") is None)
    thread = waiting(entrance, 1, log, "thread")
    assert not entrance.join("c", 1, lambda: log.append("c") is None)
    for place, admitted in (("a", ["b"]), ("b", ["b", ("thread", True)])):
        entrance.leave(place)
        wait_until(lambda admitted=admitted: log == admitted)
    thread.join()
    entrance.leave("thread")
    assert log == ["b", ("thread", True), "c"]


def test_a_request_that_leaves_the_line_is_never_admitted():
    entrance, log = Admission(1, 100), []
    entrance.join("a", 1, None)
    entrance.join("b", 1, lambda: log.append("b") is None)
    entrance.leave("b")
    entrance.leave("a")
    assert log == []
    assert entrance.inside == 0


def test_a_callback_of_an_admission_may_use_the_admission():
    entrance, log = Admission(1, 100), []
    entrance.join("a", 1, None)
    entrance.join("b", 1, lambda: entrance.leave("b") is None)
    entrance.join("c", 1, lambda: log.append("c") is None)
    entrance.leave("a")
    assert log == ["c"]


def test_places_of_requests_that_nobody_waits_for_pass_on_however_many_there_are():
    entrance, log = Admission(1, 100), []
    entrance.join("a", 1, None)
    for number in range(5000):
        entrance.join(number, 1, lambda: False)
    entrance.join("last", 1, lambda: log.append("last") is None)
    entrance.leave("a")
    assert log == ["last"]
    assert entrance.inside == 1


def test_requests_that_wait_enter_when_the_limit_is_raised():
    admission = Admission(1, 100)
    first, second, admitted = object(), object(), []
    assert admission.enter(first, 1)
    assert not admission.join(second, 1, lambda: admitted.append(second) or True)
    assert admission.is_full
    admission.resize(2)
    assert admitted == [second]
    assert admission.inside == 2
    admission.resize(1)  # those that were admitted stay
    assert admission.inside == 2
    admission.leave(first)
    assert not admission.enter(first, 1, block=False)
