"""The parts of a succession that need no nodes: command lines, questions and answers, addresses, priorities."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import build
import pytest
from waiting import wait_until

from onnxsplit.custom_ops import Library
from onnxsplit.errors import CustomOpsError, InputError
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from runtime.background import bring_forward, hold_back, may_return
from runtime.coordinator import succession
from runtime.coordinator.handover import Handover
from runtime.coordinator.inbox import Inbox
from runtime.coordinator.roster import Roster
from runtime.coordinator.succession import Succession, TakeOver
from runtime.errors import LaunchFailed, PipelineClosed
from runtime.launch.local import LocalLauncher
from runtime.launching import beside
from runtime.node.command_line import options_of, successor_of, why_no_successor, words_of
from runtime.node.options import NodeOptions
from runtime.node.origin import LOST
from runtime.node.successors import Outcome
from runtime.timings import Timings
from runtime.wire import codec
from runtime.wire.messages.control import PROTOCOL, Hello, Succeed, Succeeded, SucceedRefused, SuccessorEnded
from runtime.wire.sockets import Sockets

BY_HAND = NodeOptions(
    connect="tcp://a:1",
    bind="tcp://b:*",
    stage=2,
    plan=Path("/p"),
    fetch=True,
    cache_bytes=5,
    host="-odd",
    health=Path("/health"),
    provider="cpu",
    threads=3,
    memory_bytes=7,
    drain_s=1.5,
    keys=Path("/k"),
    insecure=True,
)


def successor(options: NodeOptions, *, background: bool = True) -> NodeOptions:
    return successor_of(
        options, connect="tcp://c:2", stage=0, replica=1, home=Path("/h"), count=4, background=background
    )


@pytest.mark.parametrize("background", [True, False])
def test_a_successor_reads_the_options_that_its_command_line_was_made_from(background):
    given = successor(BY_HAND, background=background)
    assert options_of(words_of(given)) == given
    assert options_of(words_of(successor(NodeOptions(connect="ipc:///a")))) == successor(
        NodeOptions(connect="ipc:///a")
    )


def test_a_successor_differs_from_the_first_process_in_its_place_alone():
    place = {"connect": "tcp://c:2", "stage": 0, "replica": 1, "number": 0, "home": Path("/h"), "background": True}
    wanted = replace(BY_HAND, health=None, lifeline=True, succeeds=True, **place)
    assert successor(BY_HAND) == wanted
    assert successor(replace(BY_HAND, bind="ipc:///s")).bind == "ipc:///s.4"


def test_libraries_of_custom_ops_are_passed_on(tmp_path):
    (tmp_path / "ops.so").write_bytes(b"x")
    found = options_of([*words_of(successor(BY_HAND)), "--custom-ops", str(tmp_path / "ops.so")])
    assert options_of(words_of(found)) == found
    with pytest.raises(CustomOpsError):
        options_of(words_of(replace(found, custom_ops=(Library("no", "/no", "0"),))))


@pytest.mark.parametrize(
    ("own_lost", "codes", "lost", "code"),
    [
        (False, [0], False, 0),
        (False, [0, 0, 0], False, 0),
        (False, [1], False, 1),
        (False, [-9], False, 137),
        (False, [0, -9], False, 137),
        (False, [LOST], True, LOST),
        (False, [0, LOST], True, LOST),
        (True, [0], True, 0),
        (False, [LOST, 0], True, 0),
        (False, [-9, 0], True, 0),
        (False, [-9, 0, 0], False, 0),
    ],
)
def test_the_first_process_asks_again_if_a_place_was_lost_and_else_ends_as_the_last_successor(
    own_lost, codes, lost, code
):
    """The successors live all at once, and end one after the other."""
    outcome = Outcome(own_lost)
    for number, one in enumerate(codes, 1):
        outcome.note(one, is_last=number == len(codes))
    assert (outcome.lost, outcome.code) == (lost, code)


@pytest.mark.parametrize(
    ("bind", "advertise", "words"),
    [
        (None, None, ""),
        ("tcp://0.0.0.0:*", None, ""),
        ("ipc:///a", None, ""),
        ("tcp://h:5", None, "start it with --bind tcp://h:* to"),
        ("tcp://h:5", "tcp://x:5", "fixed address tcp://x:5 (--advertise)"),
    ],
)
def test_a_second_node_listens_where_neither_port_nor_announced_address_is_fixed(bind, advertise, words):
    reason = why_no_successor(NodeOptions(connect="tcp://a:1", bind=bind, advertise=advertise))
    assert words in reason
    assert bool(words) == bool(reason)


def test_the_next_coordinator_listens_at_another_port_or_path_of_the_same_host():
    assert beside("tcp://10.0.0.1:5555", None) == "tcp://10.0.0.1:*"
    assert beside("tcp://[::1]:5555", None) == "tcp://[::1]:*"
    assert beside("ipc:///run/x", None).startswith("ipc:///run/x.")
    assert beside("ipc:///run/x", None) != beside("ipc:///run/x", None)
    with pytest.raises(InputError, match=r"fixed ports 5556 and 5557, where a second coordinator cannot listen"):
        beside("tcp://10.0.0.1:5555", (5556, 5557))


@pytest.fixture
def roster():
    """Two stages: the node of the first is ready, that of the second has not reported."""
    made = Roster((1, 1), Timings())
    made.due(0)
    node = made.join(b"a", Hello(PROTOCOL, 0, 9, "h", "x", 0, -1, "", None, ""), 0, is_open=True)
    made.prepare(node, (), 0)
    return made


class Nodes:
    """Records what nodes are told."""

    def __init__(self) -> None:
        self.told: list[tuple[bytes, object]] = []

    def tell(self, identity: bytes, header: bytes) -> bool:
        self.told.append((identity, codec.decode_coordinator_control(header)))
        return True


PLACES = {(0, 0): ((3, 1), 50)}


@pytest.fixture
def asked(roster):
    """A succession that awaits the answer of one node."""
    nodes, done = Nodes(), Future()
    made = Succession(roster, nodes.tell, "key")
    made.begin("tcp://h:1", PLACES, 2.0, done)
    assert nodes.told == [(b"a", Succeed("tcp://h:1", 3, 1, 50, "key", 2 * 10**9))]
    assert not done.done()
    return made, done


def test_a_succession_is_done_when_all_nodes_have_started_their_successors(asked):
    made, done = asked
    made.hear(b"stranger", Succeeded(5))
    assert not done.done()
    made.hear(b"a", Succeeded(5))
    assert done.result(0) is None
    made.hear(b"a", SuccessorEnded(5, "was killed by SIGKILL"))
    assert made.lost == ("the successor of stage 0 (node 0.0, pid 9 on h), process 5, was killed by SIGKILL",)
    again = Future()
    made.begin("tcp://h:1", PLACES, 2.0, again)
    assert made.lost == ()


def test_a_refusal_names_the_node_and_the_reason(asked):
    made, done = asked
    made.hear(b"a", SucceedRefused("no memory"))
    with pytest.raises(LaunchFailed, match=r"stage 0 \(node 0.0, pid 9 on h\) cannot start its successor: no memory"):
        done.result(0)
    made.hear(b"a", Succeeded(5))  # of no matter any more


def test_a_node_that_was_lost_or_is_silent_fails_the_succession(asked, roster, monkeypatch):
    made, done = asked
    made.look()
    assert not done.done()
    monkeypatch.setattr(succession.time, "monotonic", lambda: 1e12)
    made.look()
    with pytest.raises(LaunchFailed, match="not answered within 10 s when asked for a successor: stage 0"):
        done.result(0)
    monkeypatch.undo()
    again = Future()
    made.begin("tcp://h:1", PLACES, 2.0, again)
    roster.nodes[0, 0].identity = b""
    made.look()
    with pytest.raises(LaunchFailed, match="was lost before it had started its successor"):
        again.result(0)


def test_one_succession_at_a_time_and_only_of_ready_nodes(asked, roster):
    made, done = asked
    other = Future()
    made.begin("tcp://h:1", PLACES, 2.0, other)
    with pytest.raises(LaunchFailed, match="starting successors already"):
        other.result(0)
    assert not done.done()
    nodes, third = Nodes(), Future()
    Succession(roster, nodes.tell, "").begin("tcp://h:1", {**PLACES, (1, 0): ((0, 0), 0)}, 0.0, third)
    with pytest.raises(LaunchFailed, match=r"stage 1 \(node 1.0\) is starting"):
        third.result(0)
    assert nodes.told == []


def test_what_a_coordinator_that_ends_has_not_done_fails(roster, tmp_path):
    inbox = Inbox()
    handover = Handover(inbox)
    with Sockets() as sockets:
        inlet = sockets.answering(f"ipc://{tmp_path}/a")
        handover.open(Succession(roster, Nodes().tell, ""), TakeOver(sockets, inlet), inlet.address)
        assert handover.listening.result(0) == inlet.address
        waiting = handover.succeed("tcp://h:1", PLACES, 0.0), handover.take_over(inlet.address)
        inbox.make_calls()
        handover.end(PipelineClosed("over"))
    inbox.wakeup.close()
    for future in (*waiting, handover.take_over("tcp://127.0.0.1:*")):
        with pytest.raises(PipelineClosed, match="over"):
            future.result(0)


def test_an_inlet_listens_at_a_further_address_once_it_is_free(tmp_path, free_port):
    for address in (f"ipc://{tmp_path}/a", f"tcp://127.0.0.1:{free_port}"):
        with Sockets() as new, Sockets() as client:
            with Sockets() as old:
                old.answering(address)
                inlet = new.answering(f"ipc://{tmp_path}/b")
                assert not new.bind_also(inlet, address)
            wait_until(lambda: new.bind_also(inlet, address))  # noqa: B023  it is called at once
            client.connect(address).send(b"hello")
            found = wait_until(lambda: new.wait(0.1) and inlet.receive())  # noqa: B023
            assert found[1] == b"hello"
        assert not (tmp_path / "a").exists()


def test_closing_leaves_a_path_that_another_process_has_bound_since(tmp_path):
    """Before, it removed the socket of the process that had taken its place."""
    with Sockets() as old:
        old.answering(f"ipc://{tmp_path}/a")
        (tmp_path / "a").rename(tmp_path / "of the old one")
        (tmp_path / "a").touch()
    assert (tmp_path / "a").exists()


@pytest.mark.skipif(not may_return(), reason="this user may not leave idle priority again")
def test_all_threads_of_a_process_return_from_idle_priority():
    program = "import threading, sys; e = threading.Event(); [threading.Thread(target=e.wait, daemon=True).start() "
    program += "for _ in range(3)]; print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        timer = hold_back(process.pid, 3600)
        assert process.stdout.readline() == b"up\n"
        threads = [int(entry.name) for entry in Path(f"/proc/{process.pid}/task").iterdir()]
        assert len(threads) == 4
        assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_IDLE}
        bring_forward(process.pid)
        assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_OTHER}
        timer.cancel()
        late = hold_back(process.pid, 0.05)
        assert isinstance(late, threading.Timer)
        late.join()
        assert os.sched_getscheduler(process.pid) == os.SCHED_OTHER
        process.stdin.close()
    bring_forward(process.pid)  # it has ended, which is no error


def test_a_process_that_could_not_return_stays_at_normal_priority(monkeypatch):
    monkeypatch.setattr("runtime.background.may_return", lambda: False)
    assert hold_back(os.getpid(), 1.0) is None
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_local_launcher_beside_another_has_its_own_folder_and_loads_first_nodes_in_the_background(tmp_path):
    partition(build.save(build.chain(4), tmp_path), stages=1, out=tmp_path / "m.plan", costs="analytic")
    first = LocalLauncher(memory_bytes=5)
    second = first.beside(load_plan(tmp_path / "m.plan"), background_s=3.0)
    try:
        assert first.folder != second.folder
        assert first.rendezvous.control != second.rendezvous.control
        commands = []
        for _ in range(2):
            handle = second.start(connect="ipc:///nowhere", stage=0, replica=0, number=1)
            command = Path(f"/proc/{handle.pid}/cmdline")  # the kernel fills it in a little after the start
            wait_until(lambda command=command: command.read_text() != "")
            commands.append(command.read_text().split("\0"))
            handle.kill()
            handle.end(60)
        assert ["--background" in words for words in commands] == [True, False]
        assert "5" in commands[0]
    finally:
        first.close(keep_logs=False)
        second.close(keep_logs=False)
