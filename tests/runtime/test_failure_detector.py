"""The nodes that the failure detector declares dead, with a clock that the tests set."""

from __future__ import annotations

import pytest

from runtime.coordinator.failure_detector import FailureDetector
from runtime.timings import Timings
from runtime.wire.messages.control import NodeBeat

SECOND = 1_000_000_000
TIMINGS = Timings(beat_s=0.5, silence_s=5, loading_silence_s=60)
BEAT = NodeBeat(0, 0, 0, 0)


@pytest.fixture
def detector():
    """A failure detector of one node, number 1, that got its stage at 0 s."""
    detector = FailureDetector(TIMINGS)
    detector.begin(1, 0, 0)
    return detector


def test_a_node_that_loads_may_be_silent_longer_than_one_that_serves(detector):
    assert detector.silent(59 * SECOND) == {}
    assert "silent for 61.0 s before it was ready" in detector.silent(61 * SECOND)[1]
    detector.serves(1)
    detector.heard(1, BEAT, 61 * SECOND)
    assert detector.silent(66 * SECOND) == {}
    assert "silent for 6.0 s: stopped" in detector.silent(67 * SECOND)[1]


def test_a_loading_node_whose_process_ended_is_not_waited_for(detector):
    detector.heard(1, BEAT, 10 * SECOND)
    detector.closed(1, 11 * SECOND)
    assert detector.silent(15 * SECOND) == {}
    assert list(detector.silent(16 * SECOND)) == [1]


def test_a_loading_node_whose_link_broke_and_came_back_has_all_its_time_again(detector):
    detector.closed(1, SECOND)
    detector.heard(1, BEAT, 2 * SECOND)
    assert detector.silent(60 * SECOND) == {}


def test_a_loading_node_that_was_stopped_has_all_its_time_though_its_link_is_given_up(detector):
    detector.closed(1, 11 * SECOND)
    assert detector.silent(59 * SECOND) == {}


def test_a_process_that_was_stopped_itself_declares_no_node_dead(detector):
    detector.serves(1)
    detector.heard(1, BEAT, 10 * SECOND)
    detector.excuse(100 * SECOND)
    assert detector.silent(114 * SECOND) == {}
    assert list(detector.silent(116 * SECOND)) == [1]


def test_a_node_that_is_no_longer_monitored_is_never_silent(detector):
    detector.end(1)
    detector.serves(1)
    detector.closed(1, 0)
    assert detector.silent(1000 * SECOND) == {}


def test_a_run_far_beyond_the_usual_is_taken_for_stuck(detector):
    usual = NodeBeat(3, 15 * SECOND, 1000, SECOND)
    assert detector.heard(1, usual, SECOND) is None
    assert "is stuck: a request has been running for 25.0 s" in detector.heard(
        1, NodeBeat(3, 25 * SECOND, 1000, SECOND), SECOND
    )
