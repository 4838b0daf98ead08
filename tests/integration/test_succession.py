"""Nodes started by hand that start their successors for another plan, and the processes that remain of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import build
import numpy as np
import psutil
import pytest
from processes import running
from waiting import wait_until

from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import run_stages
from runtime import Pipeline
from runtime.background import may_return
from runtime.errors import LaunchFailed, PipelineClosed, PipelineError
from runtime.home import sweep
from runtime.launching import beside
from runtime.starting import PreparedPipeline, wait_for_nodes
from runtime.timings import Timings
from runtime.wire.keys import create_for

X = {"x": np.ones((2, 32), np.float32)}
QUICK = Timings(beat_s=0.1, silence_s=2, loading_silence_s=5)
PATIENT = replace(QUICK, loading_silence_s=60)

SLOWLY = """
import os, time
if os.path.exists(os.environ.get("SLOW", "")) and "--succeeds" in __import__("sys").orig_argv:
    import runtime.node.executor as w
    plain = w.StageRunner.__init__
    def load(self, *of, **more):
        while os.path.exists(os.environ["SLOW"]):
            time.sleep(0.05)
        plain(self, *of, **more)
    w.StageRunner.__init__ = load
"""


ENDS_LATE = """
import time
from runtime.node.worker import Worker
plain = Worker.close
def close(self):
    plain(self)
    time.sleep(1)
Worker.close = close
"""


HANGS = """
import os, time
if "HANG" in os.environ and "--succeeds" not in __import__("sys").orig_argv:
    import runtime.node.executor as w
    plain = w.StageRunner.run
    def run(self, *of, **more):
        while os.path.exists(os.environ["HANG"]):
            time.sleep(0.05)
        return plain(self, *of, **more)
    w.StageRunner.run = run
"""


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Two plans of one stage each. They are of different models, so that a node's answers tell which one it runs."""
    folder = tmp_path_factory.mktemp("succession")
    for name, ops in (("old", 8), ("new", 6)):
        model = build.save(build.chain(ops), folder, f"{name}.onnx")
        partition(model, stages=1, out=folder / f"{name}.plan", costs="analytic")
    return folder / "old.plan", folder / "new.plan"


def answers(pipeline: Pipeline, plan: Path) -> bool:
    """Whether a pipeline answers as its plan says."""
    return np.array_equal(pipeline.run(X, timeout=60)["y"], run_stages(plan, load_plan(plan), X, threads=1)["y"])


class Node:
    """A node started by hand, with its log in a file."""

    def __init__(self, address: str, log: Path, environment: dict[str, str], *options: object) -> None:
        self.log = log
        command = [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address, *map(str, options)]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def successors(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def exit_code(self) -> int:
        return self.process.wait(60)


@pytest.fixture
def patched(tmp_path, python_environment):
    """Lets the processes of nodes run a program first."""

    def one(program: str) -> None:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(program)
        python_environment["PYTHONPATH"] += f"{os.pathsep}{tmp_path / 'site'}"

    return one


@pytest.fixture
def slow(tmp_path, patched, python_environment):
    """While this file exists, successors do not finish loading."""
    patched(SLOWLY)
    python_environment["SLOW"] = str(tmp_path / "slow")
    yield tmp_path / "slow"
    (tmp_path / "slow").unlink(missing_ok=True)


@pytest.fixture
def hang(tmp_path, patched, python_environment):
    """While this file exists, the first process does not finish a run."""
    patched(HANGS)
    python_environment["HANG"] = str(tmp_path / "hang")
    yield tmp_path / "hang"
    (tmp_path / "hang").unlink(missing_ok=True)


@pytest.fixture
def start(tmp_path, python_environment):
    """Starts nodes, and ends them."""
    nodes: list[Node] = []

    def one(address: str, *options: object) -> Node:
        nodes.append(Node(address, tmp_path / f"node-{len(nodes)}.log", python_environment, *options))
        return nodes[-1]

    yield one
    left = [child.pid for node in nodes if node.process.poll() is None for child in node.successors]
    for node in nodes:
        node.process.kill()
        node.process.wait()
    wait_until(lambda: not running(left), "the end of the successors")
    sweep()


@contextmanager
def pipeline_of(prepared: PreparedPipeline):
    with Pipeline(prepared) as pipeline:
        yield pipeline


class Next:
    """The pipeline of the next plan, which starts in a thread of its own."""

    def __init__(self, plan: Path, bind: str, **options: object) -> None:
        self.prepared = wait_for_nodes(plan, bind, {"timings": QUICK, "start_timeout": 60, **options}, succeeds=True)
        self.pipeline: Pipeline | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._start)
        self._thread.start()
        self.address = self.prepared.coordinator.handover.listening.result(60)

    def _start(self) -> None:
        try:
            self.pipeline = Pipeline(self.prepared)
        except BaseException as error:
            self.error = error

    def ready(self) -> Pipeline:
        self._thread.join(60)
        assert self.pipeline is not None, self.error
        return self.pipeline

    def close(self) -> None:
        self.prepared.coordinator.close()
        self._thread.join(60)
        if self.pipeline is not None:
            self.pipeline.close()


@pytest.fixture
def following():
    """Starts pipelines of next plans, and closes them."""
    made: list[Next] = []

    def one(plan: Path, bind: str, **options: object) -> Next:
        made.append(Next(plan, beside(bind, None), **options))
        return made[-1]

    yield one
    for each in made:
        each.close()


@pytest.fixture(params=["ipc", "tcp"])
def address(request, tmp_path, free_port):
    return f"ipc://{tmp_path}/control" if request.param == "ipc" else f"tcp://127.0.0.1:{free_port}"


@pytest.fixture
def ipc(tmp_path):
    return f"ipc://{tmp_path}/control"


def listen(plan: Path, address: str, **options: object) -> Pipeline:
    return Pipeline.listen(plan, bind=address, timings=QUICK, start_timeout=60, **options)


def begin(old: Pipeline, new: Next, needed_bytes: int = 0) -> None:
    """Let the only node of a pipeline start its successor."""
    old._coordinator.succeed(new.address, {(0, 0): ((0, 0), needed_bytes)}, background_s=0).result(60)


def change(old: Pipeline, following: Callable[..., Next], plan: Path, address: str, **options: object) -> Pipeline:
    """Change the plan: returns the pipeline that serves then, at the address of the old one."""
    new = following(plan, address, **options)
    begin(old, new)
    pipeline = new.ready()
    taken = new.prepared.coordinator.take_over(address)
    assert not taken.done() or taken.exception() is None
    old.drain(60)
    old.close()
    taken.result(60)
    return pipeline


def test_a_node_is_succeeded_twice_and_two_processes_remain(plans, address, start, following, tmp_path):
    health = tmp_path / "health"
    node = start(address, "--health", health)
    old = listen(plans[0], address)
    assert answers(old, plans[0])
    first = change(old, following, plans[1], address)
    assert answers(first, plans[1])
    (one,) = node.successors
    assert [each.pid for each in first.nodes] == [one.pid]
    wait_until(lambda: "waiting for its successor" in node.said)
    second = change(first, following, plans[0], address)
    assert answers(second, plans[0])
    wait_until(lambda: not running([one.pid]), "the end of the first successor")
    wait_until(lambda: [each.pid for each in node.successors] == [second.nodes[0].pid])
    wait_until(lambda: health.read_text() == "ready\n")
    second.close()
    assert node.exit_code() == 0, node.said
    assert not health.exists()


def test_a_change_that_is_given_up_leaves_the_node_as_it_was_and_it_can_be_tried_again(plans, ipc, start, following):
    node = start(ipc)
    with listen(plans[0], ipc) as old:
        new = following(plans[1], ipc)
        begin(old, new)
        successor = new.ready().nodes[0].pid
        new.close()
        wait_until(lambda: not running([successor]), "the end of the successor")
        wait_until(lambda: old._coordinator.handover.lost_successors)
        assert answers(old, plans[0])
        assert old.nodes[0].pid == node.process.pid
        with change(old, following, plans[1], ipc) as changed:
            assert answers(changed, plans[1])
    assert node.exit_code() == 0, node.said


def test_a_successor_that_is_killed_while_it_loads_fails_the_change_and_the_node_serves_on(
    plans, ipc, start, following, slow
):
    node = start(ipc)
    with listen(plans[0], ipc) as old:
        slow.touch()
        new = following(plans[1], ipc)
        begin(old, new)
        (successor,) = node.successors
        wait_until(lambda: new.prepared.coordinator.nodes()[0].state == "loading")
        successor.kill()
        wait_until(lambda: old._coordinator.handover.lost_successors)
        (story,) = old._coordinator.handover.lost_successors
        assert f"process {successor.pid}, was killed by SIGKILL" in story
        wait_until(lambda: new.error)
        assert isinstance(new.error, LaunchFailed)
        assert answers(old, plans[0])
    assert node.exit_code() == 0, node.said


def test_a_killed_first_process_takes_its_successor_with_it(plans, ipc, start, following, slow):
    node = start(ipc)
    with listen(plans[0], ipc) as old:
        slow.touch()
        new = following(plans[1], ipc)
        begin(old, new)
        (successor,) = node.successors
        wait_until(lambda: new.prepared.coordinator.nodes()[0].state == "loading")
        node.process.kill()
        wait_until(lambda: not running([successor.pid]), "the end of the successor")
        wait_until(lambda: new.error)
        start(ipc)
        assert answers(old, plans[0])


def test_a_killed_first_process_that_waits_takes_the_serving_successor_with_it(plans, ipc, start, following):
    node = start(ipc)
    with change(listen(plans[0], ipc), following, plans[1], ipc) as pipeline:
        (successor,) = node.successors
        node.process.kill()
        wait_until(lambda: not running([successor.pid]), "the end of the successor")
        start(ipc)  # as a supervisor does
        assert answers(pipeline, plans[1])


def test_a_killed_successor_ends_the_first_process_whose_supervisor_starts_it_again(plans, address, start, following):
    node = start(address)
    with change(listen(plans[0], address), following, plans[1], address) as pipeline:
        node.successors[0].kill()
        assert node.exit_code() == 128 + signal.SIGKILL
        again = start(address)
        assert answers(pipeline, plans[1])
        assert pipeline.nodes[0].pid == again.process.pid


def test_a_successor_that_is_killed_while_the_own_node_still_ends_ends_the_first_process_too(
    plans, ipc, start, following, patched
):
    patched(ENDS_LATE)
    node = start(ipc)
    with change(listen(plans[0], ipc), following, plans[1], ipc):
        node.successors[0].kill()
        assert node.exit_code() == 128 + signal.SIGKILL, node.said
        assert "waiting for its successor" not in node.said


@pytest.mark.parametrize("to_all", [False, True], ids=["to the first", "to all, as systemd does"])
def test_a_signal_reaches_the_successor_which_finishes_its_work(plans, ipc, start, following, to_all):
    node = start(ipc)
    with change(listen(plans[0], ipc), following, plans[1], ipc) as pipeline:
        wait_until(lambda: "waiting for its successor" in node.said)
        if to_all:
            node.successors[0].terminate()
        node.process.terminate()
        assert node.exit_code() == 0, node.said
        assert "again" not in node.said
        start(ipc)
        assert answers(pipeline, plans[1])
        assert not pipeline.incidents


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_successor_loads_ends_both(plans, ipc, start, following, slow, number):
    node = start(ipc)
    with listen(plans[0], ipc) as old:
        slow.touch()
        new = following(plans[1], ipc)
        begin(old, new)
        (successor,) = node.successors
        wait_until(lambda: new.prepared.coordinator.nodes()[0].state == "loading")
        node.process.send_signal(number)
        assert node.exit_code() == 0, node.said
        assert not running([successor.pid])
        start(ipc)
        assert answers(old, plans[0])
        assert not old.incidents


def test_a_second_signal_ends_a_successor_that_has_not_finished(plans, ipc, start, following):
    node = start(ipc)
    with change(listen(plans[0], ipc), following, plans[1], ipc):
        (successor,) = node.successors
        wait_until(lambda: "waiting for its successor" in node.said)
        successor.suspend()  # it cannot finish its work
        wait_until(lambda: node.process.terminate() or node.process.poll() is not None, every_s=0.5)
        assert not running([successor.pid])


def test_successors_that_lose_their_coordinator_end_and_their_first_process_asks_at_its_address(
    plans, ipc, start, following
):
    node = start(ipc)
    pipeline = change(listen(plans[0], ipc), following, plans[1], ipc)
    (successor,) = node.successors
    successor.suspend()  # it counts as dead, and is told so when it is back
    wait_until(lambda: pipeline.incidents)
    successor.resume()
    wait_until(lambda: f"asking {ipc} for a place again" in node.said)
    assert answers(pipeline, plans[1])
    assert pipeline.nodes[0].pid == node.process.pid
    assert not running([successor.pid])
    pipeline.close()
    assert node.exit_code() == 0, node.said


def test_a_successor_that_reaches_no_coordinator_ends_and_the_node_serves_on(plans, ipc, start, tmp_path, patched):
    patched("import runtime.node.serve as s; s._SUCCESSOR_PATIENCE_S = 1.0")
    node = start(ipc)
    with listen(plans[0], ipc) as old:
        old._coordinator.succeed(f"ipc://{tmp_path}/nobody", {(0, 0): ((0, 0), 0)}).result(60)
        wait_until(lambda: old._coordinator.handover.lost_successors)
        assert "ended with exit code 1" in old._coordinator.handover.lost_successors[0]
        assert f"no coordinator answered at ipc://{tmp_path}/nobody for 1 s" in node.said
        assert answers(old, plans[0])
        assert not old.incidents
    assert node.exit_code() == 0, node.said


def test_a_first_process_that_loses_its_place_gets_it_back_when_the_change_is_given_up(
    plans, ipc, start, following, slow
):
    node = start(ipc)
    with listen(plans[0], ipc) as old:
        slow.touch()
        new = following(plans[1], ipc)
        begin(old, new)
        node.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: old.incidents)
        node.process.send_signal(signal.SIGCONT)
        wait_until(lambda: "waiting for its successor" in node.said)
        new.close()
        assert answers(old, plans[0])
        assert old.nodes[0].pid == node.process.pid
    assert node.exit_code() == 0, node.said


def test_a_first_process_whose_session_hangs_stays_for_its_successor(plans, ipc, start, following, hang):
    node = start(ipc)
    old = listen(plans[0], ipc)
    new = following(plans[1], ipc)
    begin(old, new)
    pipeline = new.ready()
    hang.touch()
    old.submit(X)
    taken = new.prepared.coordinator.take_over(ipc)
    old.close()
    taken.result(60)
    wait_until(lambda: "work was still running 2 s after the node was to stop" in node.said)
    assert answers(pipeline, plans[1])
    pipeline.close()
    assert node.exit_code() == 1
    assert "stage loaded" in node.said


BOTH = """
import sys, threading
from runtime import Pipeline
from runtime.launching import beside
from runtime.starting import wait_for_nodes
from runtime.timings import Timings
old, new, address = sys.argv[1:]
quick = Timings(beat_s=0.1, silence_s=2, loading_silence_s=5)
pipeline = Pipeline.listen(old, bind=address, timings=quick)
following = wait_for_nodes(new, beside(address, None), {"timings": quick}, succeeds=True)
following.coordinator.start()
there = following.coordinator.handover.listening.result(60)
pipeline._coordinator.succeed(there, {(0, 0): ((0, 0), 0)}).result(60)
print("begun", flush=True)
threading.Event().wait()
"""


def test_a_caller_that_dies_while_a_successor_loads_gets_the_node_back(plans, ipc, start, slow, python_environment):
    node = start(ipc)
    slow.touch()
    caller = subprocess.Popen(
        [sys.executable, "-P", "-c", BOTH, *map(str, plans), ipc], env=python_environment, stdout=subprocess.PIPE
    )
    assert caller.stdout.readline() == b"begun\n"
    (successor,) = node.successors
    caller.kill()
    caller.communicate()
    wait_until(lambda: not running([successor.pid]), "the end of the successor")
    with listen(plans[0], ipc) as pipeline:
        assert answers(pipeline, plans[0])
        assert pipeline.nodes[0].pid == node.process.pid
    assert node.exit_code() == 0, node.said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bind", "tcp://127.0.0.1:{port}"), "it listens at a fixed port, tcp://127.0.0.1:"),
        (("--bind", "tcp://127.0.0.1:{port}", "--advertise", "tcp://localhost:{port}"), "reach it at the fixed"),
    ],
)
def test_a_node_beside_which_no_second_one_can_listen_refuses(plans, ipc, start, following, free_port, options, words):
    start(ipc, *(option.format(port=free_port) for option in options))
    with listen(plans[0], ipc) as old:
        new = following(plans[1], ipc)
        with pytest.raises(LaunchFailed, match=rf"stage 0 \(node 0.0, pid .*cannot start its successor: .*{words}"):
            begin(old, new)
        assert answers(old, plans[0])


def test_a_node_without_the_memory_refuses(plans, ipc, start, following):
    node = start(ipc)
    with listen(plans[0], ipc) as old:
        new = following(plans[1], ipc)
        with pytest.raises(LaunchFailed, match=r"needs \d+ MiB of memory beside it, and only \d+ MiB are free"):
            begin(old, new, needed_bytes=1 << 50)
        assert node.successors == []


def test_a_node_that_a_launcher_has_started_refuses(plans, ipc, following):
    with Pipeline.launch(plans[0]) as old:
        new = following(plans[1], ipc)
        with pytest.raises(LaunchFailed, match="a launcher has started it"):
            begin(old, new)


def test_a_node_that_is_not_ready_is_refused_at_once(plans, ipc, start, following):
    node = start(ipc)
    with listen(plans[0], ipc) as old:
        node.process.kill()
        wait_until(lambda: old.nodes[0].state != "ready")
        new = following(plans[1], ipc)
        with pytest.raises(LaunchFailed, match=r"only ready nodes can be succeeded: stage 0 \(node 0.0\) is starting"):
            begin(old, new)
        with pytest.raises(LaunchFailed, match=r"stage 7 \(node 7.0\) is not there"):
            old._coordinator.succeed(new.address, {(7, 0): ((0, 0), 0)}).result(60)
        start(ipc)


def priorities(process: psutil.Process) -> set[int]:
    return {os.sched_getscheduler(thread.id) for thread in process.threads()}


@pytest.mark.skipif(not may_return(), reason="this user may not leave idle priority again")
@pytest.mark.parametrize("deadline_s", [3600, 1])
def test_a_successor_loads_at_idle_priority_until_it_is_ready_or_the_time_is_over(
    plans, ipc, start, following, slow, deadline_s
):
    node = start(ipc)
    with listen(plans[0], ipc) as old:
        slow.touch()
        new = following(plans[1], ipc, timings=PATIENT)  # others may use all cores
        places = {(0, 0): ((0, 0), 0)}
        old._coordinator.succeed(new.address, places, background_s=deadline_s).result(60)
        (successor,) = node.successors
        if deadline_s == 1:
            wait_until(lambda: priorities(successor) == {os.SCHED_OTHER})
        wait_until(lambda: new.prepared.coordinator.nodes()[0].state == "loading")
        assert priorities(successor) == {os.SCHED_OTHER if deadline_s == 1 else os.SCHED_IDLE}
        slow.unlink()
        assert answers(new.ready(), plans[1])
        assert priorities(successor) == {os.SCHED_OTHER}
        assert priorities(psutil.Process(node.process.pid)) == {os.SCHED_OTHER}


@pytest.mark.skipif(not may_return(), reason="this user may not leave idle priority again")
def test_a_process_at_idle_priority_returns_to_normal_priority_when_what_has_started_it_ends(python_environment):
    code = (
        "import os, time\n"
        "from runtime.background import come_forward_at_the_end_of\n"
        "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\n"
        "come_forward_at_the_end_of(0)\n"
        "print(os.sched_getscheduler(0), flush=True)\n"
        "while os.sched_getscheduler(0) == os.SCHED_IDLE:\n"
        "    time.sleep(0.01)\n"
        "print(os.sched_getscheduler(0), flush=True)"
    )
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=python_environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert int(process.stdout.readline()) == os.SCHED_IDLE
            process.stdin.close()
            assert int(process.stdout.readline()) == os.SCHED_OTHER
        finally:
            process.kill()


def test_a_second_request_takes_the_place_of_the_first(plans, ipc, start, following, slow):
    node = start(ipc)
    with listen(plans[0], ipc) as old:
        slow.touch()
        new = following(plans[1], ipc)
        begin(old, new)
        (first,) = node.successors
        begin(old, new)  # the plan of the first was given up: otherwise nobody would ask again
        (second,) = node.successors
        assert second.pid != first.pid
        assert not running([first.pid])


def test_nodes_with_keys_are_succeeded_over_encrypted_links(plans, tmp_path, start, following, free_port):
    create_for(tmp_path / "keys", ("a",))
    keys, address = {"keys": tmp_path / "keys" / "coordinator"}, f"tcp://127.0.0.1:{free_port}"
    node = start(address, "--keys", tmp_path / "keys" / "a", "--no-shared-memory")
    with change(listen(plans[0], address, **keys), following, plans[1], address, **keys) as pipeline:
        assert answers(pipeline, plans[1])
    assert node.exit_code() == 0, node.said


@pytest.mark.parametrize("words", [("--insecure",), ("--fetch",), ("--plan",)])
def test_successors_have_the_options_of_the_node(plans, start, following, free_port, words):
    address = f"tcp://127.0.0.1:{free_port}"
    node = start(address, *words, *(plans[:1] if words == ("--plan",) else ()))
    with change(listen(plans[0], address), following, plans[1], address) as pipeline:
        assert answers(pipeline, plans[1])
        command = node.successors[0].cmdline()
        assert words == ("--plan",) or words[0] in command
    assert node.exit_code() == 0, node.said


def written_bytes(node: Node) -> int:
    """The memory that a node itself has written; pages of files do not count, which the kernel takes back at will."""
    return sum(part.private_dirty for part in psutil.Process(node.process.pid).memory_maps())


def test_a_waiting_process_has_given_back_its_memory(tmp_path, ipc, start, following):
    """Its weights take 64 MiB, in four tensors."""
    for name in ("old", "new"):
        model = build.save(build.chain(4, 2048), tmp_path, f"{name}.onnx")
        partition(model, stages=1, out=tmp_path / f"{name}.plan", costs="analytic")
    node = start(ipc)
    old = listen(tmp_path / "old.plan", ipc)
    before = written_bytes(node)
    with change(old, following, tmp_path / "new.plan", ipc):
        wait_until(lambda: written_bytes(node) < before - (56 << 20))


def test_a_node_that_asks_for_a_place_again_has_given_back_its_memory(tmp_path, ipc, start):
    partition(build.save(build.chain(4, 2048), tmp_path), stages=1, out=tmp_path / "m.plan", costs="analytic")
    node = start(ipc)
    with listen(tmp_path / "m.plan", ipc) as pipeline:
        before = written_bytes(node)
        for number in range(1, 3):
            node.process.send_signal(signal.SIGSTOP)
            wait_until(lambda number=number: len(pipeline.incidents) == number)
            node.process.send_signal(signal.SIGCONT)
            assert pipeline.run({"x": np.ones((1, 2048), np.float32)}, timeout=60)["y"].shape == (1, 2048)
            assert written_bytes(node) < before + (32 << 20)


def test_a_free_address_is_taken_over_at_once_and_an_unusable_one_is_refused(plans, ipc, start, tmp_path):
    start(ipc)
    with listen(plans[0], ipc) as pipeline:
        take_over = pipeline._coordinator.take_over
        take_over(f"ipc://{tmp_path}/other").result(60)
        assert take_over(f"ipc://{tmp_path}/other").cancel(), "it is in use"
        with pytest.raises(PipelineError, match="expected tcp://HOST:PORT"):
            take_over("tcp://127.0.0.1").result(60)
        waiting = take_over(ipc)
    with pytest.raises(PipelineClosed):
        waiting.result(60)
    with pytest.raises(PipelineClosed):
        take_over(ipc).result(60)
