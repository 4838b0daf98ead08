"""Which nodes are taken for dead, by a clock that the tests turn."""

from __future__ import annotations

import pytest

from runtime.coordinator.failure_detector import FailureDetector
from runtime.timings import Timings
from runtime.wire.messages.control import NodeBeat

SECOND = 1_000_000_000
TIMINGS = Timings(beat_s=0.5, silence_s=5, loading_silence_s=60)
BEAT = NodeBeat(0, 0, 0, 0)


@pytest.fixture
def watch():
    """One node, number 1, that got its stage at 0 s."""
    watch = FailureDetector(TIMINGS)
    watch.begin(1, 0, 0)
    return watch


def test_a_node_that_loads_may_be_silent_longer_than_one_that_serves(watch):
    assert watch.silent(59 * SECOND) == {}
    assert "silent for 61.0 s before it was ready" in watch.silent(61 * SECOND)[1]
    watch.serves(1)
    watch.heard(1, BEAT, 61 * SECOND)
    assert watch.silent(66 * SECOND) == {}
    assert "silent for 6.0 s: stopped" in watch.silent(67 * SECOND)[1]


def test_a_loading_node_whose_process_ended_is_not_waited_for(watch):
    watch.heard(1, BEAT, 10 * SECOND)
    watch.closed(1, 11 * SECOND)
    assert watch.silent(15 * SECOND) == {}
    assert list(watch.silent(16 * SECOND)) == [1]


def test_a_loading_node_whose_link_broke_and_came_back_has_all_its_time_again(watch):
    watch.closed(1, SECOND)
    watch.heard(1, BEAT, 2 * SECOND)
    assert watch.silent(60 * SECOND) == {}


def test_a_loading_node_that_was_stopped_has_all_its_time_though_its_link_is_given_up(watch):
    watch.closed(1, 11 * SECOND)
    assert watch.silent(59 * SECOND) == {}


def test_who_did_not_run_itself_blames_nobody(watch):
    watch.serves(1)
    watch.heard(1, BEAT, 10 * SECOND)
    watch.excuse(100 * SECOND)
    assert watch.silent(114 * SECOND) == {}
    assert list(watch.silent(116 * SECOND)) == [1]


def test_what_is_not_watched_any_more_is_never_silent(watch):
    watch.end(1)
    watch.serves(1)
    watch.closed(1, 0)
    assert watch.silent(1000 * SECOND) == {}


def test_a_run_far_beyond_the_usual_is_taken_for_stuck(watch):
    usual = NodeBeat(3, 15 * SECOND, 1000, SECOND)
    assert watch.heard(1, usual, SECOND) is None
    assert "is stuck: a request has been running for 25.0 s" in watch.heard(
        1, NodeBeat(3, 25 * SECOND, 1000, SECOND), SECOND
    )
