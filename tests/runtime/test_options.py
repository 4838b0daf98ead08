"""Options of a run: defaults from the plan, and permitted values."""

from __future__ import annotations

import msgspec.structs
import numpy as np
import pytest
from sequence_driver import decoder_plan

from onnxsplit.errors import InputError, PlanError
from onnxsplit.plan_files import load_plan
from runtime.balance.replicas import ReplicaRange
from runtime.launching import limits_of
from runtime.options import RunOptions, check_scale, enough_inflight
from runtime.timings import Timings, timings


def test_long_links_keep_more_requests_in_flight(chain_plan):
    plan = load_plan(chain_plan)

    def inflight(latency_ms: float, bottleneck_ms: float, replicas=(1, 1), batches: int = 1) -> int:
        predicted = msgspec.structs.replace(
            plan.prediction, latency_ns=int(latency_ms * 1e6), bottleneck_ns=int(bottleneck_ms * 1e6)
        )
        return enough_inflight(msgspec.structs.replace(plan, prediction=predicted), replicas, batches=batches)

    assert inflight(20, 10) == 4, "two a node"
    assert inflight(20, 10, (2, 3)) == 10
    assert inflight(4, 2) == 10, "more where stages are short"
    assert inflight(0.2, 0.1) == 16, "at most eight a node"
    assert inflight(0.2, 0.1, batches=100) == 4, "unless requests are joined, and then take longer"
    assert inflight(200, 10) == 30, "half as many again as the 20 that are under way"
    assert inflight(1e6, 0.001) == 1024, "but never without end"


def test_timings_are_changed_by_name_and_wrong_ones_named():
    assert timings({}) == Timings()
    assert timings({"silence_s": 2.5, "circuit_failures": 3.0}) == Timings(silence_s=2.5, circuit_failures=3)
    with pytest.raises(InputError, match=r"timing 'silence' is unknown; allowed: .*silence_s"):
        timings({"silence": 1.0})
    with pytest.raises(InputError, match=r"silence_s must be a number above 0 and at most .*, not -1"):
        timings({"silence_s": -1.0})


NUMBERS = [
    *("threads", "inflight", "inflight_bytes", "attempts", "micro_batch", "start_timeout"),
    *("max_rows", "max_length", "prefill_chunk", "decode_groups"),
]


@pytest.mark.parametrize(
    "value", [-1, 2**70, pytest.param(10**5_000, id="5000 digits"), float("nan"), float("inf"), True, "2"]
)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_makes_no_sense_is_named_with_what_is_allowed(name, value):
    with pytest.raises(InputError, match=f"{name} must be a "):
        RunOptions(**{name: value}).check()


@pytest.mark.parametrize("value", [0, -1, 256, 10**6, 2**70, 1.5, True, "2", {0: 0}, {1: 10**6}, {0: True}])
def test_replicas_that_no_stage_can_have_are_refused(chain_plan, value):
    with pytest.raises(InputError, match=r"replicas of stage \d must be a whole number, at least 1 and at most 255"):
        RunOptions(replicas=value).counts(load_plan(chain_plan))


def between(least, most) -> ReplicaRange:
    return ReplicaRange(least=least, most=most)


def test_a_range_of_replicas_begins_with_the_fewest(chain_plan):
    plan = load_plan(chain_plan)
    options = RunOptions(replicas={1: between(1, np.int64(4))})
    options.check()
    assert options.ranges(plan) == (between(1, 1), between(1, 4))
    assert (options.counts(plan), options.most_counts(plan)) == ((1, 1), (1, 4))
    assert RunOptions(replicas=between(2, 3)).ranges(plan) == (between(2, 3), between(2, 3))
    with pytest.raises(InputError, match="256 replicas together"):
        RunOptions(replicas=between(1, 128)).ranges(plan)


@pytest.mark.parametrize("ends", [(0, 4), (4, 1), (1, 256), ("1", 4), (1, None), (True, 4), (1.0, 2)])
def test_a_range_of_replicas_that_makes_no_sense_is_refused(chain_plan, ends):
    with pytest.raises(InputError, match=r"replicas of stage 0 have the range \S+ to \S+; a range begins at 1 or more"):
        RunOptions(replicas=between(*ends)).ranges(load_plan(chain_plan))


def test_a_stage_with_a_range_is_scaled_within_it():
    ranges = (between(1, 4), between(2, 2))
    check_scale(ranges, (1, 2), 0, 4)
    check_scale(ranges, (1, 2), 1, 7)
    with pytest.raises(InputError, match="stage 0 needs from 1 to 4 replicas, not 5"):
        check_scale(ranges, (1, 2), 0, 5)


def test_stages_are_not_scaled_beyond_what_a_pipeline_can_have():
    ranges = (between(1, 1), between(1, 1), between(1, 4))
    check_scale(ranges, (200, 51, 1), 1, 51)
    with pytest.raises(InputError, match="the stages have 256 replicas together; at most 255 nodes make a pipeline"):
        check_scale(ranges, (200, 51, 1), 1, 52)


@pytest.mark.parametrize("name", ["scale_up_after", "scale_down_after"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), None, "2", 3601])
def test_times_of_scaling_that_make_no_sense_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name} must be a number"):
        RunOptions(**{name: value}).check()


def test_all_nodes_together_fit_into_one_pipeline(chain_plan):
    plan = load_plan(chain_plan)
    with pytest.raises(InputError, match="256 replicas together; at most 255 nodes make a pipeline"):
        RunOptions(replicas=128).counts(plan)
    assert RunOptions(replicas={0: 128}).counts(plan) == (128, 1)
    with pytest.raises(PlanError, match="replicas for stage 2"):
        RunOptions(replicas={2: 1}).counts(plan)
    with pytest.raises(PlanError, match="replicas for stage True"):
        RunOptions(replicas={True: 2}).counts(plan)


def test_integers_of_numpy_will_do(chain_plan):
    options = RunOptions(replicas=np.int32(2), threads=np.int64(1), inflight=np.uint8(3), start_timeout=np.float32(5))
    options.check()
    assert [type(value) for value in options.counts(load_plan(chain_plan))] == [int, int]
    assert type(options.threads) is int


@pytest.mark.parametrize("changes", [{"silence_s": float("nan")}, {"circuit_failures": 0}, {"beat_s": float("inf")}])
def test_timings_that_make_no_sense_are_refused_however_they_come(changes):
    with pytest.raises(InputError, match="the timing"):
        RunOptions(timings=Timings(**changes)).check()
    with pytest.raises(InputError, match="the timing"):
        timings({"circuit_failures": 0.4})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shared_memory": "no"}, "shared_memory must be True or False, not 'no'"),
        ({"share_weights": "text"}, "share_weights must be True, False or None"),
        ({"timings": None}, "timings must be"),
        ({"abandoned": 5}, "abandoned must be a function"),
        ({"mode": "m" * 10**7}, "mode 'mmm"),
        ({"balance": "b" * 10**7}, "balance 'bbb"),
    ],
)
def test_options_of_wrong_kinds_are_named_in_few_words(options, words):
    with pytest.raises(InputError, match=words) as caught:
        RunOptions(**options).check()
    assert len(str(caught.value)) < 1000


def test_room_for_caches_is_a_number_or_a_text():
    assert RunOptions(cache_bytes="2.5K").cache_bytes == 2560
    assert RunOptions(cache_bytes=np.int64(7)).cache_bytes == 7
    RunOptions(cache_bytes="1G").check()
    with pytest.raises(InputError, match="cache_bytes '2X' is not a size; write 512M"):
        RunOptions(cache_bytes="2X").check()
    with pytest.raises(InputError, match="cache_bytes must be a whole number, at least 1"):
        RunOptions(cache_bytes=0).check()


def limits(plan, **options):
    return limits_of(plan, RunOptions(**options))


def test_sequences_are_as_long_as_the_model_and_the_caches_allow(tmp_path):
    plan = decoder_plan(tmp_path, token_bytes=10, max_length=1000)
    assert limits(plan).length == 1000
    assert limits(plan, max_length=100).length == 100
    assert limits(plan, cache_bytes=5_000).length == 500, "as many as fit"
    with pytest.raises(InputError, match="max_length is 1001, but sequences of this model have at most 1000 tokens"):
        limits(plan, max_length=1001)
    with pytest.raises(InputError, match="cache_bytes is 5000, but a sequence of 600 tokens takes up to 6000 bytes"):
        limits(plan, cache_bytes=5_000, max_length=600)
    with pytest.raises(InputError, match="cache_bytes is 10, but"):
        limits(plan, cache_bytes=10)


def test_a_plan_without_a_decoder_has_no_limits_of_sequences(chain_plan):
    assert limits(load_plan(chain_plan), max_length=5) is None


def test_rows_chunks_and_groups_are_as_asked_for(tmp_path):
    found = limits(decoder_plan(tmp_path), max_rows=6, prefill_chunk=32, decode_groups=3)
    assert (found.rows, found.chunk, found.groups) == (6, 32, 3)
    usual = limits(decoder_plan(tmp_path))
    assert (usual.rows, usual.chunk, usual.groups) == (16, 128, 2)
