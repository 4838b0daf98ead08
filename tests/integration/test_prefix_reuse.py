"""Sequences whose texts begin alike, on real processes: what is computed once, and what is the same without reuse."""

from __future__ import annotations

import os
import signal

import pytest
from decoder_plans import cut, describe
from decoder_runs import FAMILIES
from text_plans import text_plan

from runtime.pipeline import Pipeline

PROMPT = [7 + place * 13 % 300 for place in range(100)]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return text_plan(tmp_path_factory.mktemp("folder") / "plan")


def launch(plan, **options):
    return Pipeline.launch(plan, threads=1, prefill_chunk=16, cache_bytes="64M", **{"max_rows": 4, **options})


def steps(pipeline):
    """The number of steps that the first stage has run."""
    return sum(node.requests for node in pipeline.stats() if node.stage == 0)


def texts(pipeline, prompts, **options):
    generations = [
        pipeline.generate(prompt, max_tokens=8, stop_tokens=(), seed=place, **options)
        for place, prompt in enumerate(prompts)
    ]
    return [generation.result(timeout=60) for generation in generations]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_prompt_of_several_sequences_is_computed_once_and_gives_the_same_tokens(plan, temperature):
    options = {"temperature": temperature, "repetition_penalty": 1.3, "logprobs": 0}
    with launch(plan, prefix_reuse=False) as pipeline:
        alone = texts(pipeline, [PROMPT] * 4, **options)
        assert pipeline.sequences.reused_tokens == 0
        assert steps(pipeline) >= 4 * 7
    with launch(plan) as pipeline:
        shared = texts(pipeline, [PROMPT] * 4, **options)
        assert pipeline.sequences.reused_tokens == 3 * 96
        assert pipeline.sequences.replays == 0
        assert steps(pipeline) <= 7 + 3 + 4 * 7
    assert [one.tokens for one in shared] == [one.tokens for one in alone]
    assert [one.logprobs for one in shared] == [one.logprobs for one in alone]
    assert [one.usage.cached for one in shared] == [0, 96, 96, 96]


def test_the_next_turn_of_a_conversation_takes_over_the_last_one(plan):
    with launch(plan, max_rows=1) as pipeline:
        (first,) = texts(pipeline, [PROMPT])
        again = [*PROMPT, *first.tokens, *PROMPT[:20]]
        (second,) = texts(pipeline, [again])
        assert second.usage.cached == 96
        assert pipeline.sequences.kept == 1
    with launch(plan, prefix_reuse=False) as pipeline:
        assert texts(pipeline, [again])[0].tokens == second.tokens


def test_kept_slots_make_room_for_other_prompts(plan):
    with launch(plan, max_rows=2) as pipeline:
        for first in range(8):
            texts(pipeline, [[first, *PROMPT]])
            assert pipeline.sequences.kept <= 2
        assert pipeline.sequences.reused_tokens == 0
        assert pipeline.sequences.replays == 0


def test_a_donor_that_is_cancelled_leaves_the_others_with_the_right_tokens(plan):
    with launch(plan) as pipeline:
        (expected,) = texts(pipeline, [PROMPT])
    with launch(plan) as pipeline:
        generations = [pipeline.generate(PROMPT, max_tokens=8, stop_tokens=(), seed=0) for _ in range(4)]
        generations[0].cancel()
        assert [g.result(timeout=60).tokens for g in generations[1:]] == [expected.tokens] * 3
        assert pipeline.sequences.replays == 0


@pytest.mark.parametrize("stage", [0, 1])
def test_sequences_that_share_a_prompt_survive_the_loss_of_a_node(plan, stage):
    with launch(plan) as pipeline:
        (expected,) = texts(pipeline, [PROMPT])
        generations = [pipeline.generate(PROMPT, max_tokens=60, stop_tokens=()) for _ in range(4)]
        next(generations[3])
        (node,) = [node for node in pipeline.nodes if node.stage == stage]
        os.kill(node.pid, signal.SIGKILL)
        found = [generation.result(timeout=120).tokens for generation in generations]
        assert all(tokens[:8] == expected.tokens for tokens in found)
        assert found == [found[0]] * 4
        assert pipeline.sequences.replays > 0


def test_sequences_of_two_chains_compute_their_prompt_at_most_once_a_chain(plan):
    with launch(plan, replicas=2, max_rows=8) as pipeline:
        found = texts(pipeline, [PROMPT] * 6)
        assert pipeline.sequences.reused_tokens >= 4 * 96
        assert len({one.tokens for one in found}) == 1


@pytest.mark.parametrize("rows", ["left", "holes"])
def test_states_that_are_appended_to_are_shared_too(tmp_path, rows):
    model = FAMILIES["plain"].make(seed=3)
    described = describe("plain", model, kind="append", rows=rows, chunk="rows", length=128)
    folder = tmp_path / "plan"
    plan = cut(model, described, folder)
    (folder / "plan.json").write_bytes(plan.to_json())
    prompt = [place * 7 % 50 for place in range(60)]
    found = []
    for reuse in (False, True):
        with launch(folder, prefix_reuse=reuse) as pipeline:
            found.append([one.tokens for one in texts(pipeline, [prompt] * 3)])
            assert pipeline.sequences.reused_tokens == (2 * 48 if reuse else 0)
            assert pipeline.sequences.replays == 0
            assert pipeline.sequences.kept == (3 if reuse and rows == "holes" else 0)
    assert found[0] == found[1]
