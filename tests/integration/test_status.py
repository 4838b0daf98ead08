"""The status that a running pipeline reports, also to other processes; and a short attack on its links."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from terminal import on_terminal, screen
from waiting import wait_until

from runtime import Pipeline

ROOT = Path(__file__).parents[2]
GIVEN = {"x": np.ones((1, 32), np.float32)}


def onnxsplit(environment, *words) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "onnxsplit", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_status_shows_each_node_and_first_of_all_what_failed_first(chain_plan, python_environment):
    with Pipeline.launch(chain_plan, replicas={1: 2}) as pipeline:
        for _ in range(10):
            pipeline.run(GIVEN)
        os.kill(pipeline.nodes[0].pid, signal.SIGKILL)
        wait_until(lambda: pipeline.incidents and all(node.state == "ready" for node in pipeline.nodes))
        pipeline.run(GIVEN)
        shown = onnxsplit(python_environment, "status", "--pid", str(os.getpid()))
        found = json.loads(onnxsplit(python_environment, "status", "--pid", str(os.getpid()), "--json").stdout)
        nodes = pipeline.nodes
    assert shown.returncode == 0
    first, second = shown.stdout.splitlines()[:2]
    assert first.startswith("first of 1 failures: stage 0 (node 0.0, pid")
    assert "11 requests, 0 in flight" in second
    (one,) = found["pipelines"]
    assert [(n["stage"], n["replica"], n["state"]) for n in one["nodes"]] == [
        (0, 0, "ready"),
        (1, 0, "ready"),
        (1, 1, "ready"),
    ]
    assert [n["restarts"] for n in one["nodes"]] == [1, 0, 0]
    assert {n["pid"] for n in one["nodes"]} == {node.pid for node in nodes}
    assert sum(n["requests"] for n in one["nodes"] if n["stage"] == 1) == 11


SHOW_ONCE = """
import sys
from onnxsplit.cli import main
sys.argv = ["onnxsplit", "status", "--once", "--pid", *sys.argv[1:]]
main()
"""


def test_status_on_a_narrow_terminal_leaves_columns_out_and_says_so(chain_plan, python_environment, tmp_path):
    with Pipeline.launch(chain_plan) as pipeline:
        pipeline.run(GIVEN)
        given = {"columns": 60, "arguments": [os.getpid()]}
        shown = screen(on_terminal(SHOW_ONCE, python_environment, tmp_path, **given))
    assert max(map(len, shown)) <= 60
    (head,) = [line.split() for line in shown if line.startswith("node ") and " state" in line]
    assert {"node", "state", "requests/s"} <= set(head)
    assert [line.split()[0] for line in shown if " ready " in line] == ["0.0", "1.0"]
    assert f"{12 - len(head)} columns are not shown; widen the terminal, or use --json" in shown


def test_status_with_nothing_running_says_what_to_do(python_environment):
    shown = onnxsplit(python_environment, "status", "--pid", "1")
    assert (shown.returncode, "onnxsplit run DIR" in shown.stdout) == (0, True)


def requests_of(environment, pid: int) -> int:
    """Return how many requests the stages of a process's pipelines have run."""
    shown = onnxsplit(environment, "status", "--pid", str(pid), "--json")
    return sum(node["requests"] for one in json.loads(shown.stdout)["pipelines"] for node in one["nodes"])


def test_a_run_that_is_told_to_end_finishes_what_it_has(chain_plan, python_environment):
    command = [sys.executable, "-P", "-m", "onnxsplit", "run", str(chain_plan), "--repeat", "100000000", "--json"]
    process = subprocess.Popen(
        command, env=python_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: requests_of(python_environment, process.pid) > 0)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    found = json.loads(output)
    assert found["requests"] > 0
    assert all(node["failures"] == 0 for node in found["nodes"])


def test_garbage_on_every_link_breaks_nothing(python_environment):
    command = [sys.executable, "benchmarks/faults/garbage.py", "--cases", "5000", "--sent", "1000", "--json"]
    done = subprocess.run(command, env=python_environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])  # after the line of the environment
    assert figures["decoders"]["crashed"] == 0
    assert figures["live"]["alive"] == [True, True]
    assert figures["live"]["wrong or missing answers"] == 0
    assert max(figures["live"]["memory grew by MiB at most (nodes, caller)"]) < 100
