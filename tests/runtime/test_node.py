"""The process that runs a node's state machine."""

from __future__ import annotations

import pytest

from runtime.errors import PipelineError
from runtime.node.options import NodeOptions
from runtime.node.origin import Launched
from runtime.node.process import NodeProcess
from runtime.node.serve import serve


@pytest.mark.parametrize(
    ("advertise", "words"),
    [
        ("x", "expected tcp://HOST:PORT"),
        ("tcp://127.0.0.1:*", "need the port itself"),
        ("tcp://10.0.0.1:5", "there are no keys"),
    ],
)
def test_an_address_that_others_cannot_use_is_refused_at_the_start(advertise, words):
    """Before, such a node waited without end: the coordinator dropped its Hello."""
    with pytest.raises(PipelineError, match=words):
        serve(NodeOptions(connect="tcp://127.0.0.1:1", advertise=advertise))


def test_a_node_that_was_refused_does_not_ask_for_a_place_again(tmp_path, monkeypatch):
    """Before, a node whose key was revoked was also told that it had been taken for dead."""
    node = NodeProcess(NodeOptions(connect="tcp://127.0.0.1:1"), tmp_path, None, Launched())
    ends: list[str] = []
    monkeypatch.setattr(node, "_end_within", lambda _seconds, reason: ends.append(reason))
    node.be_refused("its key was revoked")
    node.rejoin("it was taken for dead")
    assert not node.rejoins
    assert ends == ["its key was revoked"]
