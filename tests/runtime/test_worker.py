"""What a node keeps account of."""

from __future__ import annotations

from runtime.messages import CALLER, Fragment
from runtime.worker import Worker


def test_a_fragment_that_is_written_off_counts_as_done():
    worker = Worker(0)
    fragment = Fragment(1, 1, 1, 700, 0, 3, CALLER, (0,), ("y",), (), ())
    worker.write_off(fragment)
    worker.write_off(fragment)
    assert worker.payloads.board.done(3) == 1400
    worker.close()
