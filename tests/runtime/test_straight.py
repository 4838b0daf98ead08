"""A node tells the coordinator of a result at once, unless the next one follows soon."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from runtime.balance.policies import UNIT_COST
from runtime.node.straight import Straight

MS = 1_000_000


@pytest.fixture
def straight():
    clock = SimpleNamespace(service_ns=MS // 2)
    return Straight(SimpleNamespace(), SimpleNamespace(), SimpleNamespace(), clock, SimpleNamespace(), print)


def test_a_result_that_nothing_follows_is_told_at_once(straight):
    assert not straight._may_wait(0, MS)


def test_results_wait_for_each_other_for_two_milliseconds_together(straight):
    waits = [straight._may_wait(UNIT_COST, n * MS // 2) for n in range(1, 8)]
    assert waits == [True, True, True, True, False, True, True]


def test_a_result_does_not_wait_for_a_request_that_takes_long(straight):
    assert not straight._may_wait(100 * UNIT_COST, MS)
    assert straight._may_wait(UNIT_COST // 10, MS)
