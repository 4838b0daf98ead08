"""``onnxsplit advise`` with real sessions and pipelines under load."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import build
import decoders
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from onnxsplit.cli import advise as command
from onnxsplit.cli import cli
from onnxsplit.npz import save_npz
from onnxsplit.plan_files import load_plan
from onnxsplit.views.advice import Advice


@pytest.fixture
def model(tmp_path_factory, monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return build.save(build.chain(8, 64), tmp_path_factory.mktemp("advise"))


@pytest.fixture(autouse=True)
def short_loads(monkeypatch):
    """Send load for as short as possible: no test depends on the precision."""
    monkeypatch.setitem(command._LOADS, "quick", {"turns": 1, "closed_s": 0.2, "open_s": 0.2, "steps": 2})


def advise(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["advise", *map(str, arguments), "--effort", "quick"])


def result(*arguments: object) -> Advice:
    done = advise(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return msgspec.convert(json.loads(done.stdout)["advice"], Advice)


def test_the_best_of_each_kind_is_run_and_the_commands_make_the_pick(model, tmp_path):
    advice = result(model, "--html", "picture.html", "--keep", "kept.plan")
    measured = [row for row in advice.rows if row.choice.measured is not None]
    assert {row.choice.candidate.kind for row in measured} == {"session", "replicas", "stages"}
    assert all(row.choice.measured.limit_per_s > 0 for row in measured)
    picked = advice.rows[0]
    assert picked.picked
    assert picked.choice.measured is not None
    assert load_plan(tmp_path / "kept.plan").stages
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.plan", "picture.html"]
    assert picked.name in (tmp_path / "picture.html").read_text()
    assert shlex.split(advice.commands[0])[:3] == ["onnxsplit", "serve", "kept.plan"]


def test_a_wish_that_nothing_fulfils_is_said_with_the_nearest_and_what_it_would_need(model, tmp_path):
    advice = result(model, "--rate", "900000", "--devices", "1")
    assert not advice.keeps
    assert advice.reason.startswith("No candidate gives what was asked for. The nearest is ")
    assert "times what these devices give" in advice.reason
    assert not list(tmp_path.iterdir())


def test_what_needs_too_much_memory_is_left_out_with_the_reason(model, tmp_path):
    whole = 4 * 64 * 64 * 8
    done = advise(model, "--max-memory", whole // 2, "--rate", "5", "--devices", "2")
    assert done.exit_code == 0, done.stderr
    assert "the whole model needs" in done.stdout
    assert "--max-memory" in done.stdout


def test_devices_of_other_hosts_are_predicted_and_not_run(model, tmp_path):
    (tmp_path / "cluster.toml").write_text(
        '[[device]]\nname = "here"\n[[device]]\nname = "far"\nhost = "host-b"\nspeed = 0.5\n'
    )
    advice = result(model, "--cluster", "cluster.toml")
    for row in advice.rows:
        far = "far" in row.choice.candidate.devices
        assert bool(row.choice.not_run) == far
        assert (row.choice.measured is None) == far
    assert {row.choice.candidate.devices for row in advice.rows} > {("here",)}


def test_one_of_several_providers_that_cannot_be_used_is_left_out_and_the_only_one_is_refused(model):
    advice = result(model, "--provider", "cpu,cuda", "--devices", "1")
    assert any("cuda" in row.choice.left_out.lower() for row in advice.rows)
    assert advice.rows[0].choice.measured is not None
    refused = advise(model, "--provider", "cuda")
    assert refused.exit_code == 1
    assert "cuda" in refused.stderr.lower()


def test_a_decoder_is_refused_with_what_to_do_instead(tmp_path):
    path = build.save(decoders.gqa(), tmp_path)
    done = advise(path)
    assert done.exit_code == 1
    assert "bench DIR --decode" in done.stderr
    assert done.stderr.count("\n") == 1


def test_requests_are_joined_where_the_batch_axis_is_proven(tmp_path):
    """Rows of a wide matrix product take far less time together."""
    path = build.save(build.chain(4, 512), tmp_path)
    save_npz(tmp_path / "in.npz", {"x": np.ones((1, 512), np.float32)})
    advice = result(path, "--inputs", tmp_path / "in.npz", "--devices", "1")
    joined = [row for row in advice.rows if row.choice.candidate.max_batch > 1]
    assert joined
    assert all("batch" in row.name for row in joined)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(model, tmp_path, number):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    work = tmp_path / "work"
    work.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "onnxsplit", "advise", model, "--effort", "quick", "-v"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=work,
        env={**os.environ, "TMPDIR": str(temporary)},
    ) as process:
        assert process.stderr is not None
        while "turn 1" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(60) == 128 + number, process.stderr.read()
    assert not [path for path in temporary.iterdir() if path.name != ".ses"]  # ONNX Runtime writes that one
    assert not list(work.iterdir())
