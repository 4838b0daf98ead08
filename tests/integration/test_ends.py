"""Every ending leaves no process, socket or shared memory, and tells the caller the reason."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from processes import running
from waiting import wait_until

from runtime import Pipeline

GIVEN = {"x": np.ones((1, 32), np.float32)}

CALLER = """
import sys, time
import numpy as np
from runtime import Pipeline
with Pipeline.launch(sys.argv[1]) as pipeline:
    print(*(node.pid for node in pipeline.nodes), flush=True)
    while True:
        pipeline.run({"x": np.ones((1, 32), np.float32)})
        if "fail" in sys.argv:
            raise KeyError("the caller's own")
"""


def start_caller(plan, environment, *words: str):
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", CALLER, str(plan), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_a_caller_ended_by_a_signal_leaves_nothing(chain_plan, python_environment, number):
    process, pids = start_caller(chain_plan, python_environment)
    assert len(pids) == 2
    process.send_signal(number)
    wait_until(lambda: not running(pids), "the end of the nodes")
    process.communicate(timeout=60)


def test_a_caller_that_raises_leaves_nothing(chain_plan, python_environment):
    process, pids = start_caller(chain_plan, python_environment, "fail")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the caller's own" in errors
    wait_until(lambda: not running(pids), "the end of the nodes")


def test_a_node_stopped_for_good_does_not_hold_up_closing(chain_plan):
    pipeline = Pipeline.launch(chain_plan)
    pids = [node.pid for node in pipeline.nodes]
    os.kill(pids[0], signal.SIGSTOP)
    pipeline.close()
    wait_until(lambda: not running(pids), "the end of the nodes")


def test_ctrl_c_in_the_terminal_ends_the_command_and_its_nodes(chain_plan, python_environment):
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "onnxsplit", "run", str(chain_plan), "--repeat", "1000000"],
        env=python_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    parent = psutil.Process(process.pid)
    wait_until(lambda: len(parent.children()) == 2)
    nodes = [child.pid for child in parent.children()]
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().endswith("onnxsplit: interrupted")
    wait_until(lambda: not running(nodes), "the end of the nodes")


def test_nodes_never_get_ctrl_c_not_even_while_they_start(chain_plan):
    with Pipeline.launch(chain_plan) as pipeline:
        for node in pipeline.nodes:
            blocked = re.search(r"SigBlk:\s*([0-9a-f]+)", Path(f"/proc/{node.pid}/status").read_text())[1]
            assert int(blocked, 16) >> (signal.SIGINT - 1) & 1, "it was started with the signal blocked"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "the caller still gets it"
