"""External data: the folders in which it may be, and the code that reads it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import build
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnxsplit.errors import ModelError
from onnxsplit.export import export
from onnxsplit.model.external_data import external_range, open_external
from onnxsplit.model.source import open_model
from onnxsplit.planning.calibrate import _files
from onnxsplit.planning.planner import partition
from onnxsplit.session import open_session
from onnxsplit.stages.merge import merge
from onnxsplit.stages.verify import run_stages, verify


def cache(folder: Path, *, inner: str = "", pieces: int = 1, model_is_link: bool = True) -> Path:
    """A model in a cache of Hugging Face: ``snapshots/abc`` holds links into ``blobs``; w2 is an output, too."""
    proto = build.chain(6, width=64)
    proto.graph.output.append(build.value("w2", [64, 64]))
    made, blobs, snapshot = folder / "made", folder / "blobs", folder / "snapshots" / "abc" / inner
    for place in (made, blobs, snapshot):
        place.mkdir(parents=True)
    onnx.save(proto, made / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    if pieces > 1:
        proto = onnx.load(made / "model.onnx", load_external_data=False)
        for number, tensor in enumerate(proto.graph.initializer):
            name = f"model.onnx_data_{number % pieces}"
            shutil.copy(made / "model.onnx_data", made / name)
            next(entry for entry in tensor.external_data if entry.key == "location").value = name
        (made / "model.onnx").write_bytes(proto.SerializeToString())
        (made / "model.onnx_data").unlink()
    for number, file in enumerate(sorted(made.iterdir())):
        if file.suffix == ".onnx" and not model_is_link:
            file.rename(snapshot / file.name)
            continue
        blob = file.rename(blobs / f"{number:04x}")
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot / "model.onnx"


LAYOUTS = {"flat": {}, "in a subfolder": {"inner": "onnx"}, "in several files": {"pieces": 3, "inner": "onnx"}}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("costs", ["measured", "analytic"])
def test_a_model_in_a_cache_of_links_is_cut_verified_merged_and_exported(tmp_path, layout, costs):
    model = cache(tmp_path / "cache", **layout)
    inputs = {"x": np.random.default_rng(0).random((3, 64), dtype=np.float32)}
    expected = open_session(model, threads=1, level="disabled").run(inputs)
    plan = partition(model, stages=2, out=tmp_path / "plan", costs=costs, rounds=1)
    assert plan.costs.source == costs
    assert all(comparison.good for comparison in verify(tmp_path / "plan", model))
    found = run_stages(tmp_path / "plan", plan, inputs, threads=1, level="disabled")
    assert all(np.array_equal(found[name], expected[name]) for name in ("y", "w2"))
    assert not [file for file in (tmp_path / "plan").iterdir() if file.is_symlink()]
    merge(tmp_path / "plan", tmp_path / "merged.onnx")
    merged = open_session(tmp_path / "merged.onnx", threads=1, level="disabled").run(inputs)
    assert np.array_equal(merged["y"], expected["y"])
    shutil.rmtree(tmp_path / "cache" / "made")
    (exported,) = export(str(model), tmp_path / "exported.onnx")
    assert set(exported.differences.values()) == {0.0}


def test_the_command_line_cuts_a_model_in_a_cache_of_links_from_its_own_folder(tmp_path):
    model = cache(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-m", "onnxsplit", "partition", "model.onnx", "--stages", "2", "-o", str(tmp_path / "plan")],
        cwd=model.parent,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert all(comparison.exact for comparison in verify(tmp_path / "plan", model))


def test_files_for_agents_keep_the_names_that_the_model_uses(tmp_path):
    model = cache(tmp_path, pieces=2)
    assert [file.name for file in _files(model)] == ["model.onnx", "model.onnx_data_0", "model.onnx_data_1"]


def test_data_that_is_a_link_out_of_the_folder_of_a_model_that_is_none_is_refused(tmp_path):
    """ONNX Runtime refuses this model, too: the blobs' folder is allowed only if the model is in it."""
    model = cache(tmp_path, model_is_link=False)
    with pytest.raises(ModelError) as refused:
        open_model(model)
    message = str(refused.value)
    for part in (model.parent / "model.onnx_data", tmp_path / "blobs" / "0001", f"allowed: {model.parent}"):
        assert str(part) in message


def test_both_allowed_folders_are_named_when_a_link_leads_elsewhere(tmp_path):
    model = cache(tmp_path)
    (tmp_path / "secret").write_bytes(bytes(1 << 20))
    (model.parent / "model.onnx_data").unlink()
    (model.parent / "model.onnx_data").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=rf"link to {tmp_path}/secret.*{model.parent} and {tmp_path}/blobs"):
        open_model(model)


def test_a_chain_of_links_is_followed_to_its_end(tmp_path):
    model = cache(tmp_path)
    (tmp_path / "secret").write_bytes(bytes(1 << 20))
    blob = (model.parent / "model.onnx_data").resolve()
    blob.rename(tmp_path / "blobs" / "real")
    blob.symlink_to("real")
    open_model(model)
    blob.unlink()
    blob.symlink_to("../secret")
    with pytest.raises(ModelError, match="outside the folders allowed"):
        open_model(model)


def test_a_folder_that_is_a_link_out_of_the_model_s_folder_is_refused(tmp_path):
    model = with_location(tmp_path / "model", "sub/w.bin")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w.bin").write_bytes(bytes(16))
    (model.parent / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="outside the folders allowed"):
        open_model(model)


def test_a_folder_of_the_model_that_is_a_link_is_no_obstacle(tmp_path):
    model = with_location(tmp_path / "model", "w.bin")
    (model.parent / "w.bin").write_bytes(bytes(16))
    (tmp_path / "named").symlink_to(model.parent)
    open_model(tmp_path / "named" / model.name)


def test_links_in_a_circle_and_links_to_nothing_are_named(tmp_path):
    model = with_location(tmp_path, "w.bin")
    (tmp_path / "w.bin").symlink_to("other")
    with pytest.raises(ModelError, match=r"w\.bin is a link to other, which does not exist"):
        open_model(model)
    (tmp_path / "other").symlink_to("w.bin")
    with pytest.raises(ModelError, match="Too many levels of symbolic links"):
        open_model(model)


def test_a_link_to_a_fifo_in_the_folder_is_refused_without_blocking(tmp_path):
    model = with_location(tmp_path, "w.bin")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "w.bin").symlink_to("fifo")
    with pytest.raises(ModelError, match="it is a FIFO"):
        open_model(model)


def test_data_that_becomes_a_link_after_it_was_looked_at_is_not_followed(tmp_path):
    model = with_location(tmp_path, "w.bin")
    (tmp_path / "w.bin").write_bytes(bytes(16))
    file, _, _ = external_range(model, open_model(model).proto.graph.initializer[0])
    (tmp_path / "w.bin").rename(tmp_path / "secret")
    (tmp_path / "w.bin").symlink_to("secret")
    with pytest.raises(OSError, match="Too many levels"):
        open_external(file)


def with_location(folder: Path, location: str) -> Path:
    folder.mkdir(exist_ok=True)
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, text in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=text)
    nodes = [onnx.helper.make_node("Add", ["x", "w"], ["y"])]
    return build.save(build.model(nodes, [build.value("x", [4])], [build.value("y", [4])], [tensor]), folder)


@pytest.mark.parametrize(
    ("key", "text", "problem"),
    [
        ("length", "16", "it declares 16 bytes, but its type and shape need 64"),
        ("offset", "1_0", "offset '1_0' is not a number of bytes"),
        ("offset", " 0 ", "offset ' 0 ' is not a number of bytes"),
        ("length", "9" * 40, "is not a number of bytes"),
        ("offset", "64", "needs 64 bytes at offset 64"),
    ],
)
def test_what_is_wrong_with_a_range_of_external_data_is_said(tmp_path, key, text, problem):
    path = with_location(tmp_path, "w.bin")
    (tmp_path / "w.bin").write_bytes(bytes(64))
    proto = onnx.load(path, load_external_data=False)
    (tensor,) = proto.graph.initializer
    tensor.dims[:] = [4, 4]
    del tensor.external_data[:]
    for name, value in {"location": "w.bin", "offset": "0", "length": "64", key: text}.items():
        tensor.external_data.add(key=name, value=value)
    with pytest.raises(ModelError, match=problem):
        external_range(path, tensor)


def test_a_length_of_zero_counts_as_missing(tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(64))
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for name, value in (("location", "w.bin"), ("length", "0")):
        tensor.external_data.add(key=name, value=value)
    assert external_range(tmp_path / "m.onnx", tensor) == (tmp_path / "w.bin", 0, 64)
