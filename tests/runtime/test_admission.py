"""Who is let in, and in what order."""

from __future__ import annotations

import threading

from runtime.admission import Admission


def waiting(entrance: Admission, size: int, log: list, name: str) -> threading.Thread:
    """A thread that waits at the entrance; it is in the queue when this returns."""
    before = len(entrance._waiting)
    thread = threading.Thread(target=lambda: log.append((name, entrance.enter(size))))
    thread.start()
    while len(entrance._waiting) == before and thread.is_alive():
        threading.Event().wait(0.001)
    return thread


def test_requests_are_counted():
    entrance = Admission(2, 1000)
    assert entrance.enter(1)
    assert entrance.enter(1)
    assert not entrance.enter(1, block=False)
    entrance.leave(1)
    assert entrance.enter(1, block=False)


def test_bytes_are_counted():
    entrance = Admission(10, 100)
    assert entrance.enter(60)
    assert not entrance.enter(60, block=False)
    assert entrance.enter(40, block=False)


def test_one_request_may_be_larger_than_all_there_is_room_for():
    entrance = Admission(10, 100)
    assert entrance.enter(5000)
    assert not entrance.enter(1, block=False)
    entrance.leave(5000)
    assert entrance.enter(1, block=False)


def test_a_wait_ends_in_time():
    entrance = Admission(1, 100)
    entrance.enter(1)
    assert not entrance.enter(1, timeout=0.01)
    entrance.leave(1)
    assert entrance.enter(1, block=False), "who gave up takes no place"


def test_first_come_first_served_even_where_a_later_one_would_fit():
    entrance, log = Admission(10, 100), []
    entrance.enter(90)
    large = waiting(entrance, 80, log, "large")
    small = waiting(entrance, 5, log, "small")
    assert log == []
    entrance.leave(90)
    large.join(60)
    small.join(60)
    assert sorted(log) == [("large", True), ("small", True)]


def test_who_gives_up_no_longer_stands_in_the_way():
    entrance, log = Admission(10, 100), []
    entrance.enter(90)
    gives_up = threading.Thread(target=lambda: log.append(("large", entrance.enter(80, timeout=0.05))))
    gives_up.start()
    small = waiting(entrance, 5, log, "small")
    gives_up.join(60)
    small.join(60)
    assert log == [("small", True), ("large", False)] or log == [("large", False), ("small", True)]
