"""Which links count as dead, and which nodes cannot pass requests on."""

from __future__ import annotations

from onnxsplit.plan import CALLER
from runtime.coordinator.reach import Reachability, dead_ends

SECOND = 1_000_000_000
EVERYBODY = {0, 1, 2, 3}
CHAIN = {CALLER: {0}, 0: {1}, 1: {CALLER}}


def test_a_link_is_dead_when_it_was_not_connected_for_long_enough():
    reach = Reachability(3.0)
    reach.seen(1, (2,), 0)
    reach.seen(1, (2,), 2 * SECOND)
    assert reach.dead(EVERYBODY, EVERYBODY, 2 * SECOND) == frozenset()
    assert reach.dead(EVERYBODY, EVERYBODY, 3 * SECOND) == {(1, 2)}
    reach.seen(1, (), 4 * SECOND)
    assert reach.dead(EVERYBODY, EVERYBODY, 4 * SECOND) == frozenset()


def test_a_link_that_came_back_in_between_is_not_dead():
    reach = Reachability(3.0)
    for second, unreachable in ((0, (2,)), (2, ()), (3, (2,))):
        reach.seen(1, unreachable, second * SECOND)
    assert reach.dead(EVERYBODY, EVERYBODY, 5 * SECOND) == frozenset()


def test_a_link_is_not_blamed_for_a_process_that_is_silent():
    reach = Reachability(3.0)
    reach.seen(1, (2,), 0)
    assert reach.dead(EVERYBODY, {0, 1}, 5 * SECOND) == frozenset()
    assert reach.dead(EVERYBODY, EVERYBODY, 6 * SECOND) == {(1, 2)}
    assert reach.dead(EVERYBODY, {0, 1}, 7 * SECOND) == {(1, 2)}, "it was dead before"


def test_links_of_nodes_that_are_gone_are_forgotten():
    reach = Reachability(3.0)
    reach.seen(1, (2, 3), 0)
    assert reach.dead({0, 1, 3}, EVERYBODY, 5 * SECOND) == {(1, 3)}
    assert reach.dead(EVERYBODY, EVERYBODY, 5 * SECOND) == {(1, 3)}


def test_what_one_process_sees_says_nothing_about_the_links_of_others():
    reach = Reachability(3.0)
    reach.seen(1, (3,), 0)
    reach.seen(2, (), SECOND)
    assert reach.dead(EVERYBODY, EVERYBODY, 5 * SECOND) == {(1, 3)}


def test_a_dead_link_that_can_be_gone_around_ends_nothing():
    nodes = {0: (1,), 1: (2, 3)}
    assert dead_ends(CHAIN, nodes, {(1, 2)}) == frozenset()
    assert dead_ends(CHAIN, nodes, {(0, 1)}) == {0}
    assert dead_ends(CHAIN, nodes, {(1, 2), (1, 3)}) == {0, 1}


def test_a_node_that_reaches_only_dead_ends_is_a_dead_end():
    nodes = {0: (1, 4), 1: (2, 3)}
    assert dead_ends(CHAIN, nodes, {(2, 0)}) == {2}, "the results do not come back from there"
    assert dead_ends(CHAIN, nodes, {(2, 0), (1, 3)}) == {1, 2}
    assert dead_ends(CHAIN, nodes, {(2, 0), (1, 3), (4, 3)}) == {0, 1, 2, 4}


def test_every_branch_has_to_be_reached():
    diamond = {CALLER: {0}, 0: {1, 2}, 1: {3}, 2: {3}, 3: {CALLER}}
    nodes = {stage: (stage + 1,) for stage in range(4)}
    assert dead_ends(diamond, nodes, {(3, 4)}) == {0, 1, 3}


def test_a_stage_without_a_node_is_not_a_matter_of_links():
    assert dead_ends(CHAIN, {0: (1,), 1: ()}, {(7, 8)}) == frozenset()
