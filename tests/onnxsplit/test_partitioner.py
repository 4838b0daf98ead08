"""Every algorithm is compared by the same score with all partitions of small graphs."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsplit.cluster import Link
from onnxsplit.partitioner import (
    NEVER,
    DeviceKind,
    Effort,
    Infeasible,
    Partition,
    Problem,
    Transfer,
    Way,
    Weight,
    fewest_stages,
    line_up,
    score,
    search,
    stage_memory,
)
from onnxsplit.partitioner.contract import contract
from onnxsplit.partitioner.exchange import improve
from onnxsplit.partitioner.mixed_integer import solve
from onnxsplit.partitioner.orders import linear_orders
from onnxsplit.partitioner.paths import PathSearch
from onnxsplit.partitioner.relaxed import Relaxed
from onnxsplit.partitioner.slices import slice_order
from onnxsplit.plan import CALLER

NANOSECOND_A_BYTE = Link(latency_ns=0, bytes_per_s=1_000_000_000)
THOROUGH = Effort(seconds=None)


def alike(times, transfers, devices=3, **more) -> Problem:
    """Return a problem on equal devices; moving a byte takes a nanosecond."""
    limit = more.pop("max_memory_bytes", None)
    settings = {"link": NANOSECOND_A_BYTE, **more}
    return Problem((DeviceKind(tuple(times), limit),), (0,) * devices, tuple(transfers), **settings)


@st.composite
def problems(draw, atoms=7, kinds=1, chain=False, **more):
    count = draw(st.integers(1, atoms))
    moment = st.sampled_from([0, 0, 1, 3, 7, 12, 20, 30])
    rows = [draw(st.lists(moment, min_size=count, max_size=count)) for _ in range(kinds)]
    transfers = []
    for writer in range(CALLER, count):
        readers = () if writer == count - 1 else (writer + 1,)
        if not chain and readers:
            readers = tuple(sorted(draw(st.sets(st.integers(writer + 1, count - 1), max_size=3))))
        to_caller = writer >= 0 and (not readers or draw(st.booleans()))
        if readers or to_caller:
            size = draw(st.integers(0, 10))
            ways = draw(st.sampled_from([(), (), (Way(size // 2, 1),), (Way(size), Way(size // 2, 1), Way(0, 4))]))
            transfers.append(Transfer(writer, readers, size, to_caller, ways if writer >= 0 else ()))
    weights = [Weight(draw(st.integers(0, 40)), (atom,)) for atom in range(count) if draw(st.booleans())]
    if count > 2 and draw(st.booleans()):
        weights.append(Weight(9, (0, count - 1)))
    return Problem(
        tuple(DeviceKind(tuple(row)) for row in rows),
        tuple(draw(st.integers(0, kinds - 1)) for _ in range(3)),
        tuple(transfers),
        weights=tuple(weights),
        link=replace(NANOSECOND_A_BYTE, latency_ns=draw(st.sampled_from([0, 2]))),
        send_once=draw(st.booleans()),
        **more,
    )


def partitions(problem: Problem, stages: int, parallel: str = "model"):
    """Yield every partition into exactly this number of stages, on every choice of devices."""
    devices = range(len(problem.devices))
    if parallel == "model":
        placements = [tuple((d,) for d in chosen) for chosen in permutations(devices, stages)]
    else:
        placements = [
            tuple(tuple(d for d in devices if owner[d] == stage) for stage in range(stages))
            for owner in product(range(-1, stages), repeat=len(devices))
        ]
        placements = [
            p for p in placements if all(p) and all(len({problem.devices[d] for d in stage}) == 1 for stage in p)
        ]
    seen = set()
    placements = [
        p
        for p in placements
        if not ((key := tuple(tuple(problem.devices[d] for d in s) for s in p)) in seen or seen.add(key))
    ]
    for assignment in product(range(stages), repeat=problem.atoms):
        flows = (f for f in problem.transfers if f.writer != CALLER)
        if set(assignment) == set(range(stages)) and all(
            assignment[f.writer] <= assignment[r] for f in flows for r in f.readers
        ):
            for placement in placements:
                yield Partition(assignment, placement)


def best_of(problem: Problem, stages, parallel="model"):
    """Return the smallest value by brute force, or None if nothing is feasible."""
    scores = [score(problem, p) for count in stages for p in partitions(problem, count, parallel)]
    return min((s.value for s in scores if s.feasible), default=None)


def check(problem: Problem, stages: int | None, parallel="model", certain=False):
    """Check that the result is feasible and not below the optimum, and that the bound is not above it."""
    counts = [min(stages, problem.atoms)] if stages else range(1, min(3, problem.atoms) + 1)
    best = best_of(problem, counts, parallel)
    lineup = line_up(problem, counts[0] if stages else None, parallel)
    try:
        found = search(problem, lineup, THOROUGH)
    except Infeasible:
        assert best is None or problem.capped or problem.apart
        return
    assert score(problem, found.partition) == found.score
    assert found.score.feasible
    assert best is not None
    assert found.bound <= best <= found.score.value
    if certain:
        assert found.bound == best == found.score.value


@settings(max_examples=200)
@given(problems(), st.integers(1, 3))
def test_the_bottleneck_is_the_smallest_there_is(problem, stages):
    check(problem, stages, certain=problem.send_once and not any(f.to_caller and f.readers for f in problem.transfers))


@settings(max_examples=60)
@given(problems(kinds=2), st.sampled_from([None, 1, 2, 3]))
def test_devices_of_several_kinds(problem, stages):
    check(problem, stages)


@settings(max_examples=40)
@given(problems(atoms=6, kinds=2), st.sampled_from([None, 1, 2]))
def test_stages_with_replicas(problem, stages):
    check(problem, stages, "hybrid")


@settings(max_examples=60)
@given(problems(atoms=6), st.integers(1, 3), st.integers(20, 120))
def test_memory_is_kept(problem, stages, limit):
    check(replace(problem, kinds=tuple(replace(k, max_memory_bytes=limit) for k in problem.kinds)), stages)


@settings(max_examples=40)
@given(problems(atoms=6, objective="latency"), st.integers(1, 3))
def test_the_latency_is_the_smallest_there_is(problem, stages):
    check(problem, stages, certain=True)


def test_a_tensor_that_is_sent_once_costs_its_dearest_way():
    """The caller gets the tensor as it is, and the next stage gets it converted, which takes longer."""
    converted = Transfer(0, (1,), 0, to_caller=True, ways=(Way(0, 1),))
    check(alike((0, 0), (converted,), send_once=True, objective="latency"), 2, certain=True)


@settings(max_examples=60)
@given(problems(atoms=6, objective="memory"), st.integers(1, 3))
def test_the_largest_need_of_memory(problem, stages):
    check(problem, stages)


@settings(max_examples=60)
@given(problems(), st.integers(2, 3), st.data())
def test_atoms_that_must_be_apart_are(problem, stages, data):
    if problem.atoms < 2:
        return
    pair = tuple(sorted(data.draw(st.sets(st.integers(0, problem.atoms - 1), min_size=2, max_size=2))))
    check(replace(problem, apart=(pair,)), stages)


@settings(max_examples=8)
@given(problems(atoms=10), st.integers(2, 3))
def test_ten_atoms(problem, stages):
    check(problem, stages)


@settings(max_examples=60)
@given(problems(atoms=6), st.integers(1, 3))
def test_each_algorithm_alone(problem, stages):
    stages = min(stages, problem.atoms)
    best = best_of(problem, [stages])
    lineup = line_up(problem, stages)
    sliced = [slice_order(problem, lineup, order) for order, _ in zip(linear_orders(problem), range(4), strict=False)]
    for found in sliced:
        assert score(problem, found).value >= best
        assert score(problem, improve(problem, found)).value in range(best, score(problem, found).value + 1)
    solved = solve(problem, stages, seconds=20)
    assert solved.bound <= best == score(problem, solved.partition).value
    exact = PathSearch(Relaxed(problem, lineup), best).best()
    assert exact is not None
    assert exact.value <= best
    assert PathSearch(Relaxed(problem, lineup), exact.value - 1).best() is None


@settings(max_examples=100)
@given(problems(), st.integers(1, 3))
def test_contraction_keeps_the_optimum_of_at_most_so_many_stages(problem, stages):
    problem = replace(
        problem,
        send_once=True,
        transfers=tuple(replace(f, to_caller=f.to_caller and not f.readers) for f in problem.transfers),
    )
    smaller = contract(problem)
    both = [
        best_of(p, range(1, min(stages, p.atoms) + 1))
        for p in (replace(problem, devices=(0,) * stages), replace(smaller.problem, devices=(0,) * stages))
    ]
    assert both[0] == both[1]


@given(problems(chain=True), st.integers(1, 3))
def test_slicing_a_chain_is_exact(problem, stages):
    stages = min(stages, problem.atoms)
    found = slice_order(problem, line_up(problem, stages), range(problem.atoms))
    assert score(problem, found).value == best_of(problem, [stages])


def test_a_tensor_is_paid_once_per_stage_by_both_ends():
    problem = alike((10, 10, 10, 10), [Transfer(0, (1, 2, 3), 5)])
    partition = Partition((0, 1, 1, 2), ((0,), (1,), (2,)))
    assert score(problem, partition).transfer_ns == (10, 5, 5)
    assert score(replace(problem, send_once=True), partition).transfer_ns == (5, 5, 5)


def test_tensors_beside_the_compute_count_only_when_they_take_longer():
    link = replace(NANOSECOND_A_BYTE, overlapped=True)
    problem = alike((10, 3), [Transfer(0, (1,), 5)], link=link)
    assert score(problem, Partition((0, 1), ((0,), (1,)))).stage_ns == (10, 5)


def test_replicas_share_the_requests_of_a_stage():
    problem = alike((10, 30), [Transfer(0, (1,), 2)], devices=4)
    found = search(problem, line_up(problem, 2, "hybrid"), THOROUGH)
    assert found.partition.devices == ((0,), (1, 2, 3))
    assert found.score.stage_ns == (12, 11)
    assert found.bound == 12
    whole = search(problem, line_up(problem, None, "data"), THOROUGH)
    assert whole.partition == Partition((0, 0), ((0, 1, 2, 3),))
    assert whole.score.value == 10


def test_replicas_of_different_speeds_answer_as_many_as_all_of_them_together():
    kinds = (DeviceKind((4, 6)), DeviceKind((40, 60)))
    problem = replace(alike((4, 6), [Transfer(0, (1,), 2)]), kinds=kinds, devices=(0, 0, 1))
    assert score(problem, Partition((0, 0), ((0, 2),))).stage_ns == (10,)  # 1 / (1/10 + 1/100), rounded up
    assert score(problem, Partition((0, 0), ((0, 1, 2),))).stage_ns == (5,)
    assert score(problem, Partition((0, 1), ((0, 2), (1,)))).stage_ns == (6, 8)  # 1 / (1/6 + 1/42), and 6 + 2


def test_latency_is_the_longest_path():
    flows = [Transfer(0, (1, 2), 1), Transfer(1, (3,), 1), Transfer(2, (3,), 1)]
    problem = alike((10, 30, 20, 10), flows, devices=4)
    assert score(problem, Partition((0, 1, 2, 3), ((0,), (1,), (2,), (3,)))).latency_ns == (10 + 2) + (30 + 2) + (
        10 + 2
    )


def test_branches_run_side_by_side_where_that_makes_a_request_faster():
    flows = [
        Transfer(0, (1, 3), 1),
        Transfer(1, (2,), 1),
        Transfer(2, (5,), 1),
        Transfer(3, (4,), 1),
        Transfer(4, (5,), 1),
    ]
    problem = alike((5, 20, 20, 20, 20, 5), flows, devices=4, objective="latency")
    found = search(problem, line_up(problem, 4), THOROUGH)
    assert found.partition.stage_of in {(0, 1, 1, 2, 2, 3), (0, 2, 2, 1, 1, 3)}


def test_a_slow_device_gets_less():
    flows = [Transfer(i, (i + 1,), 0) for i in range(29)]
    problem = Problem((DeviceKind((10,) * 30), DeviceKind((20,) * 30)), (0, 1), tuple(flows), link=NANOSECOND_A_BYTE)
    found = search(problem, line_up(problem, 2), THOROUGH)
    assert found.score.stage_ns in {(200, 200)}
    assert found.bound == 200


def test_a_device_too_slow_to_help_stays_idle():
    problem = Problem(
        (DeviceKind((10, 10)), DeviceKind((90, 90))), (0, 1), (Transfer(0, (1,), 1),), link=NANOSECOND_A_BYTE
    )
    found = search(problem, line_up(problem, None), THOROUGH)
    assert found.partition == Partition((0, 0), ((0,),))


def test_an_atom_stays_off_a_device_that_may_not_run_it():
    kinds = (DeviceKind((10, NEVER, 10)), DeviceKind((10, 10, NEVER)))
    flows = (Transfer(0, (1,), 1), Transfer(1, (2,), 1))
    found = search(
        Problem(kinds, (0, 0, 1), flows, link=NANOSECOND_A_BYTE), line_up(Problem(kinds, (0, 0, 1), flows), None)
    )
    stage = found.partition.stage_of
    assert found.partition.devices[stage[1]] == (2,)
    assert found.partition.devices[stage[2]] in {(0,), (1,)}


def test_a_slow_link_moves_the_cut():
    flows = (Transfer(0, (1,), 1), Transfer(1, (2,), 90), Transfer(2, (3,), 1))
    slow = Link(latency_ns=0, bytes_per_s=100_000_000)
    problem = alike((10, 40, 40, 40), flows, devices=3)
    near = search(problem, line_up(problem, 2), THOROUGH)
    far = search(replace(problem, links={(0, 1): slow, (1, 2): slow, (0, 2): slow}), line_up(problem, 2), THOROUGH)
    assert near.partition.stage_of == (0, 0, 0, 1)
    assert far.partition.stage_of == (0, 0, 0, 1)
    assert far.score.value == 90 + 10
    problem = replace(problem, links={(0, 1): slow, (0, 2): slow})
    found = search(problem, line_up(problem, 2), THOROUGH)
    assert set(found.partition.devices) == {(1,), (2,)}


def test_a_long_chain_is_cut_with_proof():
    problem = alike((7,) * 6000, [Transfer(i, (i + 1,), 0) for i in range(5999)], devices=4)
    found = search(problem, line_up(problem, 4), THOROUGH)
    assert found.gap == 0


def test_memory_lives_from_writer_to_last_reader():
    flows = [Transfer(CALLER, (0,), 4), Transfer(0, (1, 2), 10), Transfer(1, (2,), 20), Transfer(2, (), 5, True)]
    problem = alike((1, 1, 1), flows, weights=(Weight(100, (0, 2)),), inner_bytes=(0, 3, 0))
    assert stage_memory(problem, (0, 0, 0), 1) == (100 + 35,)
    assert stage_memory(problem, (0, 1, 1), 2) == (100 + 14, 100 + 35)


def heavy(limit: int) -> Problem:
    """Four atoms of 10 bytes each, the first and the last sharing 5 more."""
    weights = (*(Weight(10, (atom,)) for atom in range(4)), Weight(5, (0, 3)))
    return alike((1, 1, 1, 1), [Transfer(i, (i + 1,), 0) for i in range(3)], 4, weights=weights, max_memory_bytes=limit)


@pytest.mark.parametrize(("limit", "stages"), [(45, 1), (44, 2), (25, 2), (24, 3), (15, 4)])
def test_the_fewest_stages_that_fit(limit, stages):
    assert fewest_stages(heavy(limit)) == stages
    found = search(heavy(limit), line_up(heavy(limit), stages))
    assert len(found.partition.devices) == stages


def test_a_limit_that_one_atom_breaks_is_infeasible():
    with pytest.raises(Infeasible):
        fewest_stages(heavy(14))
    with pytest.raises(Infeasible):
        search(heavy(14), line_up(heavy(14), 4))


def test_memory_comes_before_balance():
    weights = (Weight(9, (0,)), Weight(9, (1,)))
    flows = [Transfer(i, (i + 1,), 0) for i in range(3)]
    problem = alike((1, 1, 1, 97), flows, weights=weights, max_memory_bytes=9)
    assert search(problem, line_up(problem, 2)).partition.stage_of == (0, 1, 1, 1)


def test_the_same_search_gives_the_same_partition():
    chain = alike(range(40), [Transfer(i, (i + 1, min(39, i + 5)), i % 7) for i in range(39)], 6)
    assert search(chain, line_up(chain, 6), THOROUGH) == search(chain, line_up(chain, 6), THOROUGH)


def test_progress_tells_best_and_bound():
    told = []
    problem = alike((5, 9, 4, 7), [Transfer(i, (i + 1,), 3) for i in range(3)])
    found = search(problem, line_up(problem, 3), THOROUGH, lambda best, bound: told.append((best, bound)))
    assert told[-1] == (found.score.value, found.bound)
