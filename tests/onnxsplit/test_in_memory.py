"""Models in memory are cut like the files with the same content."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import build
import numpy as np
import onnx
import onnxruntime
import pytest

import onnxsplit
from onnxsplit.errors import ModelError
from onnxsplit.model import in_memory
from onnxsplit.model.in_memory import open_any, runnable
from onnxsplit.planning.examine import examine
from onnxsplit.session import open_session
from onnxsplit.stages.verify import verify

CHEAP = {"stages": 2, "rounds": 1}


def as_path(path: Path):
    return path


def as_text(path: Path):
    return str(path)


def as_path_like(path: Path):
    class Like:
        def __fspath__(self) -> str:
            return os.fspath(path)

    return Like()


def as_bytes(path: Path):
    return path.read_bytes()


def as_proto(path: Path):
    return onnx.load(path)


def as_ir(path: Path):
    return pytest.importorskip("onnx_ir").load(path)


@pytest.mark.parametrize("given", [as_path, as_text, as_path_like, as_bytes, as_proto, as_ir])
def test_a_model_is_cut_however_it_is_given(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    path = build.save(build.chain(), tmp_path)
    model = given(path)
    plan = onnxsplit.partition(model, **CHEAP)
    in_file = given in (as_path, as_text, as_path_like)
    folder = Path("model.plan" if in_file else "g.plan")
    assert plan.model.name == ("model.onnx" if in_file else "g")
    assert plan.costs.source == "measured"
    assert all(found.good for found in verify(folder, model))
    if given is not as_ir:  # other versions may write the same model in other bytes
        assert all(found.good for found in verify(folder, path))


def test_what_is_given_is_not_changed(tmp_path):
    proto = build.chain()
    before = proto.SerializeToString()
    onnxsplit.partition(proto, out=tmp_path / "plan", costs="analytic", **CHEAP)
    assert proto.SerializeToString() == before


@pytest.mark.parametrize(
    ("name", "folder"), [("", "model"), ("../a b/c", "a_b_c"), ("été", "été"), ("x" * 300, "x" * 100)]
)
def test_a_plan_of_a_model_in_memory_is_named_after_its_graph(tmp_path, monkeypatch, name, folder):
    monkeypatch.chdir(tmp_path)
    proto = build.diamond()
    proto.graph.name = name
    onnxsplit.partition(proto.SerializeToString(), costs="analytic", **CHEAP)
    assert [found.name for found in tmp_path.iterdir()] == [f"{folder}.plan"]


class Module:
    """An object with the attributes of a PyTorch model."""


Module.__module__, Module.__qualname__ = "torch.nn.modules.module", "Module"


def test_what_is_no_model_is_refused_with_what_to_do(tmp_path):
    path = build.save(build.chain(), tmp_path)
    with path.open("rb") as file:
        for given, words in (
            (type("Net", (Module,), {})(), r"a PyTorch model cannot .*onnxsplit export"),
            (onnxruntime.InferenceSession(path), "an onnxruntime session"),
            (file, r"an open file \(give its path"),
            (build.chain().graph, "make_model"),
            (None, "an object of type NoneType"),
            (np.zeros(3), "an object of type ndarray"),
            (b"", "no ONNX graph"),
            (b"PK\x03\x04" * 9, "not an ONNX model"),
        ):
            with pytest.raises(ModelError, match=words):
                onnxsplit.partition(given, out=tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


def external(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "m.onnx"
    path.parent.mkdir()
    onnx.save(build.chain(), path, save_as_external_data=True, location="m.data", size_threshold=0)
    return path


def test_data_in_files_of_a_model_in_memory_is_asked_for(tmp_path, monkeypatch):
    path = external(tmp_path)
    monkeypatch.chdir(path.parent)  # the folder that happens to hold the data must not count
    bare = onnx.load(path, load_external_data=False)
    for given in (bare, bare.SerializeToString()):
        with pytest.raises(ModelError, match=r"'w0' lies in the file 'm.data'.*load_external_data_for_model"):
            open_any(given)
    assert onnxsplit.partition(onnx.load(path), out=tmp_path / "plan", costs="analytic", **CHEAP).model.name == "g"


def test_an_onnx_ir_model_says_itself_where_its_data_lies(tmp_path, monkeypatch):
    ir = pytest.importorskip("onnx_ir")
    path = external(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = ir.load(path.relative_to(tmp_path))
    monkeypatch.chdir(path.parent.parent)
    plan = onnxsplit.partition(model, out=tmp_path / "plan", **CHEAP)
    assert plan.costs.source == "measured"
    assert all(found.good for found in verify(tmp_path / "plan", model))
    other = tmp_path / "other"
    other.mkdir()
    (other / "m.data").write_bytes((path.parent / "m.data").read_bytes())
    first = next(iter(model.graph.initializers.values()))
    first.const_value.base_dir = other
    with pytest.raises(ModelError, match=r"lie in 2 folders.*onnx_ir.save"):
        open_any(model)


def test_a_model_too_large_for_memory_says_how_to_save_it(monkeypatch):
    monkeypatch.setattr(in_memory, "_MOST_BYTES", 1000)
    for given in (build.chain(), build.chain().SerializeToString()):
        with pytest.raises(ModelError, match=r"2 GB.*save_as_external_data=True"):
            open_any(given)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_nothing_is_left_of_the_copy_that_was_run(tmp_path, monkeypatch, failure):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def interrupted(model, *_, **__):
        seen.append(model)
        raise failure

    examine(build.chain(), costs="measured", threads=1)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("onnxsplit.cost.measured.best_level", interrupted)
    with pytest.raises(failure):
        examine(build.chain(), costs="measured", threads=1)
    assert seen[0].is_relative_to(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("external", [False, True])
def test_weights_that_are_inputs_too_are_constants_where_the_model_is_timed(tmp_path, external):
    proto = build.chain(4)
    proto.graph.input.extend([build.value(name, [32, 32]) for name in ("w1", "w2")])
    proto.ir_version = 3
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=external, size_threshold=0, location="m.data")
    source = open_any(tmp_path / "m.onnx")
    x = {"x": np.ones((2, 32), np.float32)}
    expected = open_session(tmp_path / "m.onnx", threads=1).run(x)["y"]
    with runnable(source) as file:
        assert file.path == tmp_path / "m.onnx"
    with runnable(source, as_in_stages=True) as file:
        assert [value.name for value in onnx.load(file.path, load_external_data=False).graph.input] == ["x"]
        session = open_session(file.path.read_bytes(), threads=1, external_data_folder=file.data_folder)
        assert np.array_equal(session.run(x)["y"], expected)
        folder = file.path.parent
    assert not folder.exists()
    assert [value.name for value in source.proto.graph.input] == ["x", "w1", "w2"]
