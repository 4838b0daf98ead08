"""A notebook whose cells run several times, as its user edits them, leaves nothing behind."""

from __future__ import annotations

import os

import psutil
import pytest
from processes import running
from waiting import wait_until

pytest.importorskip("nbclient", reason="needs the extra test")
pytest.importorskip("ipykernel", reason="needs the extra test")

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

LAUNCH = """
import numpy as np
from onnxsplit import Pipeline
pipeline = Pipeline.launch({plan!r}, threads=1)
"""
RUN = "pipeline.run(np.ones((1, 32), np.float32))['y'].shape"
SHOW = "display(pipeline)\ndisplay(pipeline.plan)\npipeline.stats()"
MAP = "sum(1 for _ in pipeline.map([np.ones((1, 32), np.float32)] * 20))"
NODES = "[node.pid for node in pipeline.nodes]"
FORGET = "del pipeline"


@pytest.fixture
def notebook(tmp_path, chain_plan, python_environment, monkeypatch):
    """A notebook with a kernel of its own."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", python_environment["PYTHONPATH"])
    cells = [LAUNCH.format(plan=str(chain_plan)), RUN, SHOW, MAP, NODES, FORGET]
    book = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    client = NotebookClient(book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    with client.setup_kernel():
        yield client


def shown(client: NotebookClient, number: int) -> list[nbformat.NotebookNode]:
    """Run a cell; return its outputs."""
    return list(client.execute_cell(client.nb.cells[number], number).outputs)


def test_a_cell_that_runs_again_leaves_no_nodes_of_the_pipeline_before(notebook):
    rounds = []
    for _ in range(3):
        shown(notebook, 0)
        (result,) = shown(notebook, 1)
        assert result.data["text/plain"] == "(1, 32)"
        pipeline, plan, stats = shown(notebook, 2)
        assert "<svg" in pipeline.data["text/html"]
        assert "2 of 2 nodes ready" in pipeline.data["text/plain"]
        assert "<svg" in plan.data["text/html"]
        assert "<table>" in stats.data["text/html"]
        assert shown(notebook, 3)[0].data["text/plain"] == "20"
        pids = [int(pid) for pid in shown(notebook, 4)[0].data["text/plain"].strip("[]").split(",")]
        assert len(running(pids)) == 2
        rounds.append(pids)
        for before in rounds[:-1]:
            wait_until(lambda before=before: not running(before), "the nodes of the dropped pipeline have ended")
    shown(notebook, 5)
    wait_until(lambda: not running(rounds[-1]), "the nodes of the last pipeline have ended")


def test_nodes_end_with_the_kernel(notebook):
    shown(notebook, 0)
    pids = [int(pid) for pid in shown(notebook, 4)[0].data["text/plain"].strip("[]").split(",")]
    kernel = psutil.Process(pids[0]).ppid()
    assert kernel != os.getpid()
    os.kill(kernel, 9)
    wait_until(lambda: not running(pids), "the nodes have ended")
