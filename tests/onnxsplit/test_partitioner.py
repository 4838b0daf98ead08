"""Every algorithm is judged by the same score, against all partitions of small graphs."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsplit.partitioner import (
    CALLER,
    Infeasible,
    Problem,
    Transfer,
    Weight,
    fewest_stages,
    lower_bound,
    score,
    slice_orders,
)


@st.composite
def problems(draw, chain: bool = False):
    count = draw(st.integers(1, 7))
    times = draw(st.lists(st.integers(0, 30), min_size=count, max_size=count))
    transfers = []
    for writer in range(CALLER, count - 1):
        if chain:
            readers = (writer + 1,)
        else:
            readers = tuple(sorted(draw(st.sets(st.integers(writer + 1, count - 1), min_size=1, max_size=3))))
        transfers.append(Transfer(writer, readers, draw(st.integers(0, 10)), writer >= 0 and draw(st.booleans())))
    return Problem(tuple(times), tuple(transfers))


def partitions(problem: Problem, stages: int):
    for assignment in product(range(stages), repeat=len(problem.time_ns)):
        flows = (f for f in problem.transfers if f.writer != CALLER)
        if set(assignment) == set(range(stages)) and all(
            assignment[f.writer] <= assignment[r] for f in flows for r in f.readers
        ):
            yield assignment


@settings(deadline=None)
@given(problems(), st.integers(1, 3))
def test_slices_are_a_partition_and_the_bound_holds(problem, stages):
    stages = min(stages, len(problem.time_ns))
    found = slice_orders(problem, stages)
    assert found in set(partitions(problem, stages))
    best = min(score(problem, a).bottleneck_ns for a in partitions(problem, stages))
    assert score(problem, found).bottleneck_ns >= best >= lower_bound(problem.time_ns, stages)


@settings(deadline=None)
@given(problems(chain=True), st.integers(1, 4))
def test_a_chain_is_cut_as_well_as_it_can_be(problem, stages):
    stages = min(stages, len(problem.time_ns))
    best = min(score(problem, a).bottleneck_ns for a in partitions(problem, stages))
    assert score(problem, slice_orders(problem, stages)).bottleneck_ns == best


def test_a_tensor_is_paid_once_per_stage_by_both_ends():
    problem = Problem((10, 10, 10, 10), (Transfer(0, (1, 2, 3), 5),))
    assert score(problem, (0, 1, 1, 2)).transfer_ns == (10, 5, 5)


def test_latency_is_the_longest_path():
    problem = Problem((10, 30, 20, 10), (Transfer(0, (1, 2), 1), Transfer(1, (3,), 1), Transfer(2, (3,), 1)))
    assert score(problem, (0, 1, 2, 3)).latency_ns == (10 + 2) + (30 + 2) + (10 + 2)


def test_a_long_order_is_grouped_and_still_balanced():
    problem = Problem((7,) * 6000, tuple(Transfer(i, (i + 1,), 0) for i in range(5999)))
    found = score(problem, slice_orders(problem, 4))
    assert found.bottleneck_ns <= 1.01 * lower_bound(problem.time_ns, 4)


def test_more_stages_than_atoms_is_an_error():
    with pytest.raises(ValueError, match="cannot make 3 stages"):
        slice_orders(Problem((1, 1), ()), 3)


def heavy(limit: int) -> Problem:
    """Four atoms of 10 bytes each, the first and the last sharing 5 more."""
    weights = (*(Weight(10, (atom,)) for atom in range(4)), Weight(5, (0, 3)))
    return Problem((1, 1, 1, 1), tuple(Transfer(i, (i + 1,), 0) for i in range(3)), weights, (), limit)


@pytest.mark.parametrize(("limit", "stages"), [(45, 1), (44, 2), (25, 2), (24, 3), (15, 4)])
def test_the_fewest_stages_that_fit(limit, stages):
    assert fewest_stages(heavy(limit)) == stages
    assert max(slice_orders(heavy(limit), stages)) == stages - 1


def test_a_limit_that_one_atom_breaks_is_infeasible():
    with pytest.raises(Infeasible):
        fewest_stages(heavy(14))
    with pytest.raises(Infeasible):
        slice_orders(heavy(14), 4)


def test_memory_comes_before_balance():
    problem = Problem(
        (1, 1, 1, 97), tuple(Transfer(i, (i + 1,), 0) for i in range(3)), (Weight(9, (0,)), Weight(9, (1,))), (), 9
    )
    assert slice_orders(problem, 2) in {(0, 1, 1, 1)}
