"""Files that are not ONNX models: the message names their kind and what to do."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import build
import numpy as np
import onnx
import pytest
from onnx import helper

from onnxsplit.errors import ModelError
from onnxsplit.model.source import open_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def zipped(*names: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return held.getvalue()


def tarred() -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.onnx"))
    return held.getvalue()


def arrays(**values) -> bytes:
    held = io.BytesIO()
    np.savez(held, **values)
    return held.getvalue()


def array() -> bytes:
    held = io.BytesIO()
    np.save(held, np.ones(3))
    return held.getvalue()


def safetensors() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."  # the first bytes of torch.save before 1.6
SAVED_MODEL = b"\x08\x01\x12\xe3\x8e\x01\n\x80\x01\n\x05serve" + bytes(200)
GRAPH_DEF = b"\n\x1b\n\x01x\x12\x0bPlaceholder*\x09\n\x05dtype" + bytes(40)

FILES = {
    "pointer.onnx": (POINTER, "Git LFS pointer.*git lfs pull"),
    "model.ort": (b"\x1c\0\0\0ORTM" + bytes(40), r"own format \(\.ort\).*\.onnx file"),
    "page.onnx": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "HTML page.*download it again"),
    "restricted.onnx": (b"Access to model acme/net is restricted. Please log in.", "text that begins with 'Access"),
    "model.onnx.gz": (gzip.compress(build.chain(1).SerializeToString()), "compressed by gzip.*gunzip"),
    "model.zip": (zipped("a/model.onnx", "b.txt"), "zip archive with 'a/model.onnx' in it.*unzip"),
    "model.tar": (tarred(), "tar archive.*tar -xf"),
    "arrays.npz": (arrays(x=np.ones(2)), "NumPy arrays.*--inputs"),
    "array.npy": (array(), "a NumPy array"),
    "model.safetensors": (safetensors(), "safetensors.*onnxsplit export FOLDER"),
    "model.gguf": (b"GGUF\x03\0\0\0" + bytes(40), r"GGUF.*: onnxsplit export \S*model\.gguf -o OUT\.onnx$"),
    "blob": (b"GGUF\x03\0\0\0" + bytes(40), r"GGUF file of llama\.cpp\. Make ONNX of it: onnxsplit export \S*blob -o"),
    "model.pt": (zipped("model/data.pkl", "model/data/0"), r"PyTorch.*onnxsplit export \S*model\.pt .*--trust"),
    "torch.onnx": (zipped("m/data.pkl"), r"Rename it to torch\.pt\. .*onnxsplit export \S*torch\.pt "),
    "pytorch_model.bin": (OLD_TORCH, r"file of PyTorch.*Rename it to pytorch_model\.pt.*state_dict"),
    "script.pt": (zipped("m/data.pkl", "m/constants.pkl", "m/code/n.py"), "TorchScript.*--trust"),
    "program.pt2": (zipped("p/archive_format", "p/data/w"), r"ExportedProgram.*onnxsplit export \S*program\.pt2"),
    "model.pkl": (pickle.dumps({"coefficients": [1.0]}), r"pickled.*onnxsplit export \S*model\.pkl.*--trust"),
    "model.joblib": (pickle.dumps([1]), r"onnxsplit export \S*model\.joblib"),
    "model.skops": (zipped("schema.json", "1.npy"), r"skops.*onnxsplit export \S*model\.skops"),
    "saved_model.pb": (SAVED_MODEL, r"SavedModel of TensorFlow.*onnxsplit export "),
    "frozen.pb": (GRAPH_DEF, "GraphDef.*tf2onnx"),
    "model.h5": (b"\x89HDF\r\n\x1a\n" + bytes(40), r"HDF5.*onnxsplit export \S*model\.h5"),
    "model.keras": (zipped("metadata.json", "config.json", "model.weights.h5"), r"onnxsplit export \S*model\.keras"),
    "model.tflite": (b"\x1c\0\0\0TFL3" + bytes(40), r"TFLite.*onnxsplit export \S*model\.tflite"),
    "model.xml": (b'<?xml version="1.0"?>\n<net name="n" version="11">', "OpenVINO.*no way back"),
    "other.xml": (b'<?xml version="1.0"?>\n<pmml>', "XML, not a model"),
    "model.mlmodel": (b"\x08\x04\x12\x10" + bytes(40), "CoreML.*no way back"),
    "model.cbm": (b"CBM1" + bytes(40), r"CatBoost.*onnxsplit export \S*model\.cbm"),
    "model.txt": (b"tree\nversion=v4\nnum_class=1\n", r"LightGBM.*onnxsplit export \S*model\.txt"),
    "model.json": (b'{"learner": {"attributes": {}}}', r"XGBoost.*onnxsplit export \S*model\.json"),
    "config.json": (b'{"model_type": "gpt2"}', r"configuration of transformers.*onnxsplit export \S*config\.json"),
    "some.json": (b'{"error": "Repository not found"}', "JSON, not a model"),
    "recipe.py": (b"import torch\n", r"Python code.*onnxsplit export \S*recipe\.py"),
    "zeros.onnx": (bytes(5000), "only zeros.*fetch it again"),
    "half.zip": (zipped("model.onnx")[:40], "zip archive that is truncated"),
    "notes.onnx": (b"remember the milk\n", "text that begins with 'remember the milk'"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_is_and_what_to_do_is_said(tmp_path, name):
    content, words = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"(?s){name} is not an ONNX model: it is .*{words}"):
        open_model(tmp_path / name)


@pytest.mark.parametrize("form", ["onnxtxt", "json", "textproto"])
def test_other_forms_of_onnx_are_converted_by_the_command_that_is_named(tmp_path, form):
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["a"], ["y"])]
    proto = build.model(nodes, [build.value("x", [2])], [build.value("y", [2])])
    file = tmp_path / f"it's a model.{form}"
    onnx.save(proto, file, format=form)
    with pytest.raises(ModelError, match="Convert it: python -c ") as refused:
        open_model(file)
    command = str(refused.value).split("Convert it: ")[1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert [node.op_type for node in open_model(tmp_path / "OUT.onnx").proto.graph.node] == ["Relu", "Neg"]


@pytest.mark.parametrize("size", [1, 7, 40, 150, 3000])
def test_a_truncated_model_is_not_taken_for_another_kind_of_file(tmp_path, size):
    content = build.chain(3).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(content[:size])
    with pytest.raises(ModelError, match=r"truncated|holds no ONNX graph"):
        open_model(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["decoder.onnx", "encoder.onnx"], "is a folder; name the .onnx file in it: 'decoder.onnx', 'encoder.onnx'"),
        (["config.json", "onnx/model.onnx"], "name the .onnx file in it: 'onnx/model.onnx'"),
        (["saved_model.pb", "variables/a"], r"SavedModel of TensorFlow\. Make ONNX of it: onnxsplit export "),
        (["config.json", "model.safetensors"], r"folder of transformers\. Make ONNX of it: onnxsplit export "),
        (["plan.json", "stage0.onnx"], r"plan directory.*onnxsplit serve"),
        ([], "is a folder; name the .onnx file in it"),
    ],
)
def test_what_a_folder_holds_and_what_to_do_is_said(tmp_path, files, words):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=words):
        open_model(tmp_path)


def test_a_file_above_two_gigabytes_is_told_too(tmp_path):
    with (tmp_path / "model.gguf").open("wb") as file:
        file.write(b"GGUF")
        file.truncate(3 << 30)
    with pytest.raises(ModelError, match="it is a GGUF file"):
        open_model(tmp_path / "model.gguf")


def test_an_ending_says_nothing_about_a_good_model(tmp_path):
    path: Path = build.save(build.chain(1), tmp_path, "model.tflite")
    open_model(path)
