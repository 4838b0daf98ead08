"""What the README says of serving works as it stands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import build
import numpy as np
import pytest
from onnx import helper

pytest.importorskip("uvicorn", reason="needs the extra serve")

from served import Served

from onnxsplit.planner import partition

README = Path(__file__).parents[2] / "README.md"


def test_serving_in_ten_lines(tmp_path, python_environment):
    section = README.read_text().split("## Serve it")[1].split("\n## ")[0]
    shell, python = re.findall(r"```(?:python)?\n(.*?)```", section, re.DOTALL)[:2]
    assert len([line for line in (shell + python).splitlines() if line.strip()]) <= 10

    weight = build.constant("w", np.ones((3, 5), np.float32))
    ops = [
        helper.make_node("GlobalAveragePool", ["image"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    proto = build.model(ops, [build.value("image", [1, 3, 224, 224])], [build.value("logits", [1, 5])], [weight])
    partition(build.save(proto, tmp_path), stages=2, out=tmp_path / "model.plan", costs="analytic")

    install, serve, *asking = shell.strip().splitlines()
    assert install.startswith("$ pip install ")
    assert serve == "$ onnxsplit serve model.plan"
    with Served("model.plan", environment=python_environment, folder=tmp_path) as server:
        for line in asking:
            command = line.removeprefix("$ ").replace("localhost:8000", server.host)
            done = subprocess.run(command.split(), capture_output=True, text=True, check=True)
            assert "model" in done.stdout
        code = python.replace("localhost:8000", server.host)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, 5)"


def test_from_one_host_to_three_in_ten_lines(tmp_path, python_environment, free_port):
    section = README.read_text().split("## From one host to three")[1].split("\n## ")[0]
    (shell,) = re.findall(r"```\n(.*?)```", section, re.DOTALL)[:1]
    lines = shell.strip().replace("10.0.0.1:5555", f"127.0.0.1:{free_port}").splitlines()
    assert len(lines) <= 10
    build.save(build.chain(8), tmp_path)
    nodes, serve = [], []
    try:
        for line in lines:
            prompt, words = line.split("$ ")
            place = tmp_path / prompt if prompt else tmp_path
            if words.startswith("scp"):
                for source, host in re.findall(r"scp -r (\S+) (host-\w):", words):
                    shutil.copytree(tmp_path / source, tmp_path / host / Path(source).name)
                continue
            command = words.removeprefix("onnxsplit ").split()
            run = [sys.executable, "-P", "-m", "onnxsplit", *command]
            if command[0] == "serve":
                serve = command[1:]
            elif command[0] == "node":
                nodes.append(subprocess.Popen(run, cwd=place, env=python_environment, stderr=subprocess.DEVNULL))
            else:
                subprocess.run(run, cwd=place, env=python_environment, check=True, capture_output=True)
        with Served(*serve, environment=python_environment, folder=tmp_path) as server:
            row = [float(number) for number in range(32)]
            body = {"inputs": [{"name": "x", "shape": [1, 32], "datatype": "FP32", "data": row}]}
            assert server.json("/v2/models/model/infer", body)["outputs"][0]["shape"] == [1, 32]
    finally:
        for node in nodes:
            node.terminate()
            node.wait(20)
    assert len(nodes) == 3
