"""The annotated model computes the same, and its multi-device fields are consistent."""

from __future__ import annotations

import json
from pathlib import Path

import build
import numpy as np
import onnx
import pytest

from onnxsplit.model.multi_device import check_multi_device
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import examine_for, write_plan
from onnxsplit.session import open_session
from onnxsplit.views.annotate import CONFIGURATION, annotate


def made(tmp_path, proto=None, **options):
    model = build.save(proto or build.diamond(), tmp_path)
    wanted = CutOptions(**{"stages": 2, **options})
    return write_plan(examine_for(model, wanted, costs="analytic"), tmp_path / "model.plan", wanted)


def test_stages_times_and_names_are_in_the_model(tmp_path):
    files = annotate(made(tmp_path), tmp_path / "out.onnx")
    assert {file.name for file in files} == {"out.onnx", "out.onnx.time.json", "out.onnx.memory.json"}
    model = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(model)
    assert check_multi_device(model) == []
    assert model.ir_version >= 11
    assert model.configuration[0].num_devices == 2
    names = [node.name for node in model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    for node in model.graph.node:
        stage = node.device_configurations[0].pipeline_stage
        metadata = {entry.key: entry.value for entry in node.metadata_props}
        assert metadata["layer_ann"] == f"stage{stage}"
        assert metadata["namespace"].startswith(f"stage {stage}")
        assert int(metadata["onnxsplit.time_ns"]) >= 0


def loadable(folder: Path) -> Path:
    """Return the annotated model as IR 10, which the oldest ONNX Runtime loads, too; it ignores unknown fields."""
    model = onnx.load(folder / "out.onnx", load_external_data=False)
    model.ir_version = 10
    (folder / "loadable.onnx").write_bytes(model.SerializeToString())
    return folder / "loadable.onnx"


def test_the_annotated_model_gives_the_same(tmp_path):
    annotate(made(tmp_path, build.chain()), tmp_path / "out.onnx")
    given = {"x": np.ones((2, 32), np.float32)}
    both = [open_session(path, threads=1).run(given)["y"] for path in (tmp_path / "model.onnx", loadable(tmp_path))]
    np.testing.assert_array_equal(*both)


def test_overlays_name_every_op(tmp_path):
    annotate(made(tmp_path), tmp_path / "out.onnx")
    model = onnx.load(tmp_path / "out.onnx")
    for kind in ("time", "memory"):
        overlay = json.loads((tmp_path / f"out.onnx.{kind}.json").read_text())
        results = overlay[model.graph.name]["results"]
        assert set(results) == {node.name for node in model.graph.node}
        assert all(entry["value"] >= 0 for entry in results.values())
        assert overlay[model.graph.name]["gradient"]


def test_annotating_again_replaces_what_was_there(tmp_path):
    annotate(made(tmp_path, build.chain()), tmp_path / "model.onnx")
    wanted = CutOptions(stages=3)
    again = write_plan(examine_for(tmp_path / "model.onnx", wanted, costs="analytic"), tmp_path / "p", wanted)
    annotate(again, tmp_path / "again.onnx")
    model = onnx.load(tmp_path / "again.onnx")
    assert [entry.name for entry in model.configuration] == [CONFIGURATION]
    assert max(node.device_configurations[0].pipeline_stage for node in model.graph.node) == 2
    assert all(len(node.device_configurations) == 1 for node in model.graph.node)


def test_external_data_goes_along(tmp_path):
    onnx.save(build.chain(), tmp_path / "model.onnx", save_as_external_data=True, size_threshold=0)
    wanted = CutOptions(stages=2)
    result = write_plan(examine_for(tmp_path / "model.onnx", wanted, costs="analytic"), tmp_path / "p", wanted)
    annotate(result, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").is_file()
    open_session(loadable(tmp_path), threads=1).run({"x": np.ones((2, 32), np.float32)})


def broken(change):
    model = build.diamond()
    model.ir_version = 11
    model.configuration.add(name="c", num_devices=2, device=["a", "b"])
    for node in model.graph.node:
        node.device_configurations.add(configuration_id="c", pipeline_stage=0)
    change(model)
    return model


def shard(model, **fields):
    entry = model.graph.node[0].device_configurations[0]
    entry.sharding_spec.add(**fields)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m: setattr(m, "ir_version", 10), "need 11"),
        (lambda m: m.configuration.add(name="c", num_devices=1), "occurs 2 times"),
        (lambda m: m.configuration.add(name="", num_devices=1), "has no name"),
        (lambda m: m.configuration.add(name="d", num_devices=0), "has 0 devices"),
        (lambda m: m.configuration.add(name="d", num_devices=3, device=["x"]), "names 1 devices but declares 3"),
        (lambda m: setattr(m.graph.node[0].device_configurations[0], "configuration_id", "z"), "does not have"),
        (lambda m: m.graph.node[0].device_configurations.add(configuration_id="c"), "two entries"),
        (lambda m: setattr(m.graph.node[0].device_configurations[0], "pipeline_stage", -1), "below 0"),
        (lambda m: setattr(m.graph.node[0].device_configurations[0], "pipeline_stage", 1), "later stage 1"),
        (lambda m: shard(m, tensor_name="nothing", device=[0]), "neither reads nor writes"),
        (lambda m: shard(m, tensor_name="x", device=[5]), "device 5 of 2"),
        (lambda m: shard(m, tensor_name="x", device=[-1]), "not defined"),
    ],
)
def test_the_validator_finds(change, word):
    assert any(word in problem for problem in check_multi_device(broken(change)))


def test_the_validator_finds_nothing_in_a_sound_model():
    assert check_multi_device(broken(lambda m: None)) == []
    assert check_multi_device(build.diamond()) == []
