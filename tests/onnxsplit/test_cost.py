"""Measured times belong to the ops that do the work."""

from __future__ import annotations

import build
import numpy as np
from onnx import helper

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
