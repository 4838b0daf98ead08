"""What a sender knows about the load of replicas on other hosts, with a fake clock."""

from __future__ import annotations

from collections import Counter

from runtime.balance.board import LoadBoard
from runtime.balance.policies import UNIT_COST
from runtime.balance.router import Router
from runtime.wire.messages.control import Peer
from runtime.wire.messages.data import Receipt

SECOND = 1_000_000_000
MS = 1_000_000


class Far:
    """A replica on another host, with the arrived and the finished work of one sender."""

    def __init__(self, number: int, service_ns: int = 5 * MS) -> None:
        self.number, self.service_ns = number, service_ns
        self.arrived = self.done = 0

    def take(self, cost: int = UNIT_COST) -> None:
        self.arrived += cost

    def finish(self, cost: int = UNIT_COST) -> None:
        self.done += cost

    @property
    def receipt(self) -> Receipt:
        return Receipt(self.number, self.done, self.arrived, 0, self.service_ns, self.service_ns)


def knowing(*numbers: int) -> Router:
    router = Router("completion", LoadBoard())
    learn(router, *numbers)
    return router


def learn(router: Router, *numbers: int) -> None:
    router.learn(0, [Peer(n, 0, n, True, "tcp://10.0.0.1:1", "", None, "") for n in numbers], {})


def test_the_queue_of_a_lone_replica_returns_to_nothing():
    """Before, it had no receipts, so all work ever sent there counted as queued."""
    router, far = knowing(1), Far(1)
    for _ in range(100):
        router.sent(1, UNIT_COST)
        far.take()
    router.told(far.receipt, 0)
    assert router.outstanding(1) == 100 * UNIT_COST
    for _ in range(100):
        far.finish()
    router.told(far.receipt, SECOND)
    assert router.outstanding(1) == 0


def test_what_was_lost_on_the_way_is_not_counted_for_ever():
    router, far = knowing(1), Far(1)
    for _ in range(5):
        router.sent(1, UNIT_COST)
    far.take()
    far.finish()
    outstanding = []
    for second in range(15):
        router.told(far.receipt, second * SECOND)
        outstanding.append(router.outstanding(1) // UNIT_COST)
    assert outstanding == [4] * 10 + [0] * 5


def test_what_arrives_after_it_was_taken_for_lost_counts_again():
    router, far = knowing(1), Far(1)
    router.sent(1, UNIT_COST)
    for second in range(12):
        router.told(far.receipt, second * SECOND)
    assert router.outstanding(1) == 0
    far.take()
    router.told(far.receipt, 12 * SECOND)
    assert router.outstanding(1) == UNIT_COST
    far.finish()
    router.told(far.receipt, 13 * SECOND)
    assert router.outstanding(1) == 0


def test_work_that_waits_at_a_slow_replica_is_never_taken_for_lost():
    router, far = knowing(1), Far(1, service_ns=20 * SECOND)
    for _ in range(3):
        router.sent(1, UNIT_COST)
        far.take()
    for second in range(60):
        router.told(far.receipt, second * SECOND)
        assert router.outstanding(1) == 3 * UNIT_COST


def test_receipts_that_come_late_mislead_until_the_next_one_only():
    router, far = knowing(1), Far(1)
    router.told(far.receipt, 0)
    old = far.receipt
    for _ in range(50):
        router.sent(1, UNIT_COST)
        far.take()
    for second in range(1, 20):  # the link for receipts is dead, so no load is known
        assert router.outstanding(1) == 50 * UNIT_COST, second
    router.told(old, 20 * SECOND)
    router.told(far.receipt, 20 * SECOND + 1)
    assert router.outstanding(1) == 50 * UNIT_COST
    far.finish(50 * UNIT_COST)
    router.told(far.receipt, 21 * SECOND)
    assert router.outstanding(1) == 0


def test_a_replica_that_cannot_tell_anything_is_not_left_without_work():
    """For example, nodes there cannot connect to this host. Work sent to it must not count without end."""
    router, far = knowing(1, 2), Far(2)
    taken = Counter()
    for turn in range(1000):
        now = turn * 100 * MS
        number = router.choose(0, (-1,), UNIT_COST, 0, now)
        taken[number] += turn >= 500
        router.sent(number, UNIT_COST)
        if number == 2:
            far.take()
            far.finish()
        router.told(far.receipt, now + 50 * MS)
    assert taken[1] >= 3, taken  # one whenever what was sent last is long ago


def test_a_replica_that_joins_starts_at_nothing_and_shares_the_work():
    """Before, it got all requests and the old one none, because all work ever sent there counted as queued."""
    router, old, new = knowing(1), Far(1), Far(2)
    for _ in range(1000):
        router.sent(1, UNIT_COST)
        old.take()
        old.finish()
    router.told(old.receipt, SECOND)
    learn(router, 1, 2)
    assert (router.outstanding(1), router.outstanding(2)) == (0, 0)
    taken = Counter()
    for turn in range(200):
        now = SECOND + turn * 5 * MS
        number = router.choose(0, (-1,), UNIT_COST, 0, now)
        taken[number] += 1
        router.sent(number, UNIT_COST)
        far = old if number == 1 else new
        far.take()
        far.finish()
        router.told(far.receipt, now + 4 * MS)
    assert min(taken[1], taken[2]) > 60, taken


def test_a_number_that_is_used_again_starts_at_nothing():
    router, far = knowing(1, 2), Far(2)
    for _ in range(20):
        router.sent(2, UNIT_COST)
        far.take()
    router.told(far.receipt, 0)
    learn(router, 1)
    learn(router, 1, 2)
    assert router.outstanding(2) == 0
    router.sent(2, UNIT_COST)
    router.told(Receipt(2, 0, UNIT_COST, 0, MS, MS), 30 * SECOND)
    assert router.outstanding(2) == UNIT_COST


def test_a_receipt_of_an_unknown_node_or_of_one_read_in_memory_changes_nothing():
    router = knowing(1)
    router.told(Receipt(9, 5, 5, 0, MS, MS), 0)
    board = LoadBoard()
    router.learn(0, [Peer(1, 0, 0, True, "ipc://x", "", None, "")], {1: board})
    router.sent(1, UNIT_COST)
    router.told(Receipt(1, UNIT_COST, UNIT_COST, 0, MS, MS), 0)
    assert router.outstanding(9) == 0
    board.finish(0, UNIT_COST)


def test_an_unreachable_replica_gets_nothing_while_others_can_be_reached():
    router = knowing(*range(1, 5))
    router.unreachable = frozenset({1, 2})
    taken = Counter(router.choose(0, (-1,), UNIT_COST, 0, 0, avoid=frozenset({3})) for _ in range(20))
    assert taken == {4: 20}
    router.unreachable = frozenset({1, 2, 3, 4})
    assert len({router.choose(0, (-1,), UNIT_COST, 0, 0) for _ in range(20)}) > 1, (
        "if no replica can be reached, all wait"
    )


def test_unreachable_replicas_among_many_get_nothing():
    router = Router("completion", LoadBoard(peers=60))
    learn(router, *range(1, 51))
    router.unreachable = frozenset(range(1, 41))
    taken = {router.choose(0, (-1,), UNIT_COST, 0, 0) for _ in range(200)}
    assert taken <= set(range(41, 51))
    assert len(taken) > 3
