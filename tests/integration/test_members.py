"""Nodes started by hand that fall silent, are replaced or refused, or lose their coordinator.

The tests are the rows of the table in docs/failures.md, with real processes.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import build
import numpy as np
import ports
import psutil
import pytest
from proxy import Proxy

from onnxsplit.planning.planner import partition
from runtime import Pipeline
from runtime.errors import DeadlineExceeded
from runtime.home import sweep
from runtime.timings import Timings
from runtime.wire.keys import create_for, revoke

X = {"x": np.ones((2, 32), np.float32)}
QUICK = Timings(beat_s=0.1, silence_s=1, loading_silence_s=1)
PATIENT = Timings(beat_s=0.1, silence_s=60)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """One stage."""
    folder = tmp_path_factory.mktemp("members")
    partition(build.save(build.chain(8), folder), stages=1, out=folder / "m.plan", costs="analytic")
    return folder / "m.plan"


class Node:
    """A node started by hand, with its log in a file."""

    def __init__(
        self, address: str, log: Path, environment: dict[str, str], *options: object, before: str = ""
    ) -> None:
        self.log = log
        program = f"{before}\nfrom onnxsplit.cli import main; main()"
        command = [sys.executable, "-P", "-c", program, "node", "--connect", address, *map(str, options)]
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

    def one(address: str, *options: object, before: str = "") -> Node:
        log = tmp_path / f"node-{len(nodes)}.log"
        nodes.append(Node(address, log, python_environment, *options, before=before))
        return nodes[-1]

    yield one
    for node in nodes:
        if node.process.poll() is None:
            node.process.kill()
        node.process.wait()
    sweep()  # what killed ones left


def wait_for(what, words: str = "it did not happen", seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, words
        time.sleep(0.02)


@contextmanager
def listening(plan, address, **options):
    """Start a pipeline that waits for its nodes in a thread; yield a dict that holds it once it is ready."""
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
    """Before, the node was declared dead and exited with 0, and the pipeline was never ready."""
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
        assert "dropped all work: the pipeline declared it dead" in first.said


def test_a_stopped_node_that_is_still_loading_has_more_patience(chain_plan, tmp_path, start):
    address = f"ipc://{tmp_path}/control"
    with listening(chain_plan, address, timings=Timings(beat_s=0.1, silence_s=2)) as (found, thread):
        first = start(address)
        wait_for(lambda: "stage loaded" in first.said)
        first.signal(signal.SIGSTOP)
        time.sleep(4)
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
        node = psutil.Process(spare.process.pid)
        descriptors = node.num_fds()
        time.sleep(2)  # it asks about three more times
        wait_for(lambda: node.num_fds() <= descriptors)
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
    ("before", "options", "words"),
    [
        ("import runtime.wire.messages.control as m; m.PROTOCOL = 99", (), "speaks protocol 99"),
        (
            "import runtime.wire.codec as c; c.decode_coordinator_control = c.decode_node_control",
            (),
            "the same version of onnxsplit",
        ),
        ("", ("--stage", "7"), "the node wants stage 7, and the plan has the stages 0 to 0"),
    ],
    ids=["its protocol", "what it understands", "its wish"],
)
def test_a_node_that_can_never_serve_is_told_why_and_exits_with_1(plan, tmp_path, start, before, options, words):
    address = f"ipc://{tmp_path}/control"
    with listening(plan, address, timings=QUICK):
        node = start(address, *options, before=before)
        assert node.exit_code() == 1
        assert words in node.said
        assert "ERROR" in node.said
        start(address)


def answered(pipeline, count: int) -> list[int]:
    """Return how many of the requests each replica of stage 0 executed, with a few in flight."""
    before = [stats.requests for stats in pipeline.stats() if stats.stage == 0]
    for future in [pipeline.submit(X) for _ in range(count)]:
        future.result(60)
    after = [stats.requests for stats in pipeline.stats() if stats.stage == 0]
    return [now - (before[n] if n < len(before) else 0) for n, now in enumerate(after)]


EQUALLY_SLOW = """
import time
from runtime.node.stage_runner import StageRunner
plain = StageRunner.run
def run(self, inputs, into):
    time.sleep(0.005)  # so that replicas are equal, however busy this machine is
    return plain(self, inputs, into)
StageRunner.run = run
"""


def test_replicas_that_share_no_memory_share_the_work_as_they_come_and_go(plan, tmp_path, start):
    """Before, the second one got all requests, the first one none; the queue of a single replica grew without end."""
    address = f"ipc://{tmp_path}/control"
    first = start(address, "--no-shared-memory", before=EQUALLY_SLOW)
    with Pipeline.listen(plan, bind=address, start_timeout=60, elastic=True, timings=PATIENT) as pipeline:
        assert answered(pipeline, 300) == [300]
        wait_for(lambda: pipeline.stats()[0].queue == 0, "the queue of a lone node does not return to 0")
        second = start(address, "--no-shared-memory", "--stage", "0", before=EQUALLY_SLOW)
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


LINKS = Timings(beat_s=0.1, silence_s=2, unreachable_s=0.5, lost_s=3)


@contextmanager
def far_node(start, address):
    """A node of stage 1 whose link for tensors goes through a proxy; yields the proxy and the announced address."""
    shown, behind = ports.free_port(), ports.free_port()
    proxy = Proxy(shown, behind)
    bind = ["--bind", f"tcp://127.0.0.1:{behind}", "--advertise", f"tcp://127.0.0.1:{shown}"]
    start(address, "--stage", "1", "--no-shared-memory", *bind)
    try:
        yield proxy, f"tcp://127.0.0.1:{shown}"
    finally:
        proxy.close()


def test_a_dead_link_between_two_nodes_is_named_and_the_pipeline_is_not_ready(
    chain_plan, start, free_port, caplog, python_environment
):
    """Before, the pipeline looked healthy because both reached the coordinator, and requests stalled for 30 s."""
    caplog.set_level(logging.INFO, "runtime.coordinator")
    address = f"tcp://127.0.0.1:{free_port}"
    start(address, "--stage", "0")
    with (
        far_node(start, address) as (proxy, shown),
        Pipeline.listen(chain_plan, bind=address, start_timeout=60, timings=LINKS) as pipeline,
    ):
        pipeline.run(X, timeout=30)
        assert pipeline.unreachable is None
        story = f"node 0.0 cannot reach node 1.0 at {shown}"
        proxy.cut()
        wait_for(lambda: pipeline.unreachable == story)
        assert pipeline.incidents[-1].story == story
        assert all(node.state == "ready" for node in pipeline.nodes)
        with pytest.raises(DeadlineExceeded, match=f"the request's time ran out.*: .*; {story}"):
            pipeline.run(X, timeout=1)
        command = [sys.executable, "-P", "-m", "onnxsplit", "status", "--pid", str(os.getpid())]
        shows = subprocess.run(command, env=python_environment, capture_output=True, text=True, check=True)
        assert shows.stdout.splitlines()[0] == story
        proxy.mend()
        wait_for(lambda: pipeline.unreachable is None)
        pipeline.run(X, timeout=30)
        said = [(r.levelname, r.getMessage()) for r in caplog.records if "reach" in r.getMessage()]
        assert [one for one in said if "request failed" not in one[1] and "attempt over" not in one[1]] == [
            ("WARNING", story),
            ("INFO", "node 0.0 reaches node 1.0 again"),
        ]


def test_a_replica_that_cannot_be_reached_gets_nothing_while_another_can(chain_plan, start, free_port):
    address = f"tcp://127.0.0.1:{free_port}"
    start(address, "--stage", "0")
    start(address, "--stage", "1", "--no-shared-memory")
    with (
        far_node(start, address) as (proxy, shown),
        Pipeline.listen(chain_plan, bind=address, start_timeout=60, replicas={1: 2}, timings=LINKS) as pipeline,
    ):
        for future in [pipeline.submit(X) for _ in range(50)]:
            future.result(60)
        proxy.cut()
        wait_for(lambda: pipeline.incidents)
        assert f"at {shown}" in pipeline.incidents[0].story
        assert pipeline.unreachable is None, "there is another way"
        before = pipeline.retries
        for future in [pipeline.submit(X) for _ in range(200)]:
            future.result(60)
        assert pipeline.retries == before


COORDINATOR = """
import sys, numpy as np
from runtime import Pipeline
from runtime.timings import Timings
plan, address, silence_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
timings = Timings(beat_s=0.1, silence_s=silence_s, loading_silence_s=silence_s)
made = Pipeline.listen(plan, bind=address, timings=timings) if address else Pipeline.launch(plan, timings=timings)
with made as pipeline:
    print(*(node.pid for node in pipeline.nodes), flush=True)
    for line in sys.stdin:
        pipeline.run({"x": np.ones((2, 32), np.float32)}, timeout=60)
        print(len(pipeline.incidents), *(node.pid for node in pipeline.nodes), flush=True)
"""


class Caller:
    """A coordinator in a separate process. Without an address it launches its nodes."""

    def __init__(self, plan: Path, address: str, silence_s: float, environment: dict[str, str]) -> None:
        command = [sys.executable, "-P", "-c", COORDINATOR, str(plan), address, str(silence_s)]
        self.process = subprocess.Popen(
            command, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def numbers(self) -> list[int]:
        """Return the numbers of its next line."""
        deadline = threading.Timer(90, self.process.kill)
        deadline.start()
        try:
            return [int(word) for word in self.process.stdout.readline().split()]
        finally:
            deadline.cancel()

    def ask(self) -> list[int]:
        """Make it answer one request; return the number of lost nodes and the pids of the present ones."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.numbers()

    def stop_for(self, seconds: float) -> None:
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(60) == 0


@pytest.fixture
def call(plan, python_environment):
    """Starts coordinators, and ends them."""
    callers: list[Caller] = []

    def one(address: str, silence_s: float = 2.0) -> Caller:
        callers.append(Caller(plan, address, silence_s, python_environment))
        return callers[-1]

    yield one
    for caller in callers:
        if caller.process.poll() is None:
            caller.process.kill()
        caller.process.stdin = None if caller.process.stdin.closed else caller.process.stdin
        caller.process.communicate()
    sweep()  # what killed ones left


@pytest.fixture
def address(free_port):
    return f"tcp://127.0.0.1:{free_port}"


def test_a_coordinator_that_is_stopped_for_less_than_silence_s_finds_all_as_it_was(address, start, call):
    caller, node = call(address, silence_s=3.0), start(address)
    caller.numbers()
    caller.stop_for(1.0)
    assert caller.ask() == [0, node.process.pid]
    assert node.said.count("stage loaded") == 1
    caller.end()
    assert node.exit_code() == 0


def test_a_coordinator_that_is_stopped_for_longer_gets_its_nodes_back(address, start, call):
    caller, node = call(address), start(address)
    caller.numbers()
    caller.process.send_signal(signal.SIGSTOP)
    wait_for(lambda: "dropped all work: the coordinator has been silent for 2 s" in node.said)
    caller.process.send_signal(signal.SIGCONT)
    losses, present = caller.ask()
    assert losses >= 1  # on a busy machine the node may be lost again before it answers
    assert present == node.process.pid
    assert 2 <= node.said.count("stage loaded") <= losses + 1
    caller.end()
    assert node.exit_code() == 0


def test_launched_nodes_end_when_their_coordinator_is_stopped_for_long_and_are_started_again(call):
    caller = call("")
    (old,) = caller.numbers()
    caller.process.send_signal(signal.SIGSTOP)
    wait_for(lambda: psutil.Process(old).status() == psutil.STATUS_ZOMBIE)
    caller.process.send_signal(signal.SIGCONT)
    lost, new = caller.ask()
    assert (lost, new != old) == (1, True)
    caller.end()


@pytest.mark.parametrize("when", ["at once", "after silence_s"])
def test_a_coordinator_that_is_killed_and_starts_again_at_its_address_gets_its_nodes_back(
    address, start, call, python_environment, when
):
    silence_s = 20.0 if when == "at once" else 2.0
    caller, node = call(address, silence_s), start(address)
    caller.numbers()
    caller.process.kill()
    if when == "after silence_s":
        wait_for(lambda: "the coordinator has been silent for 2 s" in node.said)
    again = call(address, silence_s)
    assert again.numbers() == [node.process.pid]
    assert again.ask() == [0, node.process.pid]
    if when == "at once":
        assert "dropped all work: the pipeline declared it dead, or was started again" in node.said
    again.end()
    assert node.exit_code() == 0


def test_nodes_and_spares_whose_coordinator_does_not_come_back_end_with_1(address, start, call):
    caller, node = call(address), start(address, "--rejoin", "2")
    caller.numbers()
    spare = start(address, "--rejoin", "4")
    wait_for(lambda: "asking again" in spare.said)
    caller.process.kill()
    assert (node.exit_code(), spare.exit_code()) == (1, 1)
    assert f"no coordinator answered at {address} for 2 s" in node.said
    assert "no coordinator answered at" in spare.said or "there was no place for this node" in spare.said


def test_a_spare_whose_coordinator_is_closed_looks_for_it_and_takes_a_place_at_the_next(address, start, call):
    """Before, it waited for ever, although --rejoin limits the time."""
    caller, node = call(address), start(address)
    caller.numbers()
    spare = start(address)
    wait_for(lambda: "asking again" in spare.said)
    caller.end()
    assert node.exit_code() == 0
    again = call(address)
    assert again.numbers() == [spare.process.pid]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_spare_that_is_told_to_end_does(plan, tmp_path, start, number):
    address = f"ipc://{tmp_path}/control"
    start(address)
    with Pipeline.listen(plan, bind=address, start_timeout=60):
        spare = start(address)
        wait_for(lambda: "asking again" in spare.said)
        spare.signal(number)
        assert spare.exit_code() == 0


def test_a_node_that_left_is_not_reported_as_a_fault(chain_plan, tmp_path, start, caplog):
    """Before, it was reported as a dead link 3 s later, and then as silent."""
    address = f"ipc://{tmp_path}/control"
    caplog.set_level(logging.INFO)
    first = start(address, "--stage", "0")
    start(address, "--stage", "1")
    timings = Timings(beat_s=0.1, silence_s=60, unreachable_s=0.5)
    with Pipeline.listen(chain_plan, bind=address, start_timeout=60, timings=timings) as pipeline:
        first.signal(signal.SIGTERM)
        assert first.exit_code() == 0
        wait_for(lambda: "has left" in caplog.text)
        start(address, "--stage", "0")
        assert pipeline.run(X, timeout=60)["y"].shape == (2, 32)
        time.sleep(1)  # twice unreachable_s
        assert not pipeline.incidents
        assert pipeline.unreachable is None
    assert "cannot reach" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_node_that_is_told_twice_to_end_does_not_wait_for_its_work(chain_plan, tmp_path, start):
    """No other node can take over its work, so after one signal it would wait for drain_s."""
    address = f"ipc://{tmp_path}/control"
    first, second = start(address, "--stage", "0"), start(address, "--stage", "1")
    with Pipeline.listen(chain_plan, bind=address, start_timeout=60) as pipeline:
        second.signal(signal.SIGSTOP)
        pending = pipeline.submit(X)
        first.signal(signal.SIGTERM)
        wait_for(lambda: pipeline.nodes[0].state == "starting")
        assert first.process.poll() is None, "it waits for what it sent to be answered"
        first.signal(signal.SIGTERM)
        assert first.exit_code() == 0
        assert "received SIGTERM again" in first.said
        second.signal(signal.SIGCONT)
        start(address, "--stage", "0")
        assert pending.result(60)["y"].shape == (2, 32)


def test_a_spare_whose_key_is_revoked_ends_with_1(plan, tmp_path, start, address):
    create_for(tmp_path / "keys", ("a", "b"))
    coordinator = tmp_path / "keys" / "coordinator"
    start(address, "--keys", tmp_path / "keys" / "a")
    with Pipeline.listen(plan, bind=address, keys=coordinator, start_timeout=60):
        spare = start(address, "--keys", tmp_path / "keys" / "b")
        wait_for(lambda: "asking again" in spare.said)
        revoke(coordinator, "b")
        assert spare.exit_code() == 1
        assert "refuses this node: it does not allow this process's key" in spare.said


def test_a_spare_outlasts_pauses_of_its_coordinator_and_its_own(address, start, call):
    caller, node = call(address), start(address)
    caller.numbers()
    spare = start(address)
    wait_for(lambda: "asking again" in spare.said)
    caller.stop_for(0.5)
    spare.signal(signal.SIGSTOP)
    time.sleep(3)
    spare.signal(signal.SIGCONT)
    node.signal(signal.SIGKILL)
    wait_for(lambda: "stage loaded" in spare.said)
    assert caller.ask() == [1, spare.process.pid]


def test_a_node_whose_coordinator_dies_while_it_loads_ends_loading_and_comes_back(address, start, call):
    """Before, it ended during loading with exit status 1."""
    slowly = "import time, runtime.node.executor as w; plain = w.StageRunner.__init__\n"
    slowly += "def load(self, *of, **more): time.sleep(6); plain(self, *of, **more)\nw.StageRunner.__init__ = load"
    caller, node = call(address), start(address, before=slowly)
    wait_for(lambda: node.log.exists() and psutil.Process(node.process.pid).num_threads() > 3)
    time.sleep(1.5)  # it has its stage by now
    caller.process.kill()
    wait_for(lambda: "dropped all work: the coordinator has been silent" in node.said)
    again = call(address)
    assert again.numbers() == [node.process.pid]
