"""The handle of a generation gives every token once, to threads and event loops, and ends as it should."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from onnxsplit.errors import InputError
from onnxsplit.plan_decoder import Decoder
from runtime.coordinator.token_stream import TokenStream
from runtime.errors import Cancelled, NodeFailed, PipelineError
from runtime.requests.generate_options import GenerateOptions, normal_max_tokens, normal_prompt, normal_sampling
from runtime.requests.generation import Generation, Usage
from runtime.wire.messages.sequences import Drawn, Sampling

DECODER = Decoder(
    states=(),
    controls=(),
    scores="logits",
    vocabulary=100,
    tokens_below=90,
    rows="right",
    chunk="one-row",
    rollback=True,
    max_length=64,
    end_tokens=(2, 3),
)


class FakeRequestIO:
    """A stand-in that remembers what was given up, and ends the stream as the machine would."""

    def __init__(self) -> None:
        self.inbox = SimpleNamespace(pid=os.getpid(), check_process=lambda: None)
        self.delivering = False
        self.stream = TokenStream()
        self.given_up: list[int] = []
        self.later: list[int] = []

    def give_up(self, number: int) -> None:
        self.given_up.append(number)
        self.fail(Cancelled("the caller gave the request up"))

    def give_up_later(self, number: int) -> None:
        self.later.append(number)

    def emit(self, *tokens: int, scores=None) -> None:
        for token in tokens:
            place = len(self.stream.drawn)
            self.stream.add(Drawn(7, 1, place, token, -0.5, ((token, -0.5), (1, -2.0))), scores, place)
            self.stream.wake()

    def finish(self, reason="stop") -> None:
        self.stream.finish(reason)
        self.stream.wake()

    def fail(self, error) -> None:
        self.stream.fail(error)
        self.stream.wake()


def begun(*, has_logprobs=False, has_scores=False) -> tuple[FakeRequestIO, Generation]:
    requests = FakeRequestIO()
    generation = Generation(
        requests,
        requests.stream,
        7,
        4,
        max_tokens=100,
        sampling=Sampling(seed=11, logprobs=2 if has_logprobs else -1),
        has_scores=has_scores,
        submitted_ns=0,
    )
    return requests, generation


def read_in_thread(generation) -> tuple[threading.Thread, list[object]]:
    """Read a generation in a thread; the list gets its tokens, and the error that ends it."""
    read: list[object] = []

    def work() -> None:
        try:
            read.extend(generation)
        except PipelineError as error:
            read.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, read


def test_an_iterator_gives_each_token_as_it_comes_and_ends():
    requests, generation = begun()
    requests.emit(5, 6)
    assert [next(generation), next(generation)] == [5, 6]
    thread, read = read_in_thread(generation)
    for token in range(10, 40):
        requests.emit(token)
    requests.finish()
    thread.join(10)
    assert read == list(range(10, 40))
    with pytest.raises(StopIteration):
        next(generation)


def test_a_slow_reader_and_a_late_one_lose_nothing():
    requests, generation = begun()
    requests.emit(*range(50))
    requests.finish("length")
    assert list(generation) == list(range(50))
    assert generation.result().tokens == tuple(range(50))


def test_the_result_holds_tokens_reason_and_counts():
    requests, generation = begun(has_logprobs=True, has_scores=True)
    requests.emit(9, scores=np.ones(3))
    requests.finish("stop")
    result = generation.result(1)
    assert (result.tokens, result.reason, result.usage, result.seed) == ((9,), "stop", Usage(4, 1), 11)
    assert result.logprobs is not None
    assert result.logprobs[0].top == ((9, -0.5), (1, -2.0))
    assert result.scores is not None
    assert result.scores[0].tolist() == [1, 1, 1]
    assert result.times_ns == (0,)


def test_what_was_not_asked_for_is_none():
    requests, generation = begun()
    requests.emit(9)
    requests.finish()
    assert (generation.result().logprobs, generation.result().scores, generation.logprobs) == (None, None, None)


def test_an_error_comes_after_the_tokens_that_were_drawn():
    requests, generation = begun()
    requests.emit(5)
    requests.fail(NodeFailed("stage 1 died"))
    assert next(generation) == 5
    with pytest.raises(NodeFailed, match="stage 1 died"):
        next(generation)
    with pytest.raises(NodeFailed):
        generation.result()
    assert generation.tokens == (5,)


def test_cancelling_ends_a_reader_that_waits():
    requests, generation = begun()
    thread, read = read_in_thread(generation)
    assert generation.cancel()
    thread.join(10)
    assert isinstance(read[0], Cancelled)
    assert requests.given_up == [7]
    assert not generation.cancel(), "it has ended"


def test_a_closed_iterator_ends_without_an_error():
    requests, generation = begun()
    requests.emit(5, 6, 7)
    with generation:
        assert next(generation) == 5
    assert list(generation) == []
    assert requests.given_up == [7]


def test_a_dropped_generation_is_given_up_without_a_lock():
    requests, generation = begun()
    requests.emit(5)
    del generation
    gc.collect()
    assert (requests.later, requests.given_up) == ([7], [])


def test_a_finished_generation_is_not_given_up_when_it_is_dropped():
    requests, generation = begun()
    requests.finish()
    del generation
    gc.collect()
    assert requests.later == []


def test_a_result_that_does_not_come_in_time_says_how_far_it_is():
    requests, generation = begun()
    requests.emit(5)
    with pytest.raises(TimeoutError, match="it has 1 tokens so far, and it continues"):
        generation.result(0.01)
    assert requests.stream._waiting == [], "nothing is kept for a reader that has gone"
    requests.finish()
    assert generation.result(0.01).tokens == (5,)


@pytest.mark.parametrize("timeout", [1e30, float("inf")])
def test_a_result_is_waited_for_however_long_the_time_is(timeout):
    requests, generation = begun()
    results = []
    thread = threading.Thread(target=lambda: results.append(generation.result(timeout)))
    thread.start()
    requests.emit(5)
    requests.finish()
    thread.join(10)
    assert [result.tokens for result in results] == [(5,)]


def test_a_callback_of_the_pipeline_may_not_wait_for_tokens():
    requests, generation = begun()
    requests.delivering = True
    with pytest.raises(PipelineError, match="cannot wait for tokens"):
        next(generation)
    requests.emit(5)
    requests.finish()
    assert list(generation) == [5], "what is there can be read"


def test_an_event_loop_reads_while_another_thread_adds():
    requests, generation = begun()

    async def read() -> tuple[list[int], tuple[int, ...]]:
        adding = asyncio.get_running_loop().run_in_executor(None, add)
        tokens = [token async for token in generation]
        await adding
        return tokens, (await generation).tokens

    def add() -> None:
        for token in range(30):
            requests.emit(token)
        requests.finish()

    assert asyncio.run(read()) == (list(range(30)), tuple(range(30)))


def test_who_waits_for_the_end_is_not_woken_by_tokens():
    requests, generation = begun()
    woken: list[str] = []
    requests.stream.when_more(1, lambda: woken.append("second token"))
    requests.stream.when_more(1000, lambda: woken.append("end"))
    requests.emit(5)
    assert woken == []
    requests.emit(6, 7)
    assert woken == ["second token"]
    requests.finish()
    assert woken == ["second token", "end"]
    assert list(generation) == [5, 6, 7]


def test_a_cancelled_task_leaves_the_generation_as_it_is():
    requests, generation = begun()

    async def wait_in_vain() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(generation), 0.01)
        assert requests.stream._waiting == []
        requests.emit(5)
        assert await anext(generation) == 5

    asyncio.run(wait_in_vain())
    requests.finish()
    assert list(generation) == []


def test_tokens_are_lists_or_arrays_of_whole_numbers():
    for tokens in ([1, 2, 3], (1, 2, 3), np.array([1, 2, 3]), np.array([1, 2, 3], np.uint8), range(1, 4)):
        prompt = normal_prompt(tokens, DECODER, 64)
        assert prompt == (1, 2, 3)
        assert {type(token) for token in prompt} == {int}
    assert normal_prompt([np.int64(4)], DECODER, 64) == (4,)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "tokens is empty"),
        ([1, 90], "tokens holds 90 at place 1; tokens of this model are whole numbers from 0 to 89"),
        ([-1], "tokens holds -1 at place 0"),
        ([1.0], r"tokens holds 1\.0 at place 0"),
        ([True], "tokens holds True"),
        ([10**400], "tokens holds"),
        ("abc", "tokens must be a list of token numbers"),
        (b"abc", "tokens must be a list of token numbers"),
        (5, "tokens must be a list of token numbers"),
        ({7, 5}, "tokens must be a list of token numbers, in their order, but it is {5, 7}"),
        (np.ones((2, 2), np.int64), "tokens holds"),
        (np.array(5), "tokens"),
        (None, "tokens must be a list"),
        ([1] * 64, "the prompt has 64 tokens, but this pipeline has room for sequences of 64 tokens"),
    ],
)
def test_tokens_that_make_no_sense_are_named(tokens, message):
    with pytest.raises(InputError, match=message):
        normal_prompt(tokens, DECODER, 64)


def test_without_a_number_the_text_goes_on_to_the_end_of_the_context():
    assert normal_max_tokens(None, 10, 64) == 54
    assert normal_max_tokens(np.int32(54), 10, 64) == 54


@pytest.mark.parametrize("most", [0, -1, 55, 1.5, True, "2"])
def test_a_number_of_tokens_that_does_not_fit_is_named_with_all_numbers(most):
    with pytest.raises(InputError, match=r"at most 54, not .*sequences have at most 64 tokens, and the prompt has 10"):
        normal_max_tokens(most, 10, 64)


def test_options_become_what_nodes_are_told():
    options = GenerateOptions(
        temperature=np.float32(0.5), top_k=5, logit_bias={7: 1}, stop_tokens=[9], logprobs=2, seed=np.int64(3)
    )
    sampling = normal_sampling(options, DECODER, 10, 99)
    assert sampling == Sampling(temperature=0.5, top_k=5, bias=((7, 1.0),), end_tokens=(9,), logprobs=2, seed=3)
    plain = normal_sampling(GenerateOptions(), DECODER, 10, 99)
    assert plain == Sampling(end_tokens=(2, 3), seed=99)
    assert normal_sampling(GenerateOptions(stop_tokens=()), DECODER, 10, 0).end_tokens == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be a number from 0 to 1000000000, not -1"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"temperature": True}, "temperature must be a number"),
        ({"top_k": -1}, "top_k must be a whole number"),
        ({"top_p": 1.1}, "top_p must be a number from 0 to 1, not 1.1"),
        ({"min_p": "a"}, "min_p must be a number from 0 to 1, not 'a'"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number from 1e-09"),
        ({"presence_penalty": None}, "presence_penalty must be a number"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty must be a number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"logprobs": 65}, "logprobs must be a whole number, at least 0 and at most 64, not 65"),
        ({"min_tokens": 11}, "min_tokens must be a whole number, at least 0 and at most 10, not 11"),
        ({"stop_tokens": range(90), "min_tokens": 1}, "all 90 tokens are stop_tokens, so none can come before min_tok"),
        ({"scores": 1}, "scores must be True or False, not 1"),
        ({"stop_tokens": [90]}, "stop_tokens holds 90 at place 0"),
        ({"stop_tokens": 2}, "stop_tokens must be a list"),
        ({"stop_tokens": range(5000)}, "stop_tokens"),
        ({"logit_bias": [1]}, "logit_bias must map tokens to numbers"),
        ({"logit_bias": {90: 1.0}}, "logit_bias holds 90"),
        ({"logit_bias": {1: "a"}}, "logit_bias of token 1 must be a number"),
        ({"top_k": -1, "seed": -2}, r"top_k must be .*; seed must be"),
    ],
)
def test_options_that_make_no_sense_are_named(options, message):
    with pytest.raises(InputError, match=message):
        normal_sampling(GenerateOptions(**options), DECODER, 10, 0)
