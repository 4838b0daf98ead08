"""The load that a node publishes."""

from __future__ import annotations

import pytest

from onnxsplit.plan import CALLER
from runtime.node.worker import Worker
from runtime.wire import codec
from runtime.wire.messages.data import Fragment, TensorHead


@pytest.mark.parametrize(
    "head",
    [
        TensorHead("s", "string", (1,), b"\x01\0\0\0\xff"),
        TensorHead("x", "float32", (2,), b"four"),
        TensorHead("x", "float32", (0, 1 << 62), b""),
        TensorHead("x", "complex64", (1,), b"eight bs"),
    ],
)
def test_an_unreadable_fragment_counts_as_done_and_affects_no_other_request(head):
    worker = Worker(0)
    fragment = Fragment(1, 1, 1, 700, 0, 3, CALLER, (0,), ("y",), (head,), ())
    for _ in range(2):
        assert worker.arrival(codec.encode(fragment), []) is None
    assert worker.payloads.board.done(3) == 1400
    worker.close()


@pytest.mark.parametrize("changed", [{"request": 2**63 - 1}, {"sender": 256}, {"cost": 0}, {"route": (2**40,)}])
def test_a_fragment_with_a_number_out_of_bounds_is_refused(changed):
    worker = Worker(0)
    fields = {"request": 1, "sender": 3, "cost": 700, "route": (0,)} | changed
    fragment = Fragment(attempt=1, view=1, budget_ns=0, source=CALLER, wanted=(), tensors=(), history=(), **fields)
    assert worker.arrival(codec.encode(fragment), []) is None
    worker.close()
