"""Measured times belong to the ops that do the work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import build
import numpy as np
from onnx import helper
from waiting import wait_until

from onnxsplit.planning.examine import examine


def test_the_time_of_a_fused_kernel_goes_to_the_op_with_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("onnxsplit.cost.levels.CANDIDATE_LEVELS", ("all",))  # the level that fuses
    source = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for step in range(3):
        weights.append(build.constant(f"w{step}", source.standard_normal((16, 16, 3, 3)).astype(np.float32) / 12))
        nodes.append(helper.make_node("Conv", [last, f"w{step}"], [f"c{step}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{step}"], [f"r{step}"]))
        last = f"r{step}"
    proto = build.model(nodes, [build.value("x", [1, 16, 64, 64])], [build.value(last, [1, 16, 64, 64])], weights)
    subject = examine(build.save(proto, tmp_path), costs="measured")
    convolutions, activations = subject.costs.time_ns[::2], subject.costs.time_ns[1::2]
    assert min(convolutions) > 0
    assert max(activations) == 0


def test_an_old_model_with_an_initializer_that_nothing_reads_is_measured(tmp_path):
    proto = build.chain(2)
    proto.ir_version = 3
    unused = build.constant("unused", np.ones(3, np.float32))
    proto.graph.initializer.append(unused)
    proto.graph.input.extend([build.value(t.name, list(t.dims)) for t in proto.graph.initializer])
    assert examine(build.save(proto, tmp_path)).costs.source == "measured"


PROFILE = """
import sys
from pathlib import Path
from onnxsplit.cost.profile import run_profile
from onnxsplit.model.in_memory import ModelFile
model, inputs = map(Path, sys.argv[1:])
run_profile(ModelFile(model, None), inputs, threads=1, level="disabled", provider="cpu", seconds=60.0)
"""


def test_an_interrupted_profile_leaves_no_files(tmp_path):
    size = build.constant("size", np.array([4000, 4000], np.int64))
    ops = [helper.make_node("Expand", ["x", "size"], ["a"]), helper.make_node("MatMul", ["a", "a"], ["b"])]
    ops += [helper.make_node("MatMul", ["a", "b"], ["c"]), helper.make_node("MatMul", ["a", "c"], ["y"])]
    model = build.save(build.model(ops, [build.value("x", [1, 1])], [build.value("y", [4000, 4000])], [size]), tmp_path)
    np.savez(tmp_path / "in.npz", x=np.ones((1, 1), np.float32))
    folder = tmp_path / "temporary"
    folder.mkdir()
    planning = subprocess.Popen(
        [sys.executable, "-c", PROFILE, str(model), str(tmp_path / "in.npz")],
        env={**os.environ, "TMPDIR": str(folder)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: list(folder.rglob("profile*")), "a profile")  # the session is made, and the model runs
    planning.send_signal(signal.SIGINT)
    planning.wait(30)
    assert not list(folder.glob("onnxsplit-*"))
