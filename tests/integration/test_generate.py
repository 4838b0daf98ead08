"""Texts are continued by real processes: every token comes once and is the one that plain ONNX Runtime gives."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time

import build
import numpy as np
import psutil
import pytest
from decoder_parts import Size
from decoder_runs import FAMILIES, Family, Reference
from decoders import gqa
from waiting import wait_until

from onnxsplit.errors import InputError
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from runtime import Pipeline
from runtime.errors import Busy, Cancelled, DeadlineExceeded, NodeFailed, PipelineClosed
from runtime.timings import Timings

LONG = Size(context=512)
QUICK = Timings(beat_s=0.2, silence_s=2.0, stall_s=3.0, stall_factor=5)
PROMPTS = [[*[5, 71, 13, 88, 2, 40, 40, 9][: 3 + row % 6], row, 7 * row % 100] for row in range(8)]
TOKENS = 200


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build.save(gqa(LONG), tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def plan(model):
    """A decoder of three layers in two stages."""
    partition(model, stages=2, out=model.parent / "m.plan")
    return model.parent / "m.plan"


@pytest.fixture(scope="module")
def wanted():
    """The most probable tokens after each prompt, by plain ONNX Runtime."""
    family = Family(lambda seed=0: gqa(LONG, seed=seed))
    return [Reference(family).greedy(prompt, TOKENS) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def pipeline(plan):
    with Pipeline.launch(plan, threads=1) as running:
        yield running


def begin_all(pipeline, tokens: int = TOKENS, **options):
    return [pipeline.generate(prompt, max_tokens=tokens, stop_tokens=(), **options) for prompt in PROMPTS]


def whole(pipeline) -> bool:
    return all(node.state == "ready" for node in pipeline.nodes)


def at_rest(pipeline) -> bool:
    """Whether nodes hold the states of kept sequences only."""
    kept = pipeline.sequences.kept
    return all(stats.sequences == kept and (kept > 0) == (stats.state_bytes > 0) for stats in pipeline.stats())


@pytest.mark.parametrize(
    "name",
    [
        *("gqa", "plain", "tensor scatter", "lstm", "mixed"),
        *(
            pytest.param(name, marks=pytest.mark.exhaustive)
            for name in ("gqa, 4 bits", "gqa, local window", "gpt2", "merged", "torch export", "attention 23", "gru")
        ),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("window", "relative bias", "alibi")),
    ],
)
def test_greedy_tokens_are_those_of_plain_onnx_runtime(name, tmp_path):
    family = FAMILIES[name]
    partition(build.save(family.make(), tmp_path), stages=2, out=tmp_path / "m.plan")
    wanted = [Reference(family).greedy(prompt, 24) for prompt in PROMPTS]
    with Pipeline.launch(tmp_path / "m.plan", threads=1) as pipeline:
        generations = begin_all(pipeline, 24)
        assert [list(generation) for generation in generations] == wanted
        wait_until(lambda: at_rest(pipeline))


def test_a_thread_reads_tokens_as_they_come(pipeline, wanted):
    generation = pipeline.generate(PROMPTS[0], max_tokens=20, stop_tokens=())
    assert [next(generation) for _ in range(5)] == wanted[0][:5]
    assert list(generation) == wanted[0][5:20]
    result = generation.result()
    assert (result.tokens, result.reason) == (tuple(wanted[0][:20]), "length")
    assert (result.usage.prompt, result.usage.completion) == (len(PROMPTS[0]), 20)
    assert sorted(result.times_ns) == list(result.times_ns)


def test_an_event_loop_reads_many_texts_at_once(pipeline, wanted):
    async def read(generation) -> list[int]:
        return [token async for token in generation]

    async def read_all():
        return await asyncio.gather(*map(read, begin_all(pipeline, 50)))

    assert asyncio.run(read_all()) == [tokens[:50] for tokens in wanted]


def test_an_event_loop_that_receives_results_itself_reads_texts(plan, wanted):
    async def read_all(pipeline) -> list[tuple[int, ...]]:
        descriptor, take = pipeline.take_in_loop()
        loop = asyncio.get_running_loop()
        loop.add_reader(descriptor, take)
        try:
            return [(await generation).tokens for generation in begin_all(pipeline, 40)]
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)

    with Pipeline.launch(plan, threads=1) as pipeline:
        assert asyncio.run(read_all(pipeline)) == [tuple(tokens[:40]) for tokens in wanted]


def test_an_end_token_ends_the_text_and_is_its_last(pipeline, wanted):
    end = wanted[0][9]
    result = pipeline.generate(np.array(PROMPTS[0]), max_tokens=100, stop_tokens=[end]).result(60)
    first = wanted[0].index(end)
    assert (result.tokens, result.reason) == (tuple(wanted[0][: first + 1]), "stop")
    longer = pipeline.generate(PROMPTS[0], max_tokens=100, stop_tokens=[end], min_tokens=first + 2).result(60)
    assert longer.tokens[: first + 1] != result.tokens


def test_scores_and_probabilities_are_those_of_the_whole_model(pipeline):
    family = Family(lambda seed=0: gqa(LONG, seed=seed))
    reference = Reference(family)
    first = reference.step([PROMPTS[1]])[0, -1]
    result = pipeline.generate(PROMPTS[1], max_tokens=3, stop_tokens=(), logprobs=3, scores=True).result(60)
    assert result.scores is not None
    assert np.abs(result.scores[0] - first).max() <= 1e-5 * np.abs(first).max()
    shifted = first.astype(np.float64) - first.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    assert result.logprobs is not None
    assert result.logprobs[0].logprob == pytest.approx(logprobs.max(), abs=1e-4)
    assert [token for token, _ in result.logprobs[0].top] == list(np.argsort(-logprobs)[:3])
    second = reference.step([[result.tokens[0]]])[0, -1]
    assert np.abs(result.scores[1] - second).max() <= 1e-5 * np.abs(second).max()


def test_a_seed_makes_the_choice_repeatable_in_any_company(pipeline):
    def ask(**options):
        return pipeline.generate(PROMPTS[2], max_tokens=30, temperature=1.5, stop_tokens=(), **options)

    alone = ask(seed=5).result(60)
    with_others = begin_all(pipeline, 60)
    together = ask(seed=5).result(60)
    other = ask(seed=6).result(60)
    assert alone.tokens == together.tokens != other.tokens
    unnamed = ask().result(60)
    assert ask(seed=unnamed.seed).result(60).tokens == unnamed.tokens
    for generation in with_others:
        generation.result(60)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_killed_stage_loses_no_token_and_repeats_none(plan, wanted, stage):
    with Pipeline.launch(plan, threads=1) as pipeline:
        generations = begin_all(pipeline)
        for generation, tokens in zip(generations, wanted, strict=True):
            assert next(generation) == tokens[0]
        os.kill(pipeline.nodes[stage].pid, signal.SIGKILL)
        assert [list(generation) for generation in generations] == [tokens[1:] for tokens in wanted]
        assert len(pipeline.incidents) == 1
        wait_until(lambda: whole(pipeline) and at_rest(pipeline))


def test_a_stopped_stage_is_replaced_and_no_token_is_lost(plan, wanted):
    with Pipeline.launch(plan, threads=1, timings=QUICK) as pipeline:
        generations = begin_all(pipeline)
        next(generations[0])
        os.kill(pipeline.nodes[1].pid, signal.SIGSTOP)
        assert [list(generation.result(60).tokens) for generation in generations] == wanted


def test_with_one_attempt_a_loss_is_an_error_after_the_tokens_so_far(plan, wanted):
    with Pipeline.launch(plan, threads=1, attempts=1) as pipeline:
        generation = pipeline.generate(PROMPTS[0], max_tokens=TOKENS, stop_tokens=())
        read = [next(generation)]
        os.kill(pipeline.nodes[0].pid, signal.SIGKILL)
        with pytest.raises(NodeFailed, match="stage 0"):
            read.extend(generation)
        assert list(generation.tokens) == wanted[0][: len(generation.tokens)]


def test_a_cancelled_text_ends_at_once_and_the_others_go_on(pipeline, wanted):
    generations = begin_all(pipeline)
    next(generations[3])
    assert generations[3].cancel()
    with pytest.raises(Cancelled):
        generations[3].result(60)
    for row in (0, 1, 2, 4, 5, 6, 7):
        assert list(generations[row]) == wanted[row]
    wait_until(lambda: at_rest(pipeline))


def test_an_abandoned_text_leaves_its_place(pipeline):
    for generation in begin_all(pipeline, 400):
        next(generation)
    del generation
    with pipeline.generate(PROMPTS[0], stop_tokens=()) as last:
        next(last)
    wait_until(lambda: at_rest(pipeline))


def test_a_deadline_ends_a_text_with_what_it_was_waiting_for(plan):
    with Pipeline.launch(plan, threads=1) as pipeline:
        os.kill(pipeline.nodes[1].pid, signal.SIGSTOP)
        begun = time.monotonic()
        generation = pipeline.generate(PROMPTS[0], timeout=0.5)
        with pytest.raises(DeadlineExceeded, match="stage 1"):
            generation.result(30)
        assert time.monotonic() - begun >= 0.5
        os.kill(pipeline.nodes[1].pid, signal.SIGCONT)


def test_more_texts_than_rows_wait_their_turn_or_are_refused(plan, wanted):
    with Pipeline.launch(plan, threads=1, max_rows=2) as pipeline:
        generations = begin_all(pipeline)
        with pytest.raises(Busy, match="no room"):
            pipeline.generate(PROMPTS[0], block=False)
        assert [list(generation) for generation in generations] == wanted


def test_draining_ends_all_texts_and_takes_no_more(plan, wanted):
    with Pipeline.launch(plan, threads=1) as pipeline:
        generations = begin_all(pipeline)
        pipeline.drain(60)
        assert all(generation.done for generation in generations)
        assert [list(generation) for generation in generations] == wanted
        with pytest.raises(PipelineClosed):
            pipeline.generate(PROMPTS[0]).result(10)


def test_a_closed_pipeline_ends_its_texts(plan):
    with Pipeline.launch(plan, threads=1) as pipeline:
        generation = pipeline.generate(PROMPTS[0], stop_tokens=())
        next(generation)
    with pytest.raises(PipelineClosed):
        generation.result(10)
    with pytest.raises(PipelineClosed):
        pipeline.generate(PROMPTS[0])


def test_replicas_come_and_go_while_texts_go_on(plan, wanted):
    others = len(psutil.Process().children())
    with Pipeline.launch(plan, threads=1) as pipeline:
        for replicas in (2, 1):
            generations = begin_all(pipeline)
            pipeline.scale(1, replicas)
            more = begin_all(pipeline)
            assert [list(generation) for generation in generations + more] == wanted + wanted
            wait_until(lambda replicas=replicas: len(pipeline.nodes) == 1 + replicas and whole(pipeline))
        assert pipeline.incidents == ()
        wait_until(lambda: len(psutil.Process().children()) == others + 2)


def test_caches_can_still_be_inputs_of_a_request(plan, pipeline):
    loaded = load_plan(plan)
    decoder = loaded.decoder
    assert decoder is not None
    prompt = PROMPTS[0]
    given = {"input_ids": np.array([prompt]), "attention_mask": np.ones((1, len(prompt)), np.int64)}
    given |= {state.past: np.zeros((1, *state.shape[1:]), np.float32) for state in decoder.states}
    family = Family(lambda seed=0: gqa(LONG, seed=seed))
    generation = pipeline.generate(prompt, max_tokens=50, stop_tokens=())
    outputs = pipeline.run(given)
    expected = Reference(family).step([prompt])
    assert np.abs(outputs[decoder.scores] - expected).max() <= 1e-5 * np.abs(expected).max()
    assert len(list(generation)) == 50


def test_memory_is_given_back(pipeline):
    begin_all(pipeline, 30)[0].result(60)
    wait_until(lambda: at_rest(pipeline))
    before = [psutil.Process(node.pid).memory_info().rss for node in pipeline.nodes]
    for _ in range(5):
        for generation in begin_all(pipeline, 60):
            generation.result(60)
    wait_until(lambda: at_rest(pipeline))
    after = [psutil.Process(node.pid).memory_info().rss for node in pipeline.nodes]
    assert all(now - then < 8 << 20 for then, now in zip(before, after, strict=True)), (before, after)


def test_what_does_not_fit_is_named_with_the_numbers(plan, pipeline, chain_plan):
    with pytest.raises(InputError, match=r"the prompt has 512 tokens, but .* sequences of 512 tokens"):
        pipeline.generate([1] * 512)
    with pytest.raises(InputError, match=r"max_tokens must be .*at most 502, not 600"):
        pipeline.generate([1] * 10, max_tokens=600)
    with pytest.raises(InputError, match=r"tokens holds 100 at place 0; .* from 0 to 99"):
        pipeline.generate([100])
    with pytest.raises(InputError, match="stop_tokens holds 100"):
        pipeline.generate([1], stop_tokens=[100])
    with pytest.raises(InputError, match="max_length is 513, but sequences of this model have at most 512"):
        Pipeline.launch(plan, max_length=513)
    with pytest.raises(InputError, match="cache_bytes is 1024, but a sequence of 512 tokens takes"):
        Pipeline.launch(plan, max_length=512, cache_bytes="1K")
    with Pipeline.launch(chain_plan) as other, pytest.raises(InputError, match="the plan has no decoder"):
        other.generate([1])


def test_the_status_counts_texts_and_their_states(pipeline, python_environment):
    before = pipeline.sequences
    generations = begin_all(pipeline, 400)
    for generation in generations:
        next(generation)
    running = pipeline.sequences
    wait_until(lambda: all(stats.sequences > 0 and stats.state_bytes > 0 for stats in pipeline.stats()))
    shown = onnxsplit(python_environment, "status", "--pid", os.getpid(), "--json")
    for generation in generations:
        generation.close()
    assert (running.running, running.waiting) == (8, 0)
    assert running.tokens >= before.tokens + 8
    (found,) = (one for one in json.loads(shown.stdout)["pipelines"] if one["sequences"]["tokens"] > before.tokens)
    names = {"running", "waiting", "tokens", "replays", "steps", "rows", "cache_usage"}
    assert found["sequences"].keys() >= names
    assert 0 < running.cache_usage <= 1
    assert running.rows >= running.steps > before.steps
    wait_until(lambda: at_rest(pipeline) and pipeline.sequences.running == 0)


def onnxsplit(environment, *words, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "onnxsplit", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **options)


def test_the_command_prints_tokens_as_they_come(plan, wanted, python_environment):
    words = ("generate", plan, "--tokens", ",".join(map(str, PROMPTS[0])), "--max-tokens", 10, "--threads", 1)
    shown = onnxsplit(python_environment, *words)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[0] == " ".join(map(str, wanted[0][:10]))
    answer = json.loads(onnxsplit(python_environment, *words, "--json", "--logprobs", 1).stdout)
    assert (answer["tokens"], answer["reason"]) == (wanted[0][:10], "length")
    assert [one["token"] for one in answer["logprobs"]] == wanted[0][:10]


def test_the_command_refuses_what_is_no_token(plan, python_environment):
    shown = onnxsplit(python_environment, "generate", plan, "--tokens", "1,100", "--threads", 1)
    assert shown.returncode == 1
    assert "tokens holds 100 at place 1" in shown.stderr
    for text in ("1,b", "", "1,,2", "1,2,"):
        assert onnxsplit(python_environment, "generate", plan, "--tokens", text).returncode == 2


def test_an_interrupted_command_leaves_nothing(plan, python_environment):
    command = [sys.executable, "-P", "-m", "onnxsplit", "generate", str(plan), "--tokens", "1", "--threads", "1"]
    with subprocess.Popen(command, env=python_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1)
        nodes = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130), "it may just have ended"
        assert b"Traceback" not in process.stderr.read()
    psutil.wait_procs(nodes, 10)
    assert not [node for node in nodes if node.is_running()]


def test_verify_compares_texts_and_bench_measures_them(plan, model, python_environment):
    found = json.loads(onnxsplit(python_environment, "verify", plan, model, "--json").stdout)
    assert found["good"]
    assert found["decoding"]["equal"] == found["decoding"]["steps"] == 64
    assert found["decoding"]["difference"] <= 1e-5
    words = ("bench", plan, "--decode", "2x8", "--context", 16, "--model", model, "--slices", 3, "--threads", 1)
    report = json.loads(onnxsplit(python_environment, *words, "--json").stdout)["bench"]
    assert [row["rate"]["name"] for row in report["rows"]] == ["pipeline", "one session, 1 thread"]
    assert all(row["rate"]["per_s"] > 0 and row["first_ns"] > 0 and row["between_ns"] > 0 for row in report["rows"])
    assert (report["sequences"], report["tokens"], report["context"]) == (2, 8, 16)
