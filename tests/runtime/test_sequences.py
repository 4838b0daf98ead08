"""The sequences of the coordinator's state machine, rule by rule."""

from __future__ import annotations

import pytest
from sequence_driver import Driver, next_token

from onnxsplit.errors import InputError
from runtime.coordinator.events import (
    CloseAsked,
    DrainAsked,
    Drained,
    Expired,
    Forget,
    GivenUp,
    LeaveWanted,
    LinksSeen,
    Reported,
    Scaled,
    SendAway,
    Tick,
    Unsendable,
)
from runtime.coordinator.sequence_events import Emit, EnterStep, Finish, SequenceSubmitted, StepReturned
from runtime.errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    NodeFailed,
    PipelineClosed,
    PipelineError,
    StageFailed,
    StageUnavailable,
)
from runtime.wire.messages.data import Failed, Step, Visit
from runtime.wire.messages.sequences import Drawn, Reuse, Sampling

SECOND = 1_000_000_000


def of(effects, kind):
    return [effect for effect in effects if isinstance(effect, kind)]


def released(effects):
    """The nodes that were told to end because they have no more work."""
    return [away.identity for away in of(effects, SendAway) if away.fate == "end"]


def slots(step):
    return [row.slot for row in step.rows]


# Steps


def test_a_sequence_is_read_decoded_token_by_token_and_ended(tmp_path):
    driver = Driver(tmp_path)
    number = driver.submit(prompt=3, max_tokens=4)
    (step,) = driver.steps.values()
    (row,) = step.rows
    assert (row.epoch, row.start, row.tokens, row.draw) == (1, 0, tuple(driver.tokens[number]), True)
    assert row.opening.prompt == 3
    driver.run(1)
    (step,) = driver.steps.values()
    assert (step.rows[0].start, step.rows[0].tokens) == (3, tuple(driver.tokens[number][3:]))
    driver.run()
    assert driver.ends == {number: "length"}
    assert len(driver.tokens[number]) == 7
    driver.check_end()


def test_a_sequence_ends_with_its_end_token_and_nodes_forget_it(tmp_path):
    driver = Driver(tmp_path)
    first = next_token([0, 1, 2])
    number = driver.submit(prompt=3, max_tokens=9, end_tokens=(next_token([0, 1, 2, first]),))
    driver.run(1)
    effects = driver.come(min(driver.steps))
    assert [type(effect) for effect in effects] == [Emit, Finish, Forget]
    assert effects[2] == Forget(number, 1, (b"n1", b"n2"))
    assert driver.ends == {number: "stop"}
    driver.check_end()


def test_steps_have_numbers_of_the_common_count_and_costs_by_their_tokens(tmp_path):
    driver = Driver(tmp_path, decoder={"cost_rows": 4}, prefill_chunk=8)
    driver.submit(prompt=10)
    first, second = driver.steps.values()
    assert (first.step, second.step) == (1, 2)
    assert (first.cost, second.cost) == (8 * 250, 2 * 250)
    assert first.route == (1, 2)
    assert driver.machine.work.oldest == 0
    assert driver.machine.work.in_flight == ((1, 1), (2, 1))
    driver.run()
    assert driver.machine.work.oldest == driver.machine.numbers.following


def test_scores_are_asked_for_only_where_a_caller_wants_them(tmp_path):
    driver = Driver(tmp_path, decode_groups=1, prefill_chunk=2)
    driver.submit(prompt=3, scores=True)
    driver.submit(prompt=1)
    assert [step.scores for step in driver.steps.values()] == [False, True, False]
    driver.run(3)
    assert [(len(step.rows), step.scores) for step in driver.steps.values()] == [(1, True)]
    driver.run(1)
    assert [(len(step.rows), step.scores) for step in driver.steps.values()] == [(2, True)]


def test_prompts_are_read_in_parts_all_in_flight_while_nobody_decodes(tmp_path):
    driver = Driver(tmp_path, prefill_chunk=10)
    number = driver.submit(prompt=45)
    assert [(s.rows[0].start, len(s.rows[0].tokens), s.rows[0].draw) for s in driver.steps.values()] == [
        (0, 10, False),
        (10, 10, False),
        (20, 10, False),
    ], "one more than stages"
    driver.run(2)
    assert [(s.rows[0].start, s.rows[0].draw) for s in driver.steps.values()] == [
        (20, False),
        (30, False),
        (40, True),
    ]
    driver.run()
    assert driver.ends == {number: "length"}
    driver.check_end()


def test_one_part_of_a_prompt_is_in_flight_while_anybody_decodes(tmp_path):
    driver = Driver(tmp_path, prefill_chunk=10)
    other = driver.submit(max_tokens=50)
    driver.run(1)
    driver.submit(prompt=45)
    for _ in range(6):
        reading = [step for step in driver.steps.values() if len(step.rows[0].tokens) > 1]
        assert len(reading) <= 1
        driver.run(1)
    assert len(driver.tokens[other]) > 4
    driver.run()
    driver.check_end()


def test_short_prompts_are_read_together_while_they_have_no_more_tokens_than_a_part(tmp_path):
    driver = Driver(tmp_path, prefill_chunk=10)
    driver.submit(max_tokens=50)
    driver.run(1)
    for _ in range(4):
        driver.submit(prompt=4)
    assert [len(step.rows[0].tokens) for step in driver.steps.values()] == [1, 4, 4]
    driver.run()
    driver.check_end()


def test_replays_are_read_as_fast_as_the_nodes_can(tmp_path):
    driver = Driver(tmp_path, (1, 2), prefill_chunk=10)
    numbers = [driver.submit(prompt=25, max_tokens=50) for _ in range(2)]
    while any(len(driver.tokens[number]) < 30 for number in numbers):
        driver.run(1)
    lost = driver.step_of(numbers[0]).route[1]
    driver.lose(lost)
    assert sum(len(step.rows[0].tokens) > 1 for step in driver.steps.values()) == 3
    driver.run()
    driver.check_end()


def test_a_model_that_reads_a_prompt_in_one_run_gets_it_whole(tmp_path):
    driver = Driver(tmp_path, decoder={"chunk": "none"}, prefill_chunk=10)
    driver.submit(prompt=45)
    (step,) = driver.steps.values()
    assert len(step.rows[0].tokens) == 45
    assert step.rows[0].draw
    driver.run()
    driver.check_end()


def test_sequences_are_spread_over_as_many_groups_as_stages(tmp_path):
    driver = Driver(tmp_path, max_rows=12)
    for _ in range(8):
        driver.submit(max_tokens=30)
    driver.run(40)
    assert sorted(len(rows) for rows in driver.rows()) == [4, 4]
    driver.run()
    driver.check_end()


def test_a_group_that_comes_back_leaves_at_once(tmp_path):
    driver = Driver(tmp_path)
    driver.submit()
    driver.run(1)
    (step,) = driver.steps
    (following,) = of(driver.come(step), EnterStep)
    assert following.rows[0].start == 4


def test_a_hole_is_filled_by_the_last_row_of_the_group(tmp_path):
    driver = Driver(tmp_path, decode_groups=1, max_rows=4)
    first, second, third = (driver.submit(max_tokens=n) for n in (20, 3, 20))
    driver.run(4)
    assert driver.rows() == [[first, second, third]]
    while second not in driver.ends:
        driver.run(1)
    (step,) = driver.steps.values()
    assert [row.sequence for row in step.rows] == [first, third]
    assert slots(step) == [0, 1]
    driver.run()
    driver.check_end()


def test_rows_change_group_only_where_sizes_differ_by_two(tmp_path):
    driver = Driver(tmp_path, decode_groups=2, max_rows=8)
    numbers = [driver.submit(max_tokens=n) for n in (60, 15, 60, 15, 60, 15)]  # every second one in a group
    driver.run(15)
    assert sorted(driver.rows()) == [numbers[0::2], numbers[1::2]]
    while any(number not in driver.ends for number in numbers[1::2]):
        driver.run(1)
    driver.run(4)
    assert sorted(len(rows) for rows in driver.rows()) == [1, 2]
    driver.run()
    driver.check_end()


def test_rows_of_equal_length_run_together_and_the_others_in_turn(tmp_path):
    driver = Driver(tmp_path, decoder={"rows": "equal"}, decode_groups=1)
    short = [driver.submit(prompt=2, max_tokens=20) for _ in range(2)]
    long = driver.submit(prompt=9, max_tokens=20)
    driver.run(6)
    seen = set()
    for _ in range(8):
        ((*rows,),) = driver.rows()
        lengths = {len(driver.tokens[number]) for number in rows}
        assert len(lengths) == 1
        seen.add(tuple(rows))
        driver.run(1)
    assert {number for rows in seen for number in rows} == {*short, long}
    driver.run()
    driver.check_end()


def test_a_model_with_one_row_a_run_steps_its_sequences_in_turn(tmp_path):
    driver = Driver(tmp_path, decoder={"rows": "one"})
    numbers = [driver.submit(max_tokens=20) for _ in range(6)]
    driver.run(30)
    assert all(len(rows) == 1 for rows in driver.rows())
    assert len(driver.rows()) == 3, "one more than stages are in flight"
    before = [len(driver.tokens[number]) for number in numbers]
    driver.run(30)
    assert [len(driver.tokens[number]) - had for number, had in zip(numbers, before, strict=True)] == [5] * 6
    driver.run()
    driver.check_end()


# Tokens


def test_a_token_that_comes_twice_late_or_for_another_position_is_dropped(tmp_path):
    driver = Driver(tmp_path)
    number = driver.submit()
    (step,) = driver.steps.values()
    event = driver.answer(step)
    driver.come(step.step)
    assert not of(driver.do(event), Emit)
    assert not of(driver.do(StepReturned(10**6, (Drawn(number, 1, 4, 1),), (), 0)), Emit)
    driver.run()
    driver.check_end()


@pytest.mark.parametrize("drawn", [[], [(2, 4)], [(1, 9)]])
def test_a_step_that_comes_back_without_the_right_token_is_followed_by_a_replay(tmp_path, drawn):
    driver = Driver(tmp_path)
    number = driver.submit()
    driver.run(1)
    step = driver.steps.pop(min(driver.steps))
    effects = driver.do(StepReturned(step.step, tuple(Drawn(number, *one, 7) for one in drawn), (), 0))
    (again,) = of(effects, EnterStep)
    assert (again.rows[0].epoch, again.rows[0].start) == (2, 0)
    driver.run()
    driver.check_end()


def test_executed_steps_are_counted_for_their_nodes(tmp_path):
    driver = Driver(tmp_path)
    driver.submit(max_tokens=1)
    step = driver.steps.pop(min(driver.steps))
    driver.do(StepReturned(step.step, driver.answer(step).drawn, (Visit(1, 0, 0, 1, 5, 6, 7, 8),), 10))
    assert driver.machine.roster.counters[1, 0].requests == 1
    driver.check_end()


# Room


def test_sequences_wait_for_a_slot_in_the_order_in_which_they_came(tmp_path):
    driver = Driver(tmp_path, max_rows=2, decode_groups=1)
    numbers = [driver.submit(max_tokens=3) for _ in range(5)]
    assert driver.machine.sequences.waiting == 3
    driver.run()
    assert list(driver.ends) == numbers
    driver.check_end()


def test_sequences_wait_for_bytes_and_nobody_overtakes(tmp_path):
    driver = Driver(tmp_path, cache_bytes=1000)  # 100 positions
    first = driver.submit(prompt=40, max_tokens=20)
    large = driver.submit(prompt=50, max_tokens=5)
    small = driver.submit(prompt=5, max_tokens=5)
    assert driver.machine.sequences.waiting == 2
    driver.run()
    assert set(driver.ends) == {first, large, small}
    assert not [row for row in driver.rows() if small in row]
    driver.check_end()


def test_a_caller_who_does_not_wait_is_told_that_there_is_no_room(tmp_path):
    driver = Driver(tmp_path, max_rows=1)
    driver.submit()
    number = driver.submit(wait=False)
    assert isinstance(driver.ends[number], Busy)
    assert "no room for another sequence: 1 run, at most 1" in str(driver.ends[number])
    driver.run()
    driver.check_end()


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "told"),
    [
        (990, 11, "990 tokens and 11 more are 1001 positions; a sequence has at most 1000"),
        (90, 11, "take 1010 bytes of caches at stage 0; a node has 1000"),
    ],
)
def test_a_sequence_that_never_fits_is_refused_with_both_numbers(tmp_path, prompt, max_tokens, told):
    driver = Driver(tmp_path, cache_bytes=1000)
    number = driver.submit(prompt, max_tokens)
    assert isinstance(driver.ends[number], InputError)
    assert told in str(driver.ends[number])
    driver.check_end()


def test_new_sequences_go_to_the_chain_with_most_free_bytes(tmp_path):
    driver = Driver(tmp_path, (1, 2))
    routes = []
    for prompt in (30, 10, 10, 30):
        number = driver.submit(prompt=prompt)
        routes.append(driver.step_of(number).route)
    assert routes == [(1, 2), (1, 3), (1, 3), (1, 3)]
    driver.run()
    driver.check_end()


def test_chains_that_share_a_node_have_slots_of_their_own(tmp_path):
    driver = Driver(tmp_path, (1, 2), max_rows=2, decode_groups=1)
    numbers = [driver.submit(max_tokens=20) for _ in range(4)]
    assert {tuple(slots(driver.step_of(number))) for number in numbers} == {(0,), (1,), (2,), (3,)}
    driver.run()
    driver.check_end()


def test_the_slot_of_a_cancelled_sequence_is_not_given_away_while_a_step_holds_it(tmp_path):
    driver = Driver(tmp_path, decode_groups=1, max_rows=2)
    first, second = driver.submit(max_tokens=20), driver.submit(max_tokens=20)
    driver.run(3)
    assert driver.rows() == [[first, second]]
    driver.do(GivenUp(first))
    third = driver.submit()
    assert driver.rows() == [[first, second]], "its slot is held"
    driver.run(1)
    assert third in {row for rows in driver.rows() for row in rows}
    driver.run()
    driver.check_end()


def test_the_slot_that_a_row_left_is_not_given_away_before_the_step_is_back(tmp_path):
    driver = Driver(tmp_path, decode_groups=1, max_rows=4)
    first, second, third = (driver.submit(max_tokens=n) for n in (20, 3, 20))
    while second not in driver.ends:
        driver.run(1)
    assert driver.rows() == [[first, third]]
    new = driver.submit(max_tokens=20)
    assert slots(driver.step_of(new)) == [3], "its slot was 2"
    driver.run()
    driver.check_end()


# Lost nodes


def test_sequences_of_a_lost_node_are_replayed_with_all_their_tokens(tmp_path):
    driver = Driver(tmp_path, exact_replay=False)
    numbers = [driver.submit(max_tokens=10) for _ in range(3)]
    driver.run(9)
    had = {number: list(driver.tokens[number]) for number in numbers}
    effects = driver.lose(2)
    assert {(f.request, f.attempt, f.identities) for f in of(effects, Forget)} == {(n, 1, (b"n1",)) for n in numbers}
    assert not driver.steps
    driver.arrive()
    first = driver.step_of(numbers[0]).rows[0]
    assert (first.epoch, first.start, list(first.tokens)) == (2, 0, had[numbers[0]])
    assert first.opening.prompt == 3
    driver.run()
    assert set(driver.ends.values()) == {"length"}
    assert driver.machine.sequences.replays == 3
    driver.check_end()


def test_an_exact_replay_repeats_the_parts_of_the_prompt_and_each_step_of_the_text(tmp_path):
    driver = Driver(tmp_path, prefill_chunk=2)
    number = driver.submit(max_tokens=10)
    seen = []
    for epoch in (1, 2):
        while len(driver.tokens[number]) < 3 + 4 * epoch:
            seen += [row for step in driver.steps.values() for row in step.rows]
            driver.run(1)
        if epoch == 1:
            driver.lose(2)
            driver.arrive()
    shapes = [{(row.start, row.tokens) for row in seen if row.epoch == epoch} for epoch in (1, 2)]
    assert shapes[0] < shapes[1]
    assert {(start, len(tokens)) for start, tokens in shapes[1]} == {(0, 2), (2, 1), *((at, 1) for at in range(3, 10))}
    driver.run()
    driver.check_end()


def test_an_answer_of_an_earlier_epoch_is_dropped(tmp_path):
    driver = Driver(tmp_path)
    driver.submit()
    driver.run(1)
    late = driver.answer(next(iter(driver.steps.values())))
    driver.lose(1)
    driver.arrive()
    assert not of(driver.do(late), Emit)
    driver.run()
    driver.check_end()


def test_replayed_sequences_come_before_new_ones(tmp_path):
    driver = Driver(tmp_path, max_rows=2, decode_groups=1)
    old = [driver.submit(max_tokens=9) for _ in range(2)]
    new = [driver.submit(max_tokens=9) for _ in range(2)]
    driver.run(5)
    driver.lose(1)
    driver.arrive()
    assert driver.rows() == [[number] for number in old]
    driver.run()
    assert list(driver.ends) == [*old, *new]
    driver.check_end()


def test_other_chains_go_on_and_take_over(tmp_path):
    driver = Driver(tmp_path, (1, 2))
    first, second = driver.submit(max_tokens=20), driver.submit(max_tokens=20)
    assert driver.step_of(second).route == (1, 3)
    driver.run(4)
    driver.lose(2)
    assert {row for rows in driver.rows() for row in rows} == {first, second}
    assert all(step.route == (1, 3) for step in driver.steps.values())
    driver.run()
    driver.check_end()


def test_a_sequence_is_refused_after_it_has_run_on_as_many_lost_nodes_as_allowed(tmp_path):
    driver = Driver(tmp_path, attempts=2)
    number, other = driver.submit(max_tokens=20), driver.submit(max_tokens=20)
    driver.run(4)
    step = driver.step_of(number)
    driver.lose(1, running=[step.step], reason="was killed")
    driver.arrive()
    assert not driver.ends
    again = next(s for s in driver.steps.values() if s.rows[0].sequence == number)
    driver.lose(2, running=[again.step], reason="ended with exit code 1")
    assert isinstance(driver.ends[number], NodeFailed)
    assert "after it ran on 2 nodes" in str(driver.ends[number])
    assert "was killed" in str(driver.ends[number])
    assert "ended with exit code 1" in str(driver.ends[number])
    assert other not in driver.ends


def test_a_sequence_whose_steps_come_back_without_its_token_is_given_up(tmp_path):
    """Before, it was replayed without end."""
    driver = Driver(tmp_path, attempts=3)
    number = driver.submit(max_tokens=20)
    driver.run(3)
    for _ in range(20):
        if number not in driver.ends:
            driver.do(StepReturned(driver.steps.pop(min(driver.steps)).step, (), (), driver.now_ns))
    assert isinstance(driver.ends[number], NodeFailed)
    assert "its last step came back without its token" in str(driver.ends[number])
    assert not driver.steps


def test_a_sequence_is_acquitted_by_its_next_token(tmp_path):
    driver = Driver(tmp_path, attempts=2)
    number = driver.submit(max_tokens=20)
    for _ in range(5):
        had = len(driver.tokens[number])
        while len(driver.tokens[number]) == had:
            driver.run(1)
        driver.now_ns += 9 * SECOND
        step = driver.step_of(number)
        driver.lose(step.route[0], running=[step.step])
        driver.arrive()
        assert not driver.ends
    driver.run()
    driver.check_end()


def test_rows_of_a_step_that_ran_on_a_lost_node_are_replayed_apart(tmp_path):
    driver = Driver(tmp_path, decode_groups=1)
    numbers = [driver.submit(max_tokens=9) for _ in range(3)]
    driver.run(6)
    (step,) = driver.steps
    driver.lose(1, running=[step])
    driver.arrive()
    assert driver.rows() == [[number] for number in numbers]
    driver.run()
    driver.check_end()


def test_with_one_attempt_nothing_is_replayed(tmp_path):
    driver = Driver(tmp_path, attempts=1)
    number = driver.submit()
    driver.run(1)
    driver.lose(2)
    assert isinstance(driver.ends[number], NodeFailed)
    assert "with one attempt a sequence is not replayed" in str(driver.ends[number])
    driver.check_end()


def test_an_overdue_step_is_given_up_and_its_sequences_are_replayed(tmp_path):
    driver = Driver(tmp_path)
    number = driver.submit()
    driver.run(1)
    driver.now_ns = 20 * SECOND
    assert driver.machine.work.is_overdue(driver.now_ns)
    driver.steps.clear()
    (again,) = of(driver.do(Tick(driver.now_ns)), EnterStep)
    assert (again.rows[0].sequence, again.rows[0].epoch, again.rows[0].start) == (number, 2, 0)
    driver.run()
    driver.check_end()


def test_a_sequence_is_given_twice_the_time_after_each_overdue_step(tmp_path):
    driver = Driver(tmp_path)
    driver.submit()
    for patience_s in (10, 20, 40):
        driver.steps.clear()
        driver.now_ns += patience_s * SECOND
        assert not of(driver.do(Tick(driver.now_ns)), EnterStep)
        driver.now_ns += 1
        assert of(driver.do(Tick(driver.now_ns)), EnterStep)
    driver.run(1)
    driver.steps.clear()
    driver.now_ns += 10 * SECOND + 1
    assert of(driver.do(Tick(driver.now_ns)), EnterStep), "a token has come"
    driver.run()
    driver.check_end()


def test_sequences_leave_a_chain_with_a_dead_link(tmp_path):
    driver = Driver(tmp_path, (1, 2))
    number = driver.submit()
    driver.run(1)
    driver.do(LinksSeen(frozenset({(1, 2)}), SECOND))
    assert driver.step_of(number).route == (1, 3)
    assert driver.step_of(number).rows[0].epoch == 2
    new = driver.submit()
    assert driver.step_of(new).route == (1, 3)
    driver.run()
    driver.check_end()


def test_sequences_wait_while_no_chain_works_and_go_on_when_the_link_does(tmp_path):
    driver = Driver(tmp_path)
    number = driver.submit()
    driver.run(1)
    driver.do(LinksSeen(frozenset({(2, 0)}), SECOND))
    driver.steps.clear()
    assert driver.machine.sequences.waiting == 1
    driver.do(LinksSeen(frozenset(), 2 * SECOND))
    assert driver.step_of(number).rows[0].epoch == 2
    driver.run()
    driver.check_end()


# Failed steps


def failed(step, stage=0):
    return Reported(Failed(step, 1, stage, 0, "bad shapes"))


def test_who_fails_alone_is_refused_and_the_others_go_on(tmp_path):
    driver = Driver(tmp_path, decode_groups=1)
    bad, good = driver.submit(max_tokens=20), driver.submit(max_tokens=20)
    driver.run(3)
    (step,) = driver.steps
    del driver.steps[step]
    driver.do(failed(step, stage=1))
    assert not driver.ends
    assert driver.rows() == [[bad], [good]], "each is replayed without the other"
    first = min(driver.steps)
    del driver.steps[first]
    driver.do(failed(first, stage=1))
    assert isinstance(driver.ends[bad], StageFailed)
    assert "stage 1 (node 1.0" in str(driver.ends[bad])
    assert "bad shapes" in str(driver.ends[bad])
    assert driver.machine.roster.counters[1, 0].failures == 2
    driver.run()
    assert driver.ends[good] == "length"
    driver.check_end()


def test_what_cannot_be_read_and_has_the_number_of_a_sequence_does_not_end_it(tmp_path):
    driver = Driver(tmp_path)
    number = driver.submit()
    driver.do(Unsendable(number, StageFailed("cannot be read"), 1))
    driver.run()
    assert driver.ends == {number: "length"}
    driver.check_end()


def test_who_fails_again_and_again_in_an_exact_replay_is_found(tmp_path):
    driver = Driver(tmp_path, decode_groups=1, exact_replay=True)
    bad, *good = [driver.submit(max_tokens=20) for _ in range(3)]
    failures = 0
    while driver.steps:
        step = driver.steps[min(driver.steps)]
        if any(row.sequence == bad and row.start == 6 for row in step.rows):
            del driver.steps[step.step]
            driver.do(failed(step.step))
            failures += 1
            assert failures < 10
        else:
            driver.come(step.step)
    assert failures == 2
    assert isinstance(driver.ends[bad], StageFailed)
    assert [driver.ends[number] for number in good] == ["length", "length"]
    driver.check_end()


def test_a_failure_of_an_unknown_step_or_stage_is_dropped(tmp_path):
    driver = Driver(tmp_path)
    driver.submit()
    (step,) = driver.steps
    for message in (Failed(99, 1, 0, 0, "x"), Failed(step, 2, 0, 0, "x"), Failed(step, 1, 7, 0, "x")):
        driver.do(Reported(message))
    driver.run()
    driver.check_end()


def test_a_step_that_cannot_be_sent_ends_its_sequences(tmp_path):
    driver = Driver(tmp_path)
    number = driver.submit()
    (step,) = driver.steps
    driver.do(Unsendable(step, PipelineError("no memory")))
    assert str(driver.ends[number]) == "no memory"
    driver.steps.clear()
    driver.check_end()


# Nodes that leave and join


def test_sequences_stay_on_a_leaving_node_until_another_chain_is_ready(tmp_path):
    driver = Driver(tmp_path)
    number = driver.submit(max_tokens=30)
    driver.run(2)
    effects = driver.do(LeaveWanted(b"n2", SECOND))
    assert not of(effects, SendAway)
    driver.run(2)
    assert driver.step_of(number).route == (1, 2)
    effects = driver.arrive()
    assert released(effects) == [b"n2"]
    assert driver.step_of(number).rows[0].epoch == 2
    assert driver.step_of(number).route == (1, 3)
    driver.run()
    driver.check_end()


def test_sequences_of_a_removed_replica_are_replayed_on_the_others_without_blame(tmp_path):
    driver = Driver(tmp_path, (1, 2), attempts=2)
    numbers = [driver.submit(max_tokens=20) for _ in range(4)]
    driver.run(10)
    effects = driver.do(Scaled(1, 1, SECOND))
    assert released(effects) == [b"n3"]
    driver.steps = {step: sent for step, sent in driver.steps.items() if 3 not in sent.route}
    driver.run()
    assert [driver.ends[number] for number in numbers] == ["length"] * 4
    assert driver.machine.sequences.replays == 2
    driver.check_end()


def test_with_one_attempt_a_leaving_node_finishes_its_sequences(tmp_path):
    driver = Driver(tmp_path, (1, 2), attempts=1)
    numbers = [driver.submit(max_tokens=5) for _ in range(2)]
    assert not of(driver.do(Scaled(1, 1, SECOND)), SendAway)
    effects = []
    while driver.steps:
        effects += driver.come(min(driver.steps))
    assert released(effects) == [b"n3"]
    assert [driver.ends[number] for number in numbers] == ["length"] * 2
    driver.check_end()


def test_new_replicas_make_chains_that_new_sequences_use(tmp_path):
    driver = Driver(tmp_path)
    old = driver.submit(prompt=20, max_tokens=20)
    driver.do(Scaled(1, 2, SECOND))
    driver.arrive()
    new = driver.submit(max_tokens=20)
    assert driver.step_of(old).route == (1, 2)
    assert driver.step_of(new).route == (1, 3)
    driver.run()
    driver.check_end()


def test_a_chain_that_waits_for_slots_is_made_when_a_closed_one_ends_its_sequences(tmp_path):
    driver = Driver(tmp_path)
    assert driver.limits.places == 4
    driver.do(Scaled(1, 6, SECOND))
    driver.arrive()
    for _ in range(4):
        driver.submit(max_tokens=3)
    assert {step.route for step in driver.steps.values()} == {(1, 2), (1, 3), (1, 4), (1, 5)}  # all slots of node 1
    driver.do(Scaled(0, 2, SECOND))
    driver.arrive()
    chains = driver.machine.sequences.scheduler.chains
    assert {chain.route for chain in chains if not chain.is_open} == {(1, 3), (1, 5)}
    assert (1, 6) not in {chain.route for chain in chains}
    driver.run()
    assert {chain.route for chain in chains} == {(1, 2), (8, 3), (1, 4), (8, 5), (1, 6), (8, 7)}
    driver.check_end()


# Ends


def test_a_cancelled_sequence_ends_at_once_and_its_room_is_used(tmp_path):
    driver = Driver(tmp_path, max_rows=1)
    first, second = driver.submit(), driver.submit()
    driver.run(1)
    effects = driver.do(GivenUp(first))
    assert isinstance(driver.ends[first], Cancelled)
    assert Forget(first, 1, (b"n1", b"n2")) in effects
    assert [step.rows[0].sequence for step in of(effects, EnterStep)] == [second]
    driver.do(GivenUp(first))
    driver.run()
    driver.check_end()


@pytest.mark.parametrize(
    ("replicas", "told"),
    [((1, 1), "stage 1 (node 1.0, pid 1 on host) had not begun it"), ((1, 2), "stage 1 (nodes 1.0, 1.1)")],
)
def test_a_deadline_that_passes_says_what_the_sequence_waited_for(tmp_path, replicas, told):
    driver = Driver(tmp_path, replicas)
    number = driver.submit(deadline_ns=SECOND)
    driver.run(1)
    (step,) = driver.steps
    assert driver.machine.work.next_deadline_ns == SECOND
    assert driver.machine.work.expired(2 * SECOND) == ((number, (step, 1)),)
    driver.do(Expired(number, {1: Step.DONE}))
    assert isinstance(driver.ends[number], DeadlineExceeded)
    assert "time ran out after 1 tokens" in str(driver.ends[number])
    assert told in str(driver.ends[number])
    driver.steps.clear()
    driver.check_end()


def test_a_deadline_that_passes_in_the_queue_says_that_there_was_no_room(tmp_path):
    driver = Driver(tmp_path, max_rows=1)
    driver.submit(max_tokens=9)
    number = driver.submit(deadline_ns=SECOND)
    assert driver.machine.work.expired(2 * SECOND) == ((number, (0, 0)),)
    driver.do(Expired(number, {}))
    assert "there is no room for another sequence" in str(driver.ends[number])
    driver.run()
    driver.check_end()


def test_sequences_that_wait_for_a_stage_whose_nodes_keep_failing_are_refused(tmp_path):
    driver = Driver(tmp_path)
    number = driver.submit(max_tokens=90)
    for _ in range(3):
        driver.lose(driver.machine.roster.nodes[1, 0].number)
        driver.now_ns += 2 * SECOND
        driver.do(Tick(driver.now_ns))
        driver.arrive()
    assert isinstance(driver.ends[number], StageUnavailable)
    late = driver.submit()
    assert isinstance(driver.ends[late], StageUnavailable)
    driver.check_end()


def test_draining_finishes_sequences_and_takes_no_more(tmp_path):
    driver = Driver(tmp_path)
    number = driver.submit()
    assert not of(driver.do(DrainAsked()), Drained)
    late = driver.submit()
    assert isinstance(driver.ends[late], PipelineClosed)
    effects = []
    while driver.steps:
        effects += driver.come(min(driver.steps))
    assert of(effects, Drained)
    assert driver.ends[number] == "length"
    driver.check_end()


def test_closing_refuses_all_sequences(tmp_path):
    driver = Driver(tmp_path, max_rows=1)
    numbers = [driver.submit() for _ in range(3)]
    driver.do(CloseAsked())
    driver.steps.clear()
    assert all(isinstance(driver.ends[number], PipelineClosed) for number in numbers)
    driver.check_end()


# Texts that begin alike


def test_a_prompt_that_begins_alike_is_read_from_there_on_and_holds_the_slot_of_its_donor(tmp_path):
    driver = Alike(tmp_path, prefill_chunk=10)
    first = driver.submit(prompt=25, max_tokens=9)
    driver.run(2)
    driver.submit(prompt=25, max_tokens=9)
    step = max(driver.steps.values(), key=lambda step: step.step)
    opening = step.rows[0].opening
    assert (step.rows[0].start, opening.reuse, len(opening.reused)) == (20, Reuse(first, 1, 20), 20)
    assert driver.machine.sequences.reused_tokens == 20


def test_a_sequence_whose_donor_is_gone_begins_again_by_itself_and_without_blame(tmp_path):
    driver = Alike(tmp_path, prefill_chunk=10)
    first = driver.submit(prompt=25, max_tokens=9)
    second = driver.submit(prompt=25, max_tokens=9)
    driver.run(1)
    reuses = driver.step_of(second)
    assert reuses.rows[0].opening.reuse is not None
    driver.do(GivenUp(first))
    driver.steps.pop(reuses.step)
    driver.do(Reported(Failed(reuses.step, 1, 0, 0, "sequence 0 is no longer here")))
    rows = [step.rows[0] for step in driver.steps.values() if step.rows[0].sequence == second]
    assert [(row.epoch, row.start) for row in rows] == [(2, 0), (2, 10), (2, 20)]
    assert driver.machine.sequences.replays == 0
    assert second not in driver.ends


def test_a_kept_sequence_makes_nobody_wait_and_nodes_forget_it(tmp_path):
    driver = Alike(tmp_path, prefill_chunk=10, max_rows=1, cache_bytes=400)
    first = driver.submit(prompt=20, max_tokens=2, alike=False)
    driver.run()
    assert driver.machine.work.kept == (first,)
    driver.submit(prompt=20, max_tokens=2, alike=False, wait=False)
    assert (first, 1) in driver.forgotten
    assert len(driver.steps) == 2


def test_sequences_are_kept_in_the_slots_of_all_groups_before_any_is_dropped(tmp_path):
    driver = Alike(tmp_path, prefill_chunk=10, max_rows=4, decode_groups=2)
    numbers = []
    for kept in range(1, 7):
        numbers.append(driver.submit(prompt=20, max_tokens=2, alike=False))
        driver.run()
        assert len(driver.machine.work.kept) == min(kept, 4)
    assert sorted(driver.machine.work.kept) == numbers[2:], "the first ones were dropped first"


def test_a_copy_of_a_kept_sequence_that_is_on_its_way_refuses_nobody(tmp_path):
    driver = Alike(tmp_path, prefill_chunk=10, max_rows=2, decode_groups=1)
    driver.submit(prompt=25, max_tokens=2, alike=False)
    driver.run()
    driver.submit(prompt=45, max_tokens=2)
    driver.run()
    second = driver.submit(prompt=25, max_tokens=9, wait=False)
    (opening,) = [row.opening for step in driver.steps.values() for row in step.rows if row.opening is not None]
    assert opening.reuse is not None
    third = driver.submit(prompt=25, max_tokens=9, alike=False, wait=False)
    fourth = driver.submit(prompt=25, max_tokens=9, alike=False, wait=False)
    assert second not in driver.ends
    assert third not in driver.ends, "there are two rows, and one of them runs"
    assert isinstance(driver.ends[fourth], Busy)
    driver.run()
    assert driver.ends[third] == "length"


class Alike(Driver):
    """A driver whose prompts all begin with the same tokens, unless told otherwise."""

    def submit(self, prompt, max_tokens, *, alike=True, wait=True):
        number = self.machine.numbers.next()
        self.tokens[number] = [place if alike else 100 * number + place for place in range(prompt)]
        self.prompts[number] = prompt
        text = tuple(self.tokens[number])
        self.do(SequenceSubmitted(number, text, max_tokens, Sampling(), False, wait, None, self.now_ns))
        return number

    def check_slots(self, step):
        """Nothing: the driver does not know what rows reuse."""
