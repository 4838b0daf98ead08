from __future__ import annotations

import zipfile

import ml_dtypes
import numpy as np
import pytest

from onnxsplit.errors import InputError
from onnxsplit.tensors import check_inputs, dtype_name, load_npz, numpy_dtype, save_npz


@pytest.mark.parametrize("name", ["file", "a/b:c", "x y", "{'json': 1}", "self", "arr_0", "data.npy"])
def test_a_tensor_of_any_name_survives(tmp_path, name):
    save_npz(tmp_path / "t.npz", {name: np.arange(3)})
    assert load_npz(tmp_path / "t.npz")[name].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_types_numpy_lacks_survive(tmp_path, kind):
    array = np.array([0.5, -2], dtype=getattr(ml_dtypes, kind))
    save_npz(tmp_path / "t.npz", {"x": array})
    back = load_npz(tmp_path / "t.npz")["x"]
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


def test_strings_survive(tmp_path):
    save_npz(tmp_path / "t.npz", {"s": np.array([["a", "größer"]], dtype=object)})
    assert load_npz(tmp_path / "t.npz")["s"].tolist() == [["a", "größer"]]


def test_what_numpy_wrote_is_read(tmp_path):
    np.savez(tmp_path / "t.npz", x=np.ones((2, 3), np.float16))
    assert load_npz(tmp_path / "t.npz")["x"].shape == (2, 3)


def test_pickled_objects_are_refused(tmp_path):
    np.savez(tmp_path / "t.npz", x=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="pickled"):
        load_npz(tmp_path / "t.npz")


def test_an_array_that_claims_more_than_it_has_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive, archive.open("x.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    with pytest.raises(InputError, match="claims the shape"):
        load_npz(tmp_path / "t.npz")


def test_no_archive_is_refused(tmp_path):
    (tmp_path / "t.npz").write_bytes(b"no zip")
    with pytest.raises(InputError, match="cannot read"):
        load_npz(tmp_path / "t.npz")
    with pytest.raises(InputError, match="no such file"):
        load_npz(tmp_path / "absent.npz")


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        save_npz(tmp_path / "missing" / "t.npz", {"x": np.ones(1)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["float32", "int64", "bool", "uint16", "bfloat16", "float8e4m3fn", "float8e5m2fnuz"])
def test_names_and_numpy_types_agree(name):
    assert dtype_name(numpy_dtype(name)) == name


def test_every_misfit_is_named():
    specs = {"a": ("float32", (1, "n")), "b": ("int64", None), "c": ("float32", (2,))}
    given = {"a": np.ones((2, 3), np.float64), "c": np.ones((2, 2), np.float32), "d": np.ones(1)}
    with pytest.raises(InputError) as refused:
        check_inputs(given, specs)
    for words in (
        "'d' is unknown",
        "'b' is missing",
        "'a' has type float64, expected float32",
        "size 2 on axis 0",
        "'c' has 2 dim",
    ):
        assert words in str(refused.value)
