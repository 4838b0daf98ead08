"""Changing the plan of pipelines of other kinds: with nodes started by hand, and with a decoder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import build
import numpy as np
import psutil
import pytest
from decoder_parts import Size
from decoder_runs import Family, Reference
from decoders import gqa
from waiting import wait_until

import onnxsplit
from onnxsplit import Pipeline, RecutRefused
from runtime.timings import Timings

X = np.ones((1, 32), np.float32)
QUICK = Timings(beat_s=0.2, silence_s=2.0, stall_s=3.0, stall_factor=5)


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """Plans of one model, cut early, late, and in three stages."""
    folder = tmp_path_factory.mktemp("chains")
    model = build.save(build.chain(), folder)
    for name, cut_at in {"early": ["h0"], "late": ["h4"], "three": ["h1", "h3"]}.items():
        onnxsplit.partition(model, out=folder / f"{name}.plan", cut_at=cut_at, effort="quick")
    return folder


@pytest.fixture
def by_hand(chains, tmp_path, python_environment):
    """A pipeline of two nodes that were started by hand; yields it, its address, and a function that starts a node."""
    address = f"ipc://{tmp_path}/control"
    nodes: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address]
        with (tmp_path / f"node-{len(nodes)}.log").open("wb") as log:
            nodes.append(subprocess.Popen(command, env=python_environment, stdout=log, stderr=log))
        return nodes[-1]

    start(), start()
    with Pipeline.listen(chains / "early.plan", bind=address, timings=QUICK, start_timeout=60) as pipeline:
        yield pipeline, start, nodes
    for node in nodes:
        assert node.wait(30) is not None


def test_nodes_started_by_hand_succeed_themselves(chains, by_hand):
    pipeline, start, nodes = by_hand
    expected = pipeline.run({"x": X})["y"]
    stop, answered = threading.Event(), []

    def call() -> None:
        while not stop.is_set():
            answered.append(np.allclose(pipeline.run({"x": X})["y"], expected, rtol=1e-4, atol=1e-5))

    caller = threading.Thread(target=call)
    caller.start()
    for name in ("late", "early"):
        recut = pipeline.recut(chains / f"{name}.plan").result(120)
        assert recut.kept
        pids = sorted(node.pid for node in pipeline.nodes)
        # the processes that the user knows have stayed, each with one child
        wait_until(lambda: sorted(child.pid for n in nodes for child in psutil.Process(n.pid).children()) == pids)  # noqa: B023
    with pytest.raises(RecutRefused, match="the new plan needs 3 nodes, and 2 that were started by hand take part"):
        pipeline.recut(chains / "three.plan").result(60)
    stop.set()
    caller.join(60)
    assert all(answered)
    assert len(answered) > 10
    os.kill(nodes[0].pid, signal.SIGKILL)  # its successor ends with it
    nodes[0].wait(30)
    wait_until(lambda: sum(node.state == "ready" for node in pipeline.nodes) == 1)
    start()  # a node that is started again with the address that the user knows
    wait_until(lambda: sum(node.state == "ready" for node in pipeline.nodes) == 2)
    assert np.allclose(pipeline.run({"x": X}, timeout=60)["y"], expected, rtol=1e-4, atol=1e-5)


def test_fixed_ports_leave_no_room_for_a_second_plan(chains, python_environment, free_port):
    address = f"tcp://127.0.0.1:{free_port}"
    command = [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address, "--insecure"]
    nodes = [subprocess.Popen(command, env=python_environment) for _ in range(2)]
    ports = free_port + 1, free_port + 2
    with Pipeline.listen(
        chains / "early.plan", bind=address, ports=ports, insecure=True, timings=QUICK, start_timeout=60
    ) as pipeline:
        with pytest.raises(RecutRefused, match=rf"the fixed ports {ports[0]} and {ports[1]}"):
            pipeline.recut(chains / "late.plan").result(60)
        assert pipeline.run({"x": X})["y"].shape == (1, 32)
    for node in nodes:
        node.wait(30)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """Two plans of a decoder of three layers."""
    folder = tmp_path_factory.mktemp("decoders")
    model = build.save(gqa(Size(context=512)), folder)
    for stages in (2, 3):
        onnxsplit.partition(model, stages=stages, out=folder / f"{stages}.plan")
    return folder


def test_sequences_stay_with_the_plan_that_they_began_on(decoders):
    prompts = [[5, 71, 13, row] for row in range(4)]
    family = Family(lambda seed=0: gqa(Size(context=512), seed=seed))
    wanted = [tuple(Reference(family).greedy(prompt, 150)) for prompt in prompts]
    with Pipeline.launch(decoders / "2.plan", threads=1) as pipeline:
        begun = [pipeline.generate(prompt, max_tokens=150, stop_tokens=()) for prompt in prompts]
        first = pipeline.entrance.current
        recut = pipeline.recut(decoders / "3.plan")
        wait_until(lambda: pipeline.entrance.current is not first or recut.done())
        later = [pipeline.generate(prompt, max_tokens=150, stop_tokens=()) for prompt in prompts]
        assert [each.result(120).tokens for each in begun] == wanted
        assert [each.result(120).tokens for each in later] == wanted
        assert recut.result(120).kept
        assert len(pipeline.plan.stages) == 3
        assert pipeline.generate(prompts[0], max_tokens=5, stop_tokens=()).result(60).tokens == wanted[0][:5]


def test_a_decoder_is_planned_anew(decoders):
    with Pipeline.launch(decoders / "2.plan", threads=1) as pipeline:
        tokens = pipeline.generate([5, 6, 7], max_tokens=20, stop_tokens=()).result(60).tokens
        recut = pipeline.recut(devices={"0": 0.3}).result(120)
        assert recut.predicted_gain >= 1.0
        assert recut.kept is (recut.predicted_gain > 1.0)
        assert pipeline.generate([5, 6, 7], max_tokens=20, stop_tokens=()).result(60).tokens == tokens
