"""Warm-up: a model has answered requests before it counts as ready."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import build
import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from served import Served

from onnxsplit.errors import InputError
from onnxsplit.npz import save_npz
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from runtime.gateway.models.warmup import Warmup


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm")
    model = build.save(build.chain(), folder)
    partition(model, stages=2, out=folder / "chain.plan", rounds=0, inputs={"x": np.ones((2, 32), np.float32)})
    return folder / "chain.plan"


def refusal(*words: object, environment: dict[str, str]) -> str:
    """What a server says that does not start."""
    command = [sys.executable, "-P", "-m", "onnxsplit", "serve", "--http-port", "0", "--grpc-port", "0"]
    done = subprocess.run(
        [*command, *map(str, words)], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode in (1, 2), done.stderr
    return done.stderr


def runs(server: Served) -> list[float]:
    return [server.metric("onnxsplit_node_requests_total", f'stage="{stage}"') for stage in (0, 1)]


def test_each_model_answers_so_many_requests_before_it_is_ready(plan, tmp_path, python_environment):
    save_npz(tmp_path / "three.npz", {"x": np.ones((3, 32), np.float32)})
    words = ("--warmup", "5", "--warmup", tmp_path / "three.npz", "--micro-batch", "0")
    with Served(plan, *words, environment=python_environment) as server:
        assert runs(server) == [10.0, 10.0]
        assert server.json("/v2/models/chain/stats")["model_stats"][0]["inference_count"] == 0, "no client asked"
        assert any("warmup=10" in line for line in server.log)
        server.ask("/v2/repository/models/chain/unload", b"{}")
        assert server.ask("/v2/repository/models/chain/load", b"{}")[0] == 200
        assert runs(server) == [10.0, 10.0], "the new nodes are warm too"


def test_a_warm_up_request_that_fails_names_the_model_and_ends_the_server(plan, tmp_path, python_environment):
    save_npz(tmp_path / "wrong.npz", {"x": np.ones((3, 31), np.float32)})
    said = refusal(plan, "--warmup", tmp_path / "wrong.npz", environment=python_environment)
    assert re.search("a warm-up request of model 'chain' failed: .*expected 32", said)


def test_a_file_for_no_model_and_a_number_out_of_range_are_refused(plan, tmp_path, python_environment):
    save_npz(tmp_path / "other.npz", {"z": np.ones(1)})
    with pytest.raises(InputError, match=r"other\.npz holds z, .* inputs of no model: chain takes x"):
        Warmup.read(("3", str(tmp_path / "other.npz"))).check({"chain": load_plan(plan)})
    for word, reason in (
        (tmp_path / "other.npz", "the inputs of no model"),
        (tmp_path / "missing.npz", "missing.npz"),
        ("-3", "too many or too few"),
        ("1000000000", "too many or too few"),
    ):
        assert reason in refusal(plan, "--warmup", word, environment=python_environment)


def test_a_server_that_is_told_to_stop_gives_its_warm_up_up(plan, tmp_path, python_environment):
    save_npz(tmp_path / "many.npz", {"x": np.ones((20_000, 32), np.float32)})
    command = [sys.executable, "-P", "-m", "onnxsplit", "serve", plan, "--http-port", "0", "--grpc-port", "off"]
    command += ["--warmup", "100000", "--warmup", tmp_path / "many.npz"]  # hours
    server = subprocess.Popen([*map(str, command)], env=python_environment, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    with server.stderr as log:
        assert any("pipeline ready" in line for line in log)
        server.send_signal(signal.SIGTERM)
        rest = log.read()
    assert server.wait(60) == 0
    assert "stopping" in rest
    assert "loaded" not in rest
