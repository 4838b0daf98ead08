"""Nodes started by hand that fall silent, are replaced, refused, or lose their coordinator: what becomes of them.

The rows of the table in docs/running.md, with real processes.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import build
import numpy as np
import pytest

from onnxsplit.planner import partition
from runtime import Pipeline
from runtime.keys import create_for, revoke
from runtime.watch import Timings

X = {"x": np.ones((2, 32), np.float32)}
QUICK = Timings(beat_s=0.1, silence_s=1, loading_silence_s=1)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """One stage."""
    folder = tmp_path_factory.mktemp("members")
    partition(build.save(build.chain(8), folder), stages=1, out=folder / "m.plan", costs="analytic")
    return folder / "m.plan"


class Node:
    """A node started by hand; its log in a file."""

    def __init__(self, address: str, log: Path, environment: dict[str, str], *options: object) -> None:
        self.log = log
        command = [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address, *map(str, options)]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(command, env=environment, stderr=stream)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_code(self) -> int:
        return self.process.wait(60)


@pytest.fixture
def start(tmp_path, python_environment):
    """Starts nodes, and ends them."""
    nodes: list[Node] = []

    def one(address: str, *options: object) -> Node:
        nodes.append(Node(address, tmp_path / f"node-{len(nodes)}.log", python_environment, *options))
        return nodes[-1]

    yield one
    for node in nodes:
        if node.process.poll() is None:
            node.process.kill()
        node.process.wait()


def wait_for(what, words: str = "it did not happen", seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, words
        time.sleep(0.02)


@contextmanager
def listening(plan, address, **options):
    """A pipeline that waits for its nodes in a thread; gives a future-like dict that holds it when it is ready."""
    found: dict[str, object] = {}

    def listen() -> None:
        try:
            found["pipeline"] = Pipeline.listen(plan, bind=address, start_timeout=60, **options)
        except Exception as error:
            found["error"] = error

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield found, thread
    finally:
        thread.join(90)
        if "pipeline" in found:
            found["pipeline"].close()


def ready(pipeline) -> bool:
    return all(node.state == "ready" for node in pipeline.nodes)


def test_a_node_that_was_stopped_while_it_waited_for_others_still_serves(chain_plan, tmp_path, start):
    """It was taken for dead, told so, and exited with 0; the pipeline was never ready."""
    address = f"ipc://{tmp_path}/control"
    with listening(chain_plan, address, timings=QUICK) as (found, thread):
        first = start(address, "--no-shared-memory")
        wait_for(lambda: "stage loaded" in first.said)
        first.signal(signal.SIGSTOP)
        time.sleep(2.5)  # longer than silence_s and loading_silence_s
        first.signal(signal.SIGCONT)
        wait_for(lambda: first.said.count("stage loaded") == 2)
        start(address)
        thread.join(60)
        assert "error" not in found
        assert found["pipeline"].run(X, timeout=30)["y"].shape == (2, 32)
        assert first.process.poll() is None
        assert "dropped all work: the pipeline took it for dead" in first.said


def test_a_stopped_node_that_is_still_loading_has_more_patience(chain_plan, tmp_path, start):
    address = f"ipc://{tmp_path}/control"
    with listening(chain_plan, address, timings=Timings(beat_s=0.1, silence_s=1)) as (found, thread):
        first = start(address)
        wait_for(lambda: "stage loaded" in first.said)
        first.signal(signal.SIGSTOP)
        time.sleep(2.5)
        first.signal(signal.SIGCONT)
        start(address)
        thread.join(60)
        assert found["pipeline"].incidents == ()
        assert first.said.count("stage loaded") == 1


def test_a_node_that_was_replaced_waits_as_a_spare_and_takes_the_next_place(plan, tmp_path, start, caplog):
    caplog.set_level(logging.INFO, "runtime.coordinator")
    address = f"ipc://{tmp_path}/control"
    old = start(address)
    with Pipeline.listen(plan, bind=address, start_timeout=60, timings=QUICK) as pipeline:
        spare = start(address)
        wait_for(lambda: "asking again for 60 s" in spare.said)
        time.sleep(2)  # it asks about three more times
        assert spare.said.count("no node is wanted") == 1
        assert len([r for r in caplog.records if "no node is wanted" in r.getMessage()]) == 1
        old.signal(signal.SIGSTOP)
        wait_for(lambda: ready(pipeline) and pipeline.nodes[0].pid == spare.process.pid)
        old.signal(signal.SIGCONT)
        wait_for(lambda: "asking again" in old.said)
        assert pipeline.run(X, timeout=30)["y"].shape == (2, 32)
        spare.signal(signal.SIGKILL)
        wait_for(lambda: ready(pipeline) and pipeline.nodes[0].pid == old.process.pid)
        assert pipeline.run(X, timeout=30)["y"].shape == (2, 32)
    assert old.exit_code() == 0
    assert "ending: the pipeline was closed" in old.said


def test_a_spare_that_gets_no_place_ends_and_says_so(plan, tmp_path, start):
    address = f"ipc://{tmp_path}/control"
    start(address)
    with Pipeline.listen(plan, bind=address, start_timeout=60):
        spare = start(address, "--rejoin", "1")
        assert spare.exit_code() == 1
        assert f"there was no place for this node at {address} in 1 s" in spare.said


def test_a_revoked_node_is_told_and_exits_with_1(plan, tmp_path, start, free_port):
    create_for(tmp_path / "keys", ("a",))
    coordinator, address = tmp_path / "keys" / "coordinator", f"tcp://127.0.0.1:{free_port}"
    node = start(address, "--keys", tmp_path / "keys" / "a")
    with Pipeline.listen(plan, bind=address, keys=coordinator, start_timeout=60, timings=QUICK) as pipeline:
        revoke(coordinator, "a")
        assert node.exit_code() == 1
        key = (tmp_path / "keys" / "a" / "public.key").read_text().strip()
        assert f"ERROR the coordinator at {address} has no place for this node: it had its key revoked ({key})" in (
            node.said
        )
        assert "had its key revoked" in pipeline.incidents[0].story


@pytest.mark.parametrize(
    ("protocol", "words"),
    [("runtime.messages.PROTOCOL", "speaks protocol 99"), ("runtime.codec._coordinator_control", "same version")],
)
def test_a_node_of_another_version_is_told_and_exits_with_1(plan, tmp_path, start, python_environment, protocol, words):
    """One that says another version, and one that does not even understand what it is told."""
    address = f"ipc://{tmp_path}/control"
    module, _, name = protocol.rpartition(".")
    value = "99" if name == "PROTOCOL" else "codec._node_control"
    program = f"from runtime import codec; import {module} as m; m.{name} = {value}\n"
    program += "import sys; from runtime.node import NodeOptions, serve\n"
    program += f"import logging; logging.basicConfig(); sys.exit(serve(NodeOptions(connect={address!r})))"
    with listening(plan, address, timings=QUICK):
        command = [sys.executable, "-P", "-c", program]
        done = subprocess.run(command, env=python_environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1, done.stderr
        assert words in done.stderr
        start(address)


def answered(pipeline, count: int) -> list[int]:
    """How many of so many requests each replica of stage 0 executed, with a few in flight."""
    before = [stats.requests for stats in pipeline.stats() if stats.stage == 0]
    for future in [pipeline.submit(X) for _ in range(count)]:
        future.result(60)
    after = [stats.requests for stats in pipeline.stats() if stats.stage == 0]
    return [now - (before[n] if n < len(before) else 0) for n, now in enumerate(after)]


def test_replicas_that_share_no_memory_share_the_work_as_they_come_and_go(plan, tmp_path, start):
    """The second one got everything and the first nothing, for ever; a lone one's queue grew without end."""
    address = f"ipc://{tmp_path}/control"
    first = start(address, "--no-shared-memory")
    with Pipeline.listen(plan, bind=address, start_timeout=60, elastic=True, timings=QUICK) as pipeline:
        assert answered(pipeline, 300) == [300]
        wait_for(lambda: pipeline.stats()[0].queue == 0, "the queue of a lone node does not return to 0")
        second = start(address, "--no-shared-memory", "--stage", "0")
        wait_for(lambda: len(pipeline.nodes) == 2 and ready(pipeline))
        shares = answered(pipeline, 300)
        assert min(shares) >= 50, shares
        wait_for(lambda: all(stats.queue == 0 for stats in pipeline.stats()))
        second.signal(signal.SIGTERM)
        assert second.exit_code() == 0
        assert answered(pipeline, 100) == [100]
        wait_for(lambda: pipeline.stats()[0].queue == 0)
        assert (pipeline.incidents, pipeline.retries) == ((), 0)
    assert first.exit_code() == 0
