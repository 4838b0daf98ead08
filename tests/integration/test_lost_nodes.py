"""A server whose nodes are started by hand: a node's key is revoked, or its only node is killed, while it serves."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import build
import numpy as np
import ports
import pytest
import zmq

pytest.importorskip("uvicorn", reason="needs the extra serve")

import tritonclient.grpc as triton_grpc
from processes import children_of
from served import Served
from waiting import wait_until

from onnxsplit.plan_files import load_plan, plan_id
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import run_stages
from runtime.wire import codec
from runtime.wire.keys import Keys, allow, create_for, revoke
from runtime.wire.messages.control import PROTOCOL, Hello, Stop
from runtime.wire.messages.files import Fetch

X = np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lost")
    partition(build.save(build.chain(), folder), stages=2, out=folder / "m.plan", costs="analytic")
    return folder / "m.plan"


@pytest.fixture
def keys(tmp_path):
    create_for(tmp_path / "keys", ("a", "b", "c"))
    return tmp_path / "keys"


@contextmanager
def served(plan, keys, port, environment, *words):
    """A server with one node of each stage; yields the server and a function that starts another node."""
    address = f"tcp://127.0.0.1:{port}"
    started: list[subprocess.Popen] = []

    def start(name: str, stage: int) -> subprocess.Popen:
        command = ["onnxsplit", "node", "--connect", address, "--keys", keys / name, "--stage", stage]
        command = [sys.executable, "-P", "-m", *map(str, command), "--no-shared-memory"]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        return started[-1]

    first = [start("a", 0), start("b", 1)]
    source = ["--launcher", "none", "--elastic", "--bind", address, "--keys", keys / "coordinator"]
    try:
        with Served(plan, *source, *words, environment=environment) as server:
            yield server, first, start
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
            process.communicate(timeout=60)


def ask(server: Served) -> list[float]:
    tensor = {"name": "x", "shape": [1, 32], "datatype": "FP32", "data": X.ravel().tolist()}
    return server.json("/v2/models/m/infer", {"inputs": [tensor]})["outputs"][0]["data"]


@contextmanager
def asking(server: Served, wanted):
    """Requests one after the other; yields the number of answers so far, and raises the first failure."""
    ended, answers, failures = threading.Event(), [], []

    def run() -> None:
        while not ended.is_set() and not failures:
            try:
                answers.append(np.allclose(ask(server), wanted, atol=1e-5))
            except (AssertionError, OSError) as error:
                failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield lambda: len(answers)
    finally:
        ended.set()
        thread.join(60)
    assert not failures, failures
    assert all(answers)


@pytest.fixture(scope="module")
def wanted(plan):
    return run_stages(plan, load_plan(plan), {"x": X}, threads=1)["y"].ravel()


def up(server: Served) -> float:
    return server.metric("onnxsplit_node_up")


def test_a_revoked_node_is_cut_off_while_the_others_serve_and_a_new_key_is_admitted(
    plan, keys, wanted, free_port, python_environment
):
    coordinator = keys / "coordinator"
    revoke(coordinator, "c")
    with served(plan, keys, free_port, python_environment) as (server, first, start), asking(server, wanted) as count:
        stranger = start("c", 1)
        assert stranger.wait(60) == 1
        assert "it does not allow this process's key" in stranger.stderr.read()
        allow(coordinator, keys / "c" / "public.key", "c")
        start("c", 1)
        wait_until(lambda: up(server) == 3)
        before = count()
        revoke(coordinator, "b")
        assert first[1].wait(60) == 1
        assert "had its key revoked" in first[1].stderr.read()
        wait_until(lambda: up(server) == 2)
        wait_until(lambda: count() > before + 5)
        assert first[0].poll() is None


@contextmanager
def linked(context: zmq.Context, own: Keys, port: int):
    """A connected link to a port of the coordinator, with the keys of a node."""
    with context.socket(zmq.DEALER) as link:
        link.linger, link.rcvtimeo = 0, 60_000
        link.curve_publickey, link.curve_secretkey = own.pair.public.encode(), own.pair.secret.encode()
        link.curve_serverkey = own.of("coordinator").encode()
        with link.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED) as connected:
            link.connect(f"tcp://127.0.0.1:{port}")
            assert connected.poll(60_000)
            link.disable_monitor()
        yield link


def test_a_connection_that_was_opened_before_its_key_was_revoked_gets_neither_place_nor_files(
    plan, keys, free_port, python_environment
):
    own = Keys(keys / "c")
    hello = codec.encode(Hello(PROTOCOL, 0, 1, "h", "tcp://127.0.0.1:9", 1, -1, "", None, own.pair.public))
    fetch = codec.encode(Fetch(plan_id((plan / "plan.json").read_bytes()), 0, 10))
    results, files = ports.free_port(), ports.free_port()
    with (
        served(plan, keys, free_port, python_environment, "--ports", f"{results},{files}") as (server, *_),
        zmq.Context() as context,
        linked(context, own, free_port) as control,
        linked(context, own, files) as fetching,
    ):
        fetching.send(fetch)
        assert fetching.recv_multipart()[-1] == (plan / "plan.json").read_bytes()[:10]
        revoke(keys / "coordinator", "c")
        control.send(hello)
        answer = codec.decode_coordinator_control(control.recv_multipart()[-1])
        assert isinstance(answer, Stop)
        assert (answer.fate, "its key was revoked" in answer.reason) == ("refused", True)
        fetching.send(fetch)
        assert not fetching.poll(500), "it gets no more files"
        assert up(server) == 2


def readiness(server: Served) -> tuple[int, int, bool, bool]:
    """What the probes of the server and of the model say, over HTTP and gRPC."""
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        over_grpc = client.is_server_ready(), client.is_model_ready("m")
    return server.ask("/v2/health/ready")[0], server.ask("/v2/models/m/ready")[0], *over_grpc


READY, UNREADY = (200, 200, True, True), (503, 503, False, False)


def test_with_a_grace_the_server_stays_ready_and_holds_requests_until_a_killed_node_is_back(
    plan, keys, wanted, free_port, python_environment
):
    with served(plan, keys, free_port, python_environment, "--ready-grace", 600) as (server, first, start):
        assert readiness(server) == READY
        first[1].send_signal(signal.SIGKILL)
        wait_until(lambda: server.metric("onnxsplit_model_ready") == 0, "the loss")
        with asking(server, wanted) as count:
            assert readiness(server) == READY
            assert count() == 0
            start("b", 1)
            wait_until(lambda: count() > 3)
        assert server.metric("onnxsplit_model_ready") == 1
        assert readiness(server) == READY


@pytest.mark.parametrize("words", [(), ("--ready-grace", 0.1)])
def test_without_a_grace_or_after_it_the_server_is_not_ready_until_the_node_is_back(
    plan, keys, free_port, python_environment, words
):
    with served(plan, keys, free_port, python_environment, *words) as (server, first, start):
        first[1].send_signal(signal.SIGKILL)
        wait_until(lambda: readiness(server) == UNREADY)
        assert "stage 1 has no node that is ready" in server.ask("/v2/health/ready")[2].decode()
        start("b", 1)
        wait_until(lambda: readiness(server) == READY)
        first[0].send_signal(signal.SIGKILL)
        wait_until(lambda: readiness(server) == UNREADY)
        start("a", 0)
        wait_until(lambda: readiness(server) == READY)


def test_a_model_that_was_unloaded_has_no_grace(plan, python_environment):
    with Served(plan, "--ready-grace", 600, environment=python_environment) as server:
        assert server.ask("/v2/repository/models/m/unload", b"{}")[0] == 200
        assert server.ask("/v2/models/m/ready")[0] == 503
        assert server.ask("/v2/health/ready")[0] == 503


def test_a_stage_whose_nodes_do_not_come_back_has_no_grace(plan, python_environment):
    with Served(plan, "--ready-grace", 600, environment=python_environment) as server:

        def refused() -> bool:
            for node in children_of(server.process.pid, "runtime.node"):
                node.kill()
            return server.ask("/v2/health/ready")[0] == 503

        assert server.ask("/v2/health/ready")[0] == 200
        wait_until(refused, "requests are refused, and the server is not ready")
