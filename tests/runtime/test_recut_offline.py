"""Processes that work for a running pipeline: their priority, and that none works without end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import build
import pytest

from onnxsplit.planning.planner import partition
from runtime.background import make_as_nice_as_this, may_return
from runtime.errors import RecutFailed
from runtime.recut import offline


@pytest.fixture
def plans(tmp_path):
    model = build.save(build.chain(), tmp_path)
    found = [tmp_path / name for name in ("early.plan", "late.plan")]
    for plan, cut in zip(found, ("h0", "h3"), strict=True):
        partition(model, out=plan, cut_at=[cut], costs="analytic")
    return found


def test_two_plans_are_compared_without_any_file(plans, monkeypatch):
    def none_free(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", none_free)
    assert offline.why_not_same(*plans, lambda: False) is None


def test_what_a_process_says_before_it_fails_is_the_reason(plans):
    (plans[1] / "stage0.onnx").write_bytes(b"")
    with pytest.raises(RecutFailed, match=r"was changed or is incomplete.*stage0.onnx"):
        offline.why_not_same(*plans, lambda: False)


def test_a_process_that_takes_too_long_is_killed(plans, monkeypatch):
    monkeypatch.setattr(offline, "_MOST_S", 0.0)
    with pytest.raises(RecutFailed, match="the process for compare had not ended after 0 minutes, and was killed"):
        offline.why_not_same(*plans, lambda: False)


def test_a_process_is_killed_when_its_work_is_not_wanted(plans):
    with pytest.raises(RecutFailed, match="the pipeline is closing"):
        offline.why_not_same(*plans, lambda: True)


def test_a_process_that_goes_on_becomes_as_nice_as_this(plans, monkeypatch):
    raised = []
    monkeypatch.setattr(offline, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(offline, "make_as_nice_as_this", raised.append)
    assert offline.why_not_same(*plans, lambda: False) is None
    assert len(raised) == 1, "once"


@pytest.mark.skipif(not may_return(), reason="this user may not raise the priority of a process")
def test_all_threads_become_as_nice_as_this():
    program = "import threading, sys; e = threading.Event(); [threading.Thread(target=e.wait, daemon=True).start() "
    program += "for _ in range(3)]; print('up', flush=True); sys.stdin.read()"
    command = ["nice", "-n", "10", sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        threads = [int(entry.name) for entry in Path(f"/proc/{process.pid}/task").iterdir()]
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads] == [min(19, own + 10)] * 4
        make_as_nice_as_this(process.pid)
        assert [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads] == [own] * 4
        process.stdin.close()
    make_as_nice_as_this(process.pid)  # it has ended, which is no error
