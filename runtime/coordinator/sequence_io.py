"""Sends the steps of sequences to the nodes, and passes tokens to the streams of their callers.

A step crosses the pipeline as one small fragment without tensors, and comes back as one. Between the two, only
:class:`~runtime.coordinator.state.CoordinatorState` decides. The next step is sent before the callers of this one are
told of their tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import numpy as np

from onnxsplit.errors import OnnxsplitError
from onnxsplit.plan import CALLER, Plan
from onnxsplit.tensors import Array
from runtime.coordinator.answers import AnswerQueue
from runtime.coordinator.data_links import DataLinks
from runtime.coordinator.sequence_events import Emit, EnterStep, Finish
from runtime.coordinator.token_stream import TokenStream
from runtime.logs import log_event
from runtime.memory.outgoing import Attempt, Outgoing
from runtime.topology import StepGraph
from runtime.trace import RequestTrace
from runtime.wire.messages.data import Fragment

_log = logging.getLogger("runtime.coordinator")
_NOTHING = Outgoing()


class SequenceIO:
    """The sequences of one coordinator. Callers of its methods hold the lock of the requests.

    Args:
        plan: the plan that the nodes execute.
        links: the data links to the nodes.
        answers: delivers what streams have to tell their readers.
        traced: where to record the steps with the stages that they pass; None to record none.

    Attributes:
        streams: the stream of each sequence that has not ended, by number.
        tokens: the number of tokens that callers have got.
        now_ns: when the step that is being handled came back, by the host's monotonic clock.
    """

    def __init__(self, plan: Plan, links: DataLinks, answers: AnswerQueue, traced: list[RequestTrace] | None) -> None:
        self.streams: dict[int, TokenStream] = {}
        self.tokens = 0
        self.now_ns = 0
        self._sender = links.sender
        self._answers = answers
        self._traced = traced
        self._sent_ns: dict[int, int] = {}  # for each step that is to be recorded
        self._entrances: list[tuple[int, tuple[str, ...]]] = []
        self._wanted: tuple[str, ...] = ()
        self._scores: Mapping[int, Array] = {}
        if plan.decoder is not None:
            graph = StepGraph(plan)
            self._entrances = [(stage, ()) for stage in graph.stages if CALLER in graph.sources[stage]]
            self._wanted = (plan.decoder.scores,)

    def send(self, step: EnterStep) -> None:
        """Send a step to the stages that begin it."""
        attempt = Attempt(
            request=step.step,
            attempt=1,
            view=step.view,
            cost=step.cost,
            budget_ns=0,
            route=step.route,
            wanted=self._wanted if step.scores else (),
            rows=step.rows,
        )
        if self._traced is not None:
            self._sent_ns[step.step] = time.monotonic_ns()
        readers = self._sender.readers(self._entrances, attempt, _NOTHING)
        self._sender.send(readers, attempt, _NOTHING, CALLER, keep=True)

    def scores_of(self, fragment: Fragment, tensors: Mapping[str, Array]) -> dict[int, Array]:
        """The scores that a step has brought, copied, by sequence; empty where nobody asked for them."""
        if not self._wanted or (scores := tensors.get(self._wanted[0])) is None:
            return {}
        last = scores[:, -1] if scores.ndim == 3 else scores
        return {row.sequence: np.array(last[place]) for place, row in enumerate(fragment.rows) if row.draw}

    def end_step(self, fragment: Fragment, now_ns: int, scores: Mapping[int, Array]) -> None:
        """Note that a step came back, and its scores, which :meth:`emit` adds to the tokens."""
        self.now_ns = now_ns
        self._scores = scores
        if self._traced is not None and (sent_ns := self._sent_ns.pop(fragment.request, None)) is not None:
            self._traced.append(RequestTrace(fragment.request, sent_ns, fragment.history, now_ns))

    def emit(self, effect: Emit) -> None:
        """Give a sequence its next token."""
        self.tokens += 1
        stream = self.streams[effect.sequence]
        stream.cached = effect.cached
        stream.add(effect.drawn, self._scores.get(effect.sequence), self.now_ns)
        self._answers.wake(stream.wake)

    def finish(self, effect: Finish) -> None:
        """End a sequence after its last token."""
        stream = self.streams.pop(effect.sequence)
        stream.finish(effect.reason)
        self._answers.wake(stream.wake)

    def reject(self, sequence: int, error: OnnxsplitError) -> None:
        """End a sequence with an error."""
        log_event(_log, logging.INFO, "sequence failed", sequence=sequence, error=type(error).__name__, reason=error)
        stream = self.streams.pop(sequence)
        stream.fail(error)
        self._answers.wake(stream.wake)

    def fail_all(self, reason: OnnxsplitError) -> None:
        """End all sequences with an error."""
        for stream in self.streams.values():
            stream.fail(reason)
            self._answers.wake(stream.wake)
        self.streams.clear()
