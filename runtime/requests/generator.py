"""Checks the arguments of a generation, and starts it."""

from __future__ import annotations

import secrets
import time

from onnxsplit.errors import InputError
from onnxsplit.plan import Plan
from runtime.coordinator.loop import Coordinator
from runtime.coordinator.token_stream import TokenStream
from runtime.errors import Busy
from runtime.guided.guide import check_grammar
from runtime.requests.generate_options import (
    MOST_SEED,
    GenerateOptions,
    normal_max_tokens,
    normal_prompt,
    normal_sampling,
)
from runtime.requests.generation import Generation
from runtime.requests.normalize import normal_timeout_ns
from runtime.topology import StepGraph


def start_generation(
    coordinator: Coordinator,
    plan: Plan,
    tokens: object,
    options: GenerateOptions,
    *,
    timeout: object,
    block: bool,
) -> Generation:
    """Start a generation. Arguments and errors are those of :meth:`~runtime.pipeline.Pipeline.generate`."""
    begun = time.monotonic_ns()
    decoder, limits, requests = plan.decoder, coordinator.limits, coordinator.requests
    if decoder is None or limits is None:
        raise InputError(
            "the plan has no decoder, so it cannot generate tokens. onnxsplit partition finds decoders by itself and "
            "says why a model is none; --decoder FILE.toml describes one by hand"
        )
    limit = normal_timeout_ns(timeout)
    prompt = normal_prompt(tokens, decoder, limits.length)
    most = normal_max_tokens(options.max_tokens, len(prompt), limits.length)
    sampling = normal_sampling(options, decoder, most, secrets.randbelow(MOST_SEED))
    if sampling.grammar:
        check_grammar(sampling.grammar)
        if why := coordinator.why_unguided(StepGraph(plan).tail):
            raise InputError(f"this pipeline cannot make a text match a grammar. {why}")
    deadline = None if limit is None else begun + limit
    stream = TokenStream()
    number = requests.generate(stream, prompt, most, sampling, scores=options.scores, wait=block, deadline_ns=deadline)
    if isinstance(stream.error, InputError | Busy):
        raise stream.error
    return Generation(
        requests,
        stream,
        number,
        len(prompt),
        max_tokens=most,
        sampling=sampling,
        has_scores=options.scores,
        submitted_ns=begun,
    )
