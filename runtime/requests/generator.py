"""Checks the arguments of a generation, and starts it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Unpack

from onnxsplit.errors import InputError
from onnxsplit.plan import Plan
from onnxsplit.tensors import Array
from runtime.coordinator.loop import Coordinator
from runtime.coordinator.token_stream import TokenStream
from runtime.errors import Busy
from runtime.guided.guide import check_grammar
from runtime.requests.generate_options import (
    MOST_SEED,
    GenerateArguments,
    GenerateOptions,
    normal_max_tokens,
    normal_prompt,
    normal_sampling,
)
from runtime.requests.generation import Generation
from runtime.requests.normalize import normal_timeout_ns
from runtime.topology import StepGraph


class Generator:
    """Starts the generations of one pipeline.

    Args:
        coordinator: runs the nodes.
        plan: the plan that they run.
        check_open: raises an error when the pipeline cannot be used any more.
    """

    def __init__(self, coordinator: Coordinator, plan: Plan, check_open: Callable[[], None]) -> None:
        self._coordinator = coordinator
        self._plan = plan
        self._check_open = check_open

    def __call__(
        self,
        tokens: Sequence[int] | Array,
        *,
        timeout: float | None = None,
        block: bool = True,
        **options: Unpack[GenerateArguments],
    ) -> Generation:
        """Start a generation; see :meth:`~runtime.pipeline.Pipeline.generate`."""
        self._check_open()
        wanted = GenerateOptions.of(options)
        begun = time.monotonic_ns()
        coordinator, decoder = self._coordinator, self._plan.decoder
        limits, requests = coordinator.limits, coordinator.requests
        if decoder is None or limits is None:
            raise InputError(
                "the plan has no decoder, so it cannot generate tokens. onnxsplit partition finds decoders by itself "
                "and says why a model is none; --decoder FILE.toml describes one by hand"
            )
        limit = normal_timeout_ns(timeout)
        prompt = normal_prompt(tokens, decoder, limits.length)
        most = normal_max_tokens(wanted.max_tokens, len(prompt), limits.length)
        sampling = normal_sampling(wanted, decoder, most, secrets.randbelow(MOST_SEED))
        if sampling.grammar:
            check_grammar(sampling.grammar)
            if why := coordinator.why_unguided(StepGraph(self._plan).tail):
                raise InputError(f"this pipeline cannot make a text match a grammar. {why}")
        deadline = None if limit is None else begun + limit
        stream = TokenStream()
        number = requests.generate(
            stream, prompt, most, sampling, scores=wanted.scores, wait=block, deadline_ns=deadline
        )
        if isinstance(stream.error, InputError | Busy):
            raise stream.error
        return Generation(
            requests,
            stream,
            number,
            len(prompt),
            max_tokens=most,
            sampling=sampling,
            has_scores=wanted.scores,
            submitted_ns=begun,
        )
