"""The files in docs/deploy: nodes started by ssh, Slurm and systemd, with stand-ins for missing commands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import build
import numpy as np
import ports
import pytest
from waiting import wait_until

from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import run_stages
from runtime import Pipeline
from runtime.home import sweep
from runtime.timings import Timings
from runtime.wire.addresses import reachable
from runtime.wire.keys import create_for

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"
X = {"x": np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)}


@pytest.fixture
def plan(tmp_path):
    partition(build.save(build.chain(8), tmp_path), stages=2, out=tmp_path / "m.plan", costs="analytic")
    return tmp_path / "m.plan"


@pytest.fixture
def commands(tmp_path):
    """A folder, first in PATH, of stand-ins for commands that are not installed."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def add(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)

    add("onnxsplit", f'exec {sys.executable} -P -m onnxsplit "$@"')
    folder_path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return add, folder_path


def end(process: subprocess.Popen) -> None:
    """End a process group like Ctrl-C in its terminal."""
    os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + 60
    with suppress(ProcessLookupError):  # no process of the group is left
        while process.poll() is None or os.killpg(process.pid, 0) is None:
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.05)
    process.wait()
    sweep()  # the next node would remove the folders of killed nodes


def test_nodes_by_ssh_serve_and_come_back(plan, commands, free_port, python_environment):
    add, path = commands
    # drops its options and the host, and runs the rest here
    add("fake-ssh", 'while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done; shift; exec "$@"')
    wanted = run_stages(plan, load_plan(plan), X, threads=1)["y"]
    address = f"tcp://127.0.0.1:{free_port}"
    environment = {**python_environment, "PATH": path, "SSH": "fake-ssh"}
    script = subprocess.Popen(
        [DEPLOY / "nodes-by-ssh.sh", address, "host-a", "host-b"], env=environment, start_new_session=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        timings = Timings(beat_s=0.2, silence_s=1.5)
        with Pipeline.listen(plan, bind=address, start_timeout=60, timings=timings) as pipeline:
            assert np.array_equal(pipeline.run(X)["y"], wanted)
            assert sorted(node.host for node in pipeline.nodes) == ["host-a", "host-b"]
            os.kill(pipeline.nodes[0].pid, signal.SIGKILL)
            assert np.array_equal(pipeline.run(X, timeout=60)["y"], wanted)
            assert pipeline.incidents
    finally:
        end(script)


def is_ready(http_port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{http_port}/v2/health/ready", timeout=60).close()
    except OSError:
        return False
    return True


def test_a_slurm_job_serves(plan, commands, python_environment, tmp_path):
    add, path = commands
    create_for(tmp_path / "keys", ("node",))
    add("scontrol", "echo node-1")
    add("getent", "echo 127.0.0.1 node-1")
    add("srun", 'shift; for n in 0 1 2; do SLURM_PROCID=$n "$@" & done; trap "kill -TERM 0" TERM; wait')
    environment = {
        **python_environment,
        "PATH": path,
        "PORT": str(ports.free_port()),
        "SLURM_JOB_NODELIST": "node-[1-3]",
    }
    http_port = ports.free_port()
    environment |= {"ONNXSPLIT_SERVE_HTTP_PORT": str(http_port), "ONNXSPLIT_SERVE_GRPC_PORT": "off"}
    job = subprocess.Popen(
        ["bash", DEPLOY / "onnxsplit.sbatch", plan, tmp_path / "keys"], env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: is_ready(http_port), every_s=0.2)
    finally:
        end(job)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_systemd_unit_is_well_formed(tmp_path):
    text = (DEPLOY / "onnxsplit-node@.service").read_text()
    unit = tmp_path / "onnxsplit-node@.service"
    unit.write_text(text.replace("/opt/onnxsplit/bin/onnxsplit", sys.executable).replace("User=onnxsplit", "User=root"))
    command = ["systemd-analyze", "verify", "--recursive-errors=no", f"{tmp_path}/onnxsplit-node@0.service"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "onnxsplit-node" in line]
    assert ours == []


def test_a_peer_that_listens_on_all_addresses_is_reached_at_the_address_used_before():
    by = "tcp://coordinator.example:5555"
    assert reachable("tcp://0.0.0.0:41", by) == "tcp://coordinator.example:41"
    assert reachable("tcp://[::]:41", by) == "tcp://coordinator.example:41"
    assert reachable("tcp://10.0.0.7:41", by) == "tcp://10.0.0.7:41"
    assert reachable("ipc:///run/x", by) == "ipc:///run/x"
