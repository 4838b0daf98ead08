"""Replicas on three hosts (network namespaces) join and leave under load, and share the work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack

import build
import pytest

from onnxsplit.planning.planner import partition
from runtime.home import sweep
from runtime.wire.keys import create_for

HOSTS = ("h1", "h2", "h3")

NODE = """
import time
from runtime.node.stage_runner import StageRunner

plain = StageRunner.run

def run(self, inputs, into):
    time.sleep(0.01)  # so that replicas are equal, however busy this machine is
    return plain(self, inputs, into)

StageRunner.run = run
from onnxsplit.cli import main
main()
"""

CALLER = """
import json, sys, threading, time
import numpy as np
from runtime import Pipeline

plan, address, keys = sys.argv[1:]
x = {"x": np.ones((2, 32), np.float32)}
wrong, ended = [], False

def load(pipeline):
    wanted = pipeline.run(x)["y"]
    pending = [pipeline.submit(x) for _ in range(6)]
    while not ended:
        found = pending.pop(0).result(60)["y"]
        if not np.array_equal(found, wanted):
            wrong.append(1)
        pending.append(pipeline.submit(x))
    for future in pending:
        future.result(60)

def counts(pipeline):
    return {f"{s.stage}.{s.replica}": s.requests for s in pipeline.stats()}

with Pipeline.listen(plan, bind=address, keys=keys, elastic=True, shared_memory=False, start_timeout=60) as pipeline:
    loading = threading.Thread(target=load, args=(pipeline,))
    loading.start()
    for line in sys.stdin:
        nodes, requests = map(int, line.split())
        deadline = time.monotonic() + 60
        while len(pipeline.nodes) != nodes or any(node.state != "ready" for node in pipeline.nodes):
            assert time.monotonic() < deadline, pipeline.nodes
            time.sleep(0.02)
        before = counts(pipeline)
        while sum((now := counts(pipeline)).values()) - sum(before.get(name, 0) for name in now) < requests:
            assert time.monotonic() < deadline, now
            time.sleep(0.02)
        print(json.dumps({name: count - before.get(name, 0) for name, count in now.items()}), flush=True)
    ended = True
    loading.join(60)
    deadline = time.monotonic() + 60
    while any(s.queue for s in pipeline.stats()) and time.monotonic() < deadline:
        time.sleep(0.1)
    queues = [s.queue for s in pipeline.stats()]
    stories = [incident.story for incident in pipeline.incidents]
    print(json.dumps({"wrong": len(wrong), "queues": queues, "incidents": stories, "retries": pipeline.retries}))
"""


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts():
    """Make a namespace for the caller and for each host, linked to the caller; yield their names."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip (iproute2)")
    names = {host: f"onnxsplit-{os.getpid()}-{host}" for host in ("caller", *HOSTS)}
    try:
        ip("netns", "add", names["caller"])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    try:
        for host in HOSTS:
            ip("netns", "add", names[host])
        for name in names.values():
            ip("-n", name, "link", "set", "lo", "up")
        for number, host in enumerate(HOSTS):
            ends = {names["caller"]: f"to-{host}", names[host]: "eth0"}
            here, there = (f"on{os.getpid()}{end}{number}" for end in "nf")
            ip("link", "add", here, "type", "veth", "peer", "name", there)
            for (name, interface), made, last in zip(ends.items(), (here, there), (1, 2), strict=True):
                ip("link", "set", made, "netns", name, "name", interface)
                ip("-n", name, "addr", "add", f"10.78.{number}.{last}/24", "dev", interface)
                ip("-n", name, "link", "set", interface, "up")
        yield names
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def share(found: dict[str, int]) -> float:
    """Return the smallest share of a replica, relative to an equal share."""
    return min(found.values()) * len(found) / sum(found.values())


def test_replicas_on_three_hosts_share_the_work_as_they_come_and_go_under_load(hosts, tmp_path, python_environment):
    """Before, a second replica that joined on another host got all requests, and the first one none."""
    partition(build.save(build.chain(8), tmp_path), stages=1, out=tmp_path / "m.plan", costs="analytic")
    create_for(tmp_path / "keys", HOSTS)

    with ExitStack() as stack:
        stack.callback(sweep)  # remove the folders of killed nodes if the test fails

        def start(host: str, *words: object, **options: object) -> subprocess.Popen:
            command = ["ip", "netns", "exec", hosts[host], sys.executable, "-P", *map(str, words)]
            process = subprocess.Popen(command, env=python_environment, **options)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        def node(host: str) -> subprocess.Popen:
            address = f"tcp://10.78.{HOSTS.index(host)}.1:5600"
            words = ["--connect", address, "--keys", tmp_path / "keys" / host, "--host", host, "--stage", 0]
            return start(host, "-c", NODE, "node", *words, "--no-shared-memory", stderr=subprocess.DEVNULL)

        caller = start(
            "caller", "-c", CALLER, tmp_path / "m.plan", "tcp://0.0.0.0:5600", tmp_path / "keys" / "coordinator",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

        def shares(nodes: int, requests: int) -> dict[str, int]:
            """Wait for this many nodes; return how many of the requests each executes."""
            caller.stdin.write(f"{nodes} {requests}\n")
            caller.stdin.flush()
            return json.loads(caller.stdout.readline())

        started = [node("h1")]
        assert shares(1, 200).keys() == {"0.0"}
        for count, host in ((2, "h2"), (3, "h3")):
            started.append(node(host))
            found = shares(count, 300)
            assert len(found) == count
            assert share(found) > 1 / 3, found
        for gone in started[1:]:
            gone.send_signal(signal.SIGTERM)
            assert gone.wait(60) == 0
        assert shares(1, 200).keys() == {"0.0"}
        caller.stdin.close()
        ended = json.loads(caller.stdout.readline())
        assert caller.wait(60) == 0
        assert started[0].wait(60) == 0
    assert ended == {"wrong": 0, "queues": [0.0], "incidents": [], "retries": 0}
