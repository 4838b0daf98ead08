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

import ports
from served import Served

from onnxsplit.planning.planner import partition

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


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


def on_this_host(text: str) -> str:
    """Commands with the addresses of other hosts as ports of this one."""
    addresses: dict[str, int] = {}

    def local(found: re.Match) -> str:
        if found[0] not in addresses:
            addresses[found[0]] = ports.free_port()
        return f"127.0.0.1:{addresses[found[0]]}"

    return re.sub(r"10\.0\.0\.\d:\d+", local, text)


@pytest.mark.parametrize(("page", "lasting"), [("README.md", 3), ("docs/hosts.md", 4)])
def test_from_one_host_to_three_in_a_few_lines(page, lasting, tmp_path, python_environment):
    section = (ROOT / page).read_text().split("## From one host to three")[1].split("\n## ")[0]
    for name, text in re.findall(r"```toml file=(\S+)\n(.*?)```", section, re.DOTALL):
        (tmp_path / name).write_text(text)
    (shell,) = re.findall(r"```\n(\$.*?)```", section, re.DOTALL)[:1]
    lines = on_this_host(shell.strip()).splitlines()
    assert len(lines) <= 13
    build.save(build.chain(8), tmp_path)
    running, serve = [], []
    try:
        for line in lines:
            prompt, words = line.partition(" #")[0].split("$ ")
            place = tmp_path / prompt if prompt else tmp_path
            if words.startswith("scp"):
                for source, host, name in re.findall(r"scp -r (\S+) (host-\w):(\w*)", words):
                    shutil.copytree(tmp_path / source, tmp_path / host / (name or Path(source).name))
                continue
            command = words.removeprefix("onnxsplit ").split()
            run = [sys.executable, "-P", "-m", "onnxsplit", *command]
            if command[0] == "serve":
                serve = command[1:]
            elif command[0] == "node" or command[:2] == ["cluster", "agent"]:
                running.append(subprocess.Popen(run, cwd=place, env=python_environment, stderr=subprocess.DEVNULL))
            else:
                subprocess.run(run, cwd=place, env=python_environment, check=True, capture_output=True)
        with Served(*serve, environment=python_environment, folder=tmp_path) as server:
            row = [float(number) for number in range(32)]
            body = {"inputs": [{"name": "x", "shape": [1, 32], "datatype": "FP32", "data": row}]}
            assert server.json("/v2/models/model/infer", body)["outputs"][0]["shape"] == [1, 32]
    finally:
        for process in running:
            process.terminate()
            process.wait(60)
    assert len(running) == lasting
