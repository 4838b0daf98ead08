"""Nodes on two hosts send int8 borders compressed: real processes over tcp that share no memory."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import build
import numpy as np
import pytest
from waiting import wait_until

from onnxsplit.cluster import Cluster, Device, Link
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import run_stages
from runtime import Pipeline

NODE = """
import sys
{before}
from runtime.wire import codec

plain = codec.decompressed

def decompressed(frame, size):
    print("decompressed", len(frame), "to", size, file=sys.stderr, flush=True)
    return plain(frame, size)

codec.decompressed = decompressed
from onnxsplit.cli import main
main()
"""
WITHOUT = 'sys.modules["zstandard"] = None'  # importing it fails
X = {"x": np.random.default_rng(0).standard_normal((128, 256)).astype(np.float32)}
X["x"][::2] = 0


@contextmanager
def nodes(address, folder, environment, before):
    """Start a node for each stage; yields the files of their logs."""
    logs, processes = [], []
    for stage, first in enumerate(before):
        logs.append(folder / f"node{stage}.log")
        command = [sys.executable, "-P", "-c", NODE.format(before=first), "node", "--connect", address]
        command += ["--stage", str(stage), "--no-shared-memory"]
        with logs[-1].open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, stderr=log, stdout=log))
    try:
        yield logs
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(60)


@pytest.mark.parametrize(
    ("before", "says", "compresses"),
    [
        (("", ""), (r"compressing tensors stage=0 to=\d", ""), True),
        (("", WITHOUT), ("zstandard is not installed at the reader", "zstandard is not installed here"), False),
        ((WITHOUT, ""), ("zstandard is not installed here", ""), False),
    ],
    ids=["both", "reader-lacks-it", "writer-lacks-it"],
)
def test_borders_cross_compressed_if_both_ends_can(tmp_path, free_port, python_environment, before, says, compresses):
    link = Link(bytes_per_s=2_000_000, compressed=True)
    (tmp_path / "c.toml").write_text(Cluster((Device("one", "a"), Device("two", "b")), {("a", "b"): link}).to_toml())
    model, folder = build.save(build.chain(8, 256), tmp_path), tmp_path / "m.plan"
    options = {"costs": "analytic", "dims": {"batch": 128}, "cluster": tmp_path / "c.toml", "border": "int8"}
    plan = partition(model, stages=2, out=folder, **options)
    assert [border.compressed for border in plan.borders.tensors] == [(1,)]
    wanted = run_stages(folder, load_plan(folder), X, threads=1)["y"]
    address = f"tcp://127.0.0.1:{free_port}"

    with nodes(address, tmp_path, python_environment, before) as logs:
        with Pipeline.listen(folder, bind=address, start_timeout=60, shared_memory=False) as pipeline:

            def has_said() -> bool:
                assert np.array_equal(pipeline.run(X, timeout=60)["y"], wanted)
                return all(re.search(text, log.read_text()) for text, log in zip(says, logs, strict=True))

            wait_until(has_said)
            for _ in range(3):
                assert np.array_equal(pipeline.run(X, timeout=60)["y"], wanted)
            empty = pipeline.run({"x": np.zeros((0, 256), np.float32)}, timeout=60)
            assert empty["y"].shape == (0, 256)
        found = re.findall(r"decompressed (\d+) to (\d+)", logs[1].read_text())
    assert (len(found) >= 3) == compresses
    assert all(int(frame) < int(size) == 128 * 256 for frame, size in found)
    assert "decompressed" not in logs[0].read_text()
    for log in logs:
        assert log.read_text().count("compression:") <= 1, "it is said once"
