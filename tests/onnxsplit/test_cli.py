"""The command line as other tools call it: exit codes, --json, messages, and how soon help is there."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import build
import numpy as np
import pytest

from onnxsplit.tensors import load_npz, save_npz


@pytest.fixture
def onnxsplit(python_environment, tmp_path):
    def call(*arguments: object, code: int = 0):
        done = subprocess.run(
            [sys.executable, "-m", "onnxsplit", *map(str, arguments)],
            capture_output=True, text=True, env=python_environment, cwd=tmp_path, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return call


def test_partition_verify_run_with_no_other_option(onnxsplit, tmp_path):
    build.save(build.chain(), tmp_path)
    table = onnxsplit("partition", "model.onnx").stdout
    for word in (
        "whole model",
        "stage 0",
        "stage 1",
        "ideal",
        "weights",
        "bytes out",
        "Next: onnxsplit verify model.plan",
    ):
        assert word in table
    assert "equal" in onnxsplit("verify", "model.plan", "model.onnx").stdout
    save_npz(tmp_path / "in.npz", {"x": np.ones((5, 32), np.float32)})
    onnxsplit("run", "model.plan", "--inputs", "in.npz", "--outputs", "out.npz")
    assert load_npz(tmp_path / "out.npz")["y"].shape == (5, 32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.npz", "model.onnx", "model.plan", "out.npz"]


def test_json_is_one_object_on_stdout(onnxsplit, tmp_path):
    build.save(build.chain(), tmp_path)
    made = json.loads(onnxsplit("partition", "model.onnx", "--costs", "analytic", "--json").stdout)
    assert len(made["summary"]["stages"]) == 2
    assert json.loads(onnxsplit("verify", "model.plan", "model.onnx", "--json").stdout)["good"] is True
    assert (
        json.loads(onnxsplit("inspect", "model.onnx", "--costs", "analytic", "--json").stdout)["inspection"]["ops"]
        == 12
    )
    ran = json.loads(onnxsplit("run", "model.plan", "--json", "--outputs-only", "y").stdout)
    assert ran["outputs"]["y"]["shape"] == [1, 32]


def test_inspect_tells_ops_cost_and_cuts(onnxsplit, tmp_path):
    build.save(build.chain(), tmp_path)
    told = onnxsplit("inspect", "model.onnx").stdout
    for word in ("12 ops in 12 atoms", "MatMul", "Input x: float32 [batch, 32]", "best cuts in two"):
        assert word in told


def test_bench_puts_the_pipeline_beside_its_ceiling(onnxsplit, tmp_path):
    build.save(build.chain(8, width=256), tmp_path)
    onnxsplit("partition", "model.onnx", "--costs", "analytic")
    report = json.loads(
        onnxsplit(
            "bench", "model.plan", "--model", "model.onnx", "--slices", 3, "--slice-seconds", 0.1, "--json"
        ).stdout
    )["bench"]
    assert len(report["rows"]) == 4
    assert all(row["per_s"] > 0 for row in report["rows"])


def test_failures_exit_with_1_and_one_message(onnxsplit, tmp_path):
    assert onnxsplit("partition", "absent.onnx", code=1).stderr == "onnxsplit: no such model file: absent.onnx\n"
    error = json.loads(onnxsplit("partition", "absent.onnx", "--json", code=1).stdout)["error"]
    assert error == {"type": "ModelError", "message": "no such model file: absent.onnx"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["partition"], ["partition", "m", "--dim", "x"], ["run", "p", "--mode", "both"]],
)
def test_wrong_usage_exits_with_2(onnxsplit, arguments):
    onnxsplit(*arguments, code=2)


def test_an_environment_variable_stands_for_an_option(onnxsplit, tmp_path, python_environment):
    build.save(build.chain(), tmp_path)
    python_environment["ONNXSPLIT_PARTITION_STAGES"] = "3"
    made = json.loads(onnxsplit("partition", "model.onnx", "--costs", "analytic", "--json").stdout)
    assert len(made["summary"]["stages"]) == 3


def test_help_comes_at_once(python_environment):
    times = []
    for _ in range(5):
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "onnxsplit", "--help"], capture_output=True, env=python_environment
        )
        times.append(time.monotonic() - begun)
        assert b"partition" in done.stdout
    assert sorted(times)[2] < 0.5, "0.25 s on a quiet machine; this leaves room for a busy one"


def test_importing_the_package_loads_nothing_heavy(python_environment):
    code = (
        "import onnxsplit, sys; print(sorted({'onnx', 'onnxruntime', 'networkx', 'numpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=python_environment)
    assert done.stdout == "[]\n"


def test_help_of_every_command_imports_nothing_heavy(python_environment):
    code = (
        "import sys, click.testing, onnxsplit.cli as c\n"
        "for name in c.cli.list_commands(None):\n"
        "    assert click.testing.CliRunner().invoke(c.cli, [name, '--help']).exit_code == 0\n"
        "print(sorted({'onnx', 'onnxruntime', 'networkx', 'numpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=python_environment)
    assert done.stdout == "[]\n", done.stderr
