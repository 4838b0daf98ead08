"""The assignment of nodes to places: nodes on hosts of the plan, and extra nodes."""

from __future__ import annotations

from runtime.coordinator.node_record import Phase
from runtime.coordinator.roster import Roster
from runtime.timings import Timings
from runtime.wire.messages.control import PROTOCOL, Hello

SECOND = 1_000_000_000


def hello(stage: int = -1, host: str = "h") -> Hello:
    return Hello(PROTOCOL, 0, 1, host, "tcp://h:1", stage, -1, "", None, "")


def waiting(replicas, **options) -> Roster:
    roster = Roster(replicas, Timings(), **options)
    roster.due(0)
    return roster


def join(roster, identity: bytes, said: Hello):
    return roster.join(identity, said, 0, is_open=True)


def serve(roster, node):
    roster.prepare(node, (), 0)
    return node


def test_a_node_fills_the_place_that_the_plan_has_on_its_host():
    roster = waiting((1, 2), hosts={(0, 0): "a", (1, 0): "b", (1, 1): "local"})
    assert join(roster, b"1", hello(host="b")).slot == (1, 0)
    assert join(roster, b"2", hello(host="c")).slot == (1, 1), "nobody is expected there in particular"
    assert join(roster, b"3", hello(host="c")).slot == (0, 0), "better there than nowhere"


def test_a_node_too_many_is_refused_unless_the_pipeline_is_elastic():
    roster = waiting((1,))
    join(roster, b"1", hello(0))
    assert "all 1 places are taken" in join(roster, b"2", hello(0)).reason
    roster = waiting((1,), elastic=True)
    join(roster, b"1", hello(0))
    assert join(roster, b"2", hello(0)).slot == (0, 1)
    refused = join(roster, b"3", hello()).reason
    assert "no node is wanted for any stage" in refused
    assert "started with --stage N it would get a place of its own" in refused


def test_a_node_that_keeps_asking_is_known_until_it_gets_a_place_or_stays_away():
    roster = waiting((1,))
    first = serve(roster, join(roster, b"1", hello(0)))
    spare = hello(0, host="spare")
    times = (0, 30 * SECOND, 60 * SECOND, 200 * SECOND)
    refusals = [roster.join(b"%d" % at, spare, at, is_open=True) for at in times]
    assert [(refusal.fate, refusal.again) for refusal in refusals] == [
        ("rejoin", False),
        ("rejoin", True),
        ("rejoin", True),
        ("rejoin", False),
    ]
    roster.lose(first, "is gone", 201 * SECOND)
    assert roster.join(b"5", spare, 201 * SECOND, is_open=True).slot == (0, 0)
    assert not roster.join(b"6", spare, 202 * SECOND, is_open=True).again


def test_a_node_that_wants_a_stage_the_plan_has_not_is_refused_for_good():
    refusal = join(waiting((1, 1)), b"1", hello(7))
    assert refusal.fate == "refused"
    assert "wants stage 7, and the plan has the stages 0 to 1" in refusal.reason


def test_the_place_of_a_node_that_came_by_itself_goes_with_it():
    roster = waiting((1,), elastic=True)
    first = serve(roster, join(roster, b"1", hello(0)))
    second = serve(roster, join(roster, b"2", hello(0)))
    roster.lose(second, "is gone", 0)
    assert list(roster.nodes) == [(0, 0)]
    roster.lose(first, "is gone", 0)
    assert [node.phase for node in roster.nodes.values()] == [Phase.STARTED], "one there is to be: it is waited for"


def test_a_node_that_leaves_is_replaced_only_as_far_as_there_are_to_be_some():
    roster = waiting((1,), elastic=True)
    first = serve(roster, join(roster, b"1", hello(0)))
    second = serve(roster, join(roster, b"2", hello(0)))
    roster.leave(first)
    assert roster.replace(first, 0) == []
    assert list(roster.nodes) == [(0, 1)]
    roster.leave(second)
    assert [start.slot for start in roster.replace(second, 0)] == [(0, 1)]


def test_requests_on_their_way_to_a_stage_whose_nodes_all_leave_go_to_the_last_of_them():
    roster = waiting((2,))
    first, second = (serve(roster, join(roster, name, hello(0))) for name in (b"1", b"2"))
    takes = []
    for node in (second, first):
        roster.leave(node)
        takes.append([peer.number for peer in roster.peers(None, everyone=False) if peer.takes])
    assert takes == [[first.number], [first.number]], "the other may have been told to end"


def test_states_of_a_lost_process_are_not_those_of_its_place():
    roster = waiting((1,))
    node = serve(roster, join(roster, b"1", hello(0)))
    node.sequences, node.state_bytes = 3, 4000
    roster.lose(node, "was killed", SECOND)
    assert roster.nodes[0, 0] is node
    assert (node.sequences, node.state_bytes) == (0, 0)


def test_a_node_that_was_told_to_end_needs_no_links():
    roster = waiting((1, 1))
    first, second = (serve(roster, join(roster, b"%d" % stage, hello(stage))) for stage in (0, 1))
    roster.leave(first)
    assert roster.linked == {0, first.number, second.number}, "it still has work, which must get on"
    first.released = True
    assert roster.linked == {0, second.number}
    assert roster.lose(first, "has left", SECOND) == []
    assert not roster.incidents


def test_a_process_waits_for_a_number_while_nodes_that_leave_have_all():
    roster = waiting((2,), process_numbers=3)
    nodes = [serve(roster, join(roster, b"%d" % number, hello(0))) for number in range(2)]
    _, (leaves,) = roster.scale(0, 1, 0)
    roster.leave(leaves)
    started, _ = roster.scale(0, 2, 0)
    assert started == []
    assert roster.due(SECOND // 2) == []
    roster.lose(leaves, "has left", SECOND)
    assert [start.number for start in roster.due(2 * SECOND)] == [leaves.number]
    assert nodes[0].phase is Phase.READY


def test_a_new_node_does_not_get_the_slot_of_one_that_still_works():
    roster = waiting((2,))
    nodes = [serve(roster, join(roster, b"%d" % number, hello(0))) for number in range(2)]
    roster.scale(0, 1, 0)
    roster.leave(nodes[1])
    started, _ = roster.scale(0, 2, 0)
    assert [start.slot for start in started] == [(0, 2)]


def test_a_node_that_the_caller_asks_for_is_not_given_up():
    roster = waiting((1,))
    serve(roster, join(roster, b"1", hello(0)))
    roster.scale(0, 2, 0, tentative=True)
    roster.scale(0, 2, 0)
    roster.lose(roster.nodes[0, 1], "was killed", SECOND)
    assert list(roster.nodes) == [(0, 0), (0, 1)]
    roster.scale(0, 3, SECOND, tentative=True)
    roster.lose(roster.nodes[0, 2], "was killed", SECOND)
    assert list(roster.nodes) == [(0, 0), (0, 1)]
