"""Moves unanswered requests from the nodes of one plan to those of another plan of the same model."""

from __future__ import annotations

from collections.abc import Collection

from runtime.coordinator.answers import Answer
from runtime.coordinator.pending import unsendable
from runtime.coordinator.request_io import RequestIO


def move_requests(source: RequestIO, target: RequestIO, outputs: Collection[str]) -> int:
    """Let one coordinator answer what another one has not answered; returns the number of requests.

    What had been done for them is dropped, so that all outputs of a request come from one attempt. Sequences stay where
    their states are.

    Args:
        source: where the requests are. Nobody may submit requests to it any more.
        target: where they are sent.
        outputs: the outputs of the model. Requests for other tensors stay.
    """
    moved = source.take_out(outputs)
    for request in moved:
        try:
            target.submit(request.inputs, request.wanted, request.cost, request.deadline_ns, request.done)
        except Exception as error:
            request.done(Answer({}, unsendable(error)))
    return len(moved)
