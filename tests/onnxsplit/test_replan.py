"""Planning a plan anew: answers stay the model's, the new cut is never worse, and what cannot be done is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import build
import custom
import decoders
import msgspec.structs
import numpy as np
import onnx
import pages
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxsplit.cli import cli
from onnxsplit.cluster import Cluster, Device, Link
from onnxsplit.custom_ops import EXTENSIONS
from onnxsplit.errors import OnnxsplitError, PlanError
from onnxsplit.plan_files import load_plan, plan_id, read_plan_file
from onnxsplit.planning.op_costs import load_costs
from onnxsplit.planning.place import place
from onnxsplit.planning.planner import partition
from onnxsplit.planning.replan import Replanned, replan
from onnxsplit.stages.merge import merge
from onnxsplit.stages.verify import run_stages, verify

SLOW = {"0": 0.2}
ROWS = 64  # so that a layer takes longer than a message
WIDE = 512  # weights of 1 MiB, which stay in the old files until they are copied


def cut(proto: onnx.ModelProto, folder: Path, **options) -> tuple[Path, Path]:
    """A model in a file, and its plan."""
    model = build.save(proto, folder)
    options = {"stages": 2, "costs": "analytic"} | options
    partition(model, out=folder / "m.plan", **options)
    return model, folder / "m.plan"


def again(plan: Path, speeds=None, **options) -> Replanned:
    """The result of planning anew; the new plan is beside the old one."""
    return replan(plan, out=plan.parent / "new.plan", speeds=speeds or {}, **options)


def is_the_model(plan: Path, model: Path, **options) -> bool:
    """Whether a plan gives bit-equal outputs without optimisation, and good ones with it."""
    return all(one.good and one.exact for one in verify(plan, model, **options))


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Path, Path]:
    """A chain of twelve layers with large weights, and its plan of two stages."""
    return cut(build.chain(12, WIDE), tmp_path_factory.mktemp("chain"), dims={"batch": ROWS})


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, Path]:
    """The same with measured costs."""
    folder = tmp_path_factory.mktemp("measured")
    return cut(build.chain(12, WIDE), folder, costs="measured", effort="quick", rounds=1, dims={"batch": ROWS})


def answers(plan: Path, inputs: dict) -> dict[str, np.ndarray]:
    """The outputs of a plan's stages."""
    return run_stages(plan, load_plan(plan), inputs, threads=1)


MODELS = {
    "a network": (lambda: build.random_dag(3), {}),
    "several outputs": (build.heads, {}),
    "a body of If": (build.with_if, {}),
    "tasks": (build.heads, {"strategy": "task", "stages": None}),
    "layers": (lambda: build.chain(8, WIDE), {"strategy": "layer"}),
    "replicas": (lambda: build.chain(8, WIDE), {"parallel": "hybrid", "devices": 4, "stages": None}),
    "a memory limit": (lambda: build.chain(8, WIDE), {"max_memory": 14 << 20}),
    "constraints": (
        lambda: build.chain(8, WIDE),
        {"no_cut": ["h4", "h5"], "also_cut": ["h1"], "together": ["matmul[67]"], "stages": 3},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_gives_the_model_s_answers_after_it_was_planned_anew(name, tmp_path):
    proto, options = MODELS[name]
    model, plan = cut(proto(), tmp_path, **options)
    found = again(plan, SLOW)
    assert found.new_ns <= found.old_ns
    if found.folder is not None:
        assert is_the_model(found.folder, model)
        assert load_plan(found.folder) == found.plan


def test_only_the_cut_changes(measured):
    model, plan = measured
    before = load_plan(plan)
    found = again(plan, {"0": 0.02})
    new = load_plan(found.folder)
    assert found.gain == pytest.approx(found.old_ns / found.new_ns)
    assert [stage.ops for stage in new.stages] != [stage.ops for stage in before.stages]
    assert new.parent == found.parent == plan_id(read_plan_file(plan))
    assert before.parent is None
    same = ("model", "dims", "inputs", "outputs", "batch", "strategy", "parallel", "objective", "example_inputs")
    assert all(getattr(new, name) == getattr(before, name) for name in same)
    assert new.tensors["x"] == before.tensors["x"]
    assert {spec.batch_axis for spec in new.tensors.values()} == {0}
    assert [stage.measured_time_ns for stage in new.stages] == [None, None]
    assert (new.costs.rounds, new.costs.source) == ((), "measured")
    assert found.parent[:12] in new.costs.note
    assert new.prediction.bottleneck_ns == found.new_ns
    assert [device.speed for device in new.target.devices] == [0.02, 1.0]
    old_ops, new_ops = (load_costs(folder / "costs.npz") for folder in (plan, found.folder))
    assert old_ops == new_ops
    assert is_the_model(found.folder, model)


def test_weights_are_copied_once_and_become_external_data(chain):
    _, plan = chain
    found = again(plan, SLOW)
    stored = sum(file.size_bytes for stage in found.plan.stages for file in stage.files if file.name.endswith(".data"))
    assert stored == 12 * 4 * WIDE**2
    merge(found.folder, plan.parent / "back.onnx")
    onnx.checker.check_model(str(plan.parent / "back.onnx"))


@pytest.mark.parametrize("fixture", ["chain", "measured"])
def test_a_plan_at_the_speeds_that_it_was_made_for_stays(fixture, request):
    _, plan = request.getfixturevalue(fixture)
    found = again(plan, least_gain=5)
    assert (found.gain < 1.05, found.folder) == (True, None)
    assert found.plan == load_plan(plan)
    assert found.old_ns == load_plan(plan).prediction.bottleneck_ns


def test_a_grandchild_is_as_good_as_a_child(chain, tmp_path):
    model, plan = chain
    child = again(plan, SLOW)
    grandchild = replan(child.folder, out=tmp_path / "back.plan", speeds={"0": 5.0})
    assert [device.speed for device in grandchild.plan.target.devices] == [1.0, 1.0]
    assert grandchild.new_ns <= again(plan).old_ns * 1.02
    assert is_the_model(grandchild.folder, model)
    assert grandchild.plan.parent == child.plan.parent or grandchild.plan.parent == grandchild.parent


def test_times_of_the_stages_move_the_cut_as_speeds_do(chain):
    _, plan = chain
    before = load_plan(plan)
    times = [stage.reference_time_ns for stage in before.stages]
    assert again(plan, stage_times_ns=times).old_ns == again(plan).old_ns
    found = again(plan, stage_times_ns=[times[0] * 4, times[1]])
    assert found.gain > 1.2
    assert found.plan.stages[0].ops < before.stages[0].ops
    assert sum(stage.reference_time_ns for stage in found.plan.stages) == pytest.approx(
        times[0] * 4 + times[1], rel=0.01
    )


def test_too_small_a_gain_writes_nothing(chain, tmp_path):
    _, plan = chain
    found = replan(plan, out=tmp_path / "new.plan", speeds=SLOW, least_gain=1000.0)
    assert found.folder is None
    assert found.gain > 1.2
    assert found.plan == load_plan(plan)
    assert list(tmp_path.iterdir()) == []


def test_a_slow_replica_is_not_dropped_where_it_helps(tmp_path):
    cluster = Cluster((Device("a", "h1"), Device("b", "h2")), {("h1", "h2"): Link(bytes_per_s=10**12)})
    (tmp_path / "cluster.toml").write_text(cluster.to_toml())
    _, plan = cut(build.chain(8, WIDE), tmp_path, stages=None, parallel="data", cluster=tmp_path / "cluster.toml")
    assert load_plan(plan).stages[0].replicas == 2
    usual_ns = again(plan).old_ns
    for speed in (0.4, 0.1):
        found = again(plan, {"a": speed})
        assert (found.folder, found.gain) == (None, 1.0)
        assert found.old_ns == pytest.approx(usual_ns * 2 / (1 + speed), rel=0.05)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 40), st.lists(st.floats(0.05, 20), min_size=3, max_size=3))
def test_a_new_plan_is_never_worse_and_scores_as_it_says(tmp_path_factory, seed, speeds):
    folder = tmp_path_factory.mktemp("random")
    _, plan = cut(build.random_dag(seed), folder, stages=None, parallel="hybrid", devices=3)
    found = again(plan, {str(number): speed for number, speed in enumerate(speeds)})
    assert found.new_ns <= found.old_ns
    if found.folder is not None:
        same = replan(found.folder, out=folder / "third.plan")
        assert same.old_ns == found.new_ns == found.plan.prediction.bottleneck_ns


@pytest.fixture
def cluster_file(tmp_path) -> Path:
    devices = (Device("big", "h1", speed=2.0), Device("small", "h1"), Device("far", "h2", speed=4.0))
    links = {("h1", "h2"): Link(latency_ns=100_000, bytes_per_s=10_000_000, delay_ns=50_000, compressed=True)}
    file = tmp_path / "cluster.toml"
    file.write_text(Cluster(devices, links, caller="h1").to_toml())
    return file


def test_a_cluster_comes_back_with_its_links_and_its_idle_devices(tmp_path, cluster_file):
    model, plan = cut(build.chain(12, WIDE), tmp_path, stages=None, cluster=cluster_file, place={"matmul0": "big"})
    before = load_plan(plan)
    assert [device.name for device in before.target.devices] == ["big", "small", "far"]
    found = again(plan)
    assert (found.gain, found.old_ns) == (1.0, before.prediction.bottleneck_ns)
    found = again(plan, {"big": 0.1})
    assert found.folder is not None
    assert found.gain > 1
    assert is_the_model(found.folder, model)
    assert found.plan.stages[0].device == "big"  # the user placed an op there
    by_host = again(plan, {"h1": 0.01, "small": 3.0})
    assert by_host.speeds == {"big": 0.01, "small": 3.0, "far": 1.0}


def test_a_placed_plan_is_planned_anew_for_the_devices_that_it_was_placed_on(tmp_path, cluster_file):
    model, plan = cut(build.chain(12, WIDE), tmp_path)
    placed = place(plan, cluster_file, out=tmp_path / "placed.plan")
    found = again(tmp_path / "placed.plan")
    assert found.old_ns == placed.prediction.bottleneck_ns
    found = again(tmp_path / "placed.plan", {"far": 0.01, "big": 0.2})
    assert is_the_model(found.folder, model)


@pytest.mark.parametrize("made", [decoders.gqa, decoders.plain, decoders.lstm, decoders.merged])
def test_a_decoder_stays_one(made, tmp_path):
    model, plan = cut(made(), tmp_path, costs="measured", effort="quick", rounds=0)
    before = load_plan(plan)
    found = again(plan)
    assert found.old_ns == before.prediction.bottleneck_ns
    found = again(plan, {"0": 0.05})
    new = found.plan
    assert is_the_model(found.folder, model)
    same = [
        msgspec.structs.replace(
            one.decoder, states=tuple(msgspec.structs.replace(state, stage=0) for state in one.decoder.states)
        )
        for one in (before, new)
    ]
    assert same[0] == same[1]


@pytest.mark.parametrize("border", ["float16", "int8", "auto"])
def test_narrow_borders_stay_narrow(border, tmp_path):
    inputs = {"x": np.random.default_rng(0).standard_normal((64, WIDE)).astype(np.float32)}
    options = {"inputs": inputs, "costs": "measured", "effort": "quick", "border": border, "tolerance": 0.05}
    file = tmp_path / "cluster.toml"
    file.write_text(
        Cluster((Device("a", "h1"), Device("b", "h2")), {("h1", "h2"): Link(bytes_per_s=10_000_000)}).to_toml()
    )
    _, plan = cut(build.chain(12, WIDE), tmp_path, cluster=file, rounds=1, **options)
    before = load_plan(plan)
    found = again(plan, {"a": 0.05})
    assert found.folder is not None
    borders = found.plan.borders
    assert (borders.asked, borders.tolerance) == (border, 0.05)
    if border != "auto":
        assert [one.form for one in borders.tensors] == [border]
        assert borders.error is None
        assert found.plan.tensors[borders.tensors[0].wire[0]].batch_axis == 0
    else:
        assert {one.tensor for one in borders.tensors} <= {one.tensor for one in before.borders.tensors}
    whole, new = (answers(folder, inputs)["y"] for folder in (plan, found.folder))
    assert np.abs(new - whole).max() < 0.1 * np.abs(whole).max()
    same = replan(found.folder, out=tmp_path / "third.plan", least_gain=5)
    assert same.old_ns == found.new_ns


def test_inputs_and_outputs_that_were_kept_and_dropped_stay_so(tmp_path):
    """x and a scale with a default -> y and z; one output is a constant, one an input, and another was dropped."""
    one = helper.make_tensor("scale", TensorProto.FLOAT, [1], [2.0])
    offset = helper.make_tensor("offset", TensorProto.FLOAT, [1], [3.0])
    table = build.constant("table", np.arange(5, dtype=np.int64))
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["a"]),
        helper.make_node("Add", ["a", "offset"], ["b"]),
        helper.make_node("Tanh", ["b"], ["y"]),
        helper.make_node("Sigmoid", ["b"], ["z"]),
        helper.make_node("Exp", ["side"], ["dropped"]),
    ]
    inputs = [build.value(name, [n]) for name, n in (("x", "batch"), ("scale", 1), ("offset", 1), ("side", "batch"))]
    outputs = [build.value(name, ["batch"]) for name in ("y", "z", "dropped", "x")]
    proto = build.model(nodes, inputs, [*outputs, build.value("table", [5], TensorProto.INT64)], [one, offset, table])
    model, plan = cut(proto, tmp_path, keep_inputs=["scale"], drop_outputs=["dropped"], stages=2)
    before = load_plan(plan)
    found = again(plan, {"0": 0.001, "1": 0.0001})
    assert found.folder is not None
    for name in (
        "inputs",
        "outputs",
        "defaults",
        "constant_inputs",
        "dropped_outputs",
        "dropped_inputs",
        "passthrough",
    ):
        assert getattr(found.plan, name) == getattr(before, name)
    inputs = {"x": np.array([0.1, 0.2], np.float32), "scale": np.array([7.0], np.float32)}
    old, new = (answers(folder, inputs) for folder in (plan, found.folder))
    assert all(np.array_equal(old[name], new[name]) for name in ("y", "z"))
    assert is_the_model(found.folder, model)


def test_a_model_with_external_data_and_tied_weights_is_stored_once(tmp_path):
    """x -> a -> b -> y, where the first and the last layer share their weight."""
    proto = build.chain(8, WIDE)
    proto.graph.node[14].input[1] = "w0"
    del proto.graph.initializer[7]
    onnx.save(proto, tmp_path / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=1024)
    partition(tmp_path / "model.onnx", stages=2, out=tmp_path / "m.plan", costs="analytic")
    found = again(tmp_path / "m.plan", {"0": 0.001})
    child = again(found.folder.rename(tmp_path / "child.plan"), {"0": 1000.0})
    for folder in (tmp_path / "child.plan", child.folder):
        assert is_the_model(folder, tmp_path / "model.onnx")
        assert load_plan(folder).costs.whole_weight_bytes == 7 * 4 * WIDE**2


def test_custom_ops_stay_in_the_stages_that_need_them(tmp_path):
    custom.extensions()
    text = {"text": np.array(["a model runs cuts"], dtype=object)}
    model, plan = cut(custom.tokenizer(), tmp_path, stages=3, custom_ops=[EXTENSIONS], inputs=text, costs="measured",
                      rounds=1)  # fmt: skip
    found = again(plan, {"0": 0.01, "1": 0.02})
    assert found.folder is not None
    assert found.plan.custom_ops == load_plan(plan).custom_ops
    assert is_the_model(found.folder, model, custom_ops=[EXTENSIONS])


def test_a_model_without_ops_stays_as_it_is(tmp_path):
    proto = build.model([], [build.value("x", ["batch"])], [build.value("x", ["batch"])])
    _, plan = cut(proto, tmp_path)
    found = again(plan, {"0": 0.5})
    assert (found.gain, found.folder, found.old_stages) == (1.0, None, ())


def changed(plan: Path, folder: Path, **changes) -> Path:
    """A copy of a plan with other fields."""
    shutil.copytree(plan, folder)
    (folder / "plan.json").write_bytes(msgspec.structs.replace(load_plan(plan), **changes).to_json())
    return folder


def test_plans_that_cannot_be_planned_anew_are_refused(chain, tmp_path):
    _, plan = chain
    before = load_plan(plan)
    cases = {
        "did not keep the costs": {"costs": msgspec.structs.replace(before.costs, ops=None)},
        "partition the model again": {"target": None},
        "objective memory": {"objective": "memory"},
        "--cut-at": {"target": msgspec.structs.replace(before.target, cut_at=("h3",))},
        "does not say which device": {
            "stages": tuple(msgspec.structs.replace(stage, device_numbers=()) for stage in before.stages)
        },
    }
    for number, (words, changes) in enumerate(cases.items()):
        with pytest.raises(PlanError, match=words):
            replan(changed(plan, tmp_path / f"{number}.plan", **changes), out=tmp_path / "out.plan")
    assert not (tmp_path / "out.plan").exists()


@pytest.mark.parametrize("file", ["stage0.onnx", "stage1.onnx", "costs.npz", "example.npz"])
@pytest.mark.parametrize("harm", ["other bytes", "truncated", "missing"])
def test_a_damaged_plan_is_refused(chain, tmp_path, file, harm):
    _, plan = chain
    shutil.copytree(plan, tmp_path / "m.plan")
    path = tmp_path / "m.plan" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(content if harm == "other bytes" else content[:-7])
    with pytest.raises(PlanError, match=rf"was changed or is incomplete:\n  - {file}"):
        again(tmp_path / "m.plan", SLOW)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.plan"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"speeds": {"2": 0.5}}, "'2' is neither a device nor a host of the plan. Devices: 0, 1; hosts: local"),
        ({"speeds": {"0": 0}}, "the speed of '0' must be a number from 1e-06 to 1e\\+06, not 0;"),
        ({"speeds": {"0": -1.0}}, "must be a number from 1e-06 to"),
        ({"speeds": {"0": float("nan")}}, "must be a number from 1e-06 to"),
        ({"speeds": {"local": "fast"}}, "must be a number from 1e-06 to"),
        ({"stage_times_ns": [1]}, "1 times were given for the 2 stages"),
        ({"stage_times_ns": [1, 0]}, "the time of a stage in ns must be a whole number"),
        ({"least_gain": -1}, "--least-gain must be a number of at least 0"),
    ],
)
def test_arguments_that_are_not_allowed_are_refused_with_what_is(chain, tmp_path, arguments, words):
    _, plan = chain
    with pytest.raises(PlanError, match=words):
        replan(plan, out=tmp_path / "out.plan", **arguments)


def test_a_plan_is_not_written_over_itself_or_over_something_else(chain, tmp_path):
    _, plan = chain
    with pytest.raises(PlanError, match="cannot take the place of"):
        replan(plan, out=plan.parent / "." / plan.name, speeds=SLOW)
    (tmp_path / "mine").write_text("")
    with pytest.raises(PlanError, match="holds no plan"):
        replan(plan, out=tmp_path, speeds=SLOW)


def test_nothing_is_left_where_the_new_plan_cannot_be_written(chain, tmp_path, monkeypatch):
    def fails(*_):
        raise OnnxsplitError("the disk is full")

    monkeypatch.setattr("onnxsplit.planning.replanning.save_costs", fails)
    with pytest.raises(OnnxsplitError, match="full"):
        replan(chain[1], out=tmp_path / "out.plan", speeds=SLOW)
    assert list(tmp_path.iterdir()) == []


def test_the_command_shows_both_cuts_as_the_page_does(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(chain[1], tmp_path / "model.plan")
    shown = pages.block_of("docs/cutting.md", "$ onnxsplit replan")
    ((_, line),) = pages.commands(shown)
    done = CliRunner().invoke(cli, line.split()[1:])
    assert done.exit_code == 0, done.output
    rows = [text for text in shown.splitlines()[1:] if "──" not in text]
    told = [text for text in done.output.splitlines() if "──" not in text]
    assert re.fullmatch(pages.pattern("\n".join(rows)), "\n".join(told).strip())
    assert load_plan("model.replan.plan").parent == plan_id(read_plan_file(Path("model.plan")))


def test_the_command_tells_all_as_json_and_loads_no_onnx_runtime(chain, tmp_path, python_environment):
    code = "import sys; from onnxsplit.cli import cli; cli(standalone_mode=False); print('onnxruntime' in sys.modules)"
    arguments = ["replan", chain[1], "--speeds", "0=0.2", "--times", "3,2.5", "-o", tmp_path / "o.plan", "--json"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        env=python_environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text, loaded = done.stdout.splitlines()
    assert loaded == "False"
    result = json.loads(text)
    assert result.keys() == {"plan", "parent", "gain", "old_ns", "new_ns", "stages", "seconds"}
    assert result["plan"] == str(tmp_path / "o.plan")
    assert result["gain"] == pytest.approx(result["old_ns"] / result["new_ns"])
    assert [stage["before"]["devices"] for stage in result["stages"]] == [["0"], ["1"]]
    assert result["seconds"].keys() == {"reading", "search", "writing"}


@pytest.mark.parametrize("arguments", [["--speeds", "0"], ["--speeds", "0=x"], ["--speeds", "0=nan"],
                                       ["--speeds", "0=0"], ["--speeds", "0=1", "--speeds", "0=2"],
                                       ["--times", "1,x"], ["--times", ""], ["--least-gain", "-1"]])  # fmt: skip
def test_wrong_usage_of_the_command_has_exit_code_2(chain, arguments):
    assert CliRunner().invoke(cli, ["replan", str(chain[1]), *arguments]).exit_code == 2
