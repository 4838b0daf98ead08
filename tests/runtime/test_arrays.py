"""What counts as an input: arrays of other libraries, tables, and Python's numbers."""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np
import pytest

from onnxsplit.errors import InputError
from onnxsplit.tensors import check_inputs
from runtime.requests.normalize import normal_inputs

ONE = {"x": ("float32", ("n", 2))}


def taken(value, specs=ONE, required=None):
    arrays = normal_inputs(value, specs, tuple(specs) if required is None else required)
    check_inputs(arrays, specs, frozenset(specs) - set(arrays))
    return arrays


@pytest.mark.parametrize("value", [[[1.5, 2.0]], [[1, 2]], [[True, False]], ((0.5, 1e-3),), [[np.float64(1.5), 2]]])
def test_numbers_of_python_get_the_type_of_the_model(value):
    array = taken({"x": value})["x"]
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, np.asarray(value, np.float32))


@pytest.mark.parametrize(
    ("dtype", "value", "words"),
    [
        ("float32", [[1e300]], "numbers that float32 cannot hold"),
        ("float16", [[70000.0]], "numbers that float16 cannot hold"),
        ("int32", [[2**40]], "numbers that int32 cannot hold"),
        ("uint8", [[-1]], "numbers that uint8 cannot hold"),
        ("int64", [[1.0]], "is a list of float64, expected int64"),
        ("bool", [[1]], "is a list of int64, expected bool"),
        ("float32", [["1.5"]], "expected float32"),
        ("float32", [[1 + 2j]], "expected float32"),
        ("float32", None, "expected float32"),
        ("float32", [2**24 + 1], "numbers that float32 cannot hold"),
        ("float64", [2**53 + 1], "numbers that float64 cannot hold"),
        ("float64", [2**63 - 1], "numbers that float64 cannot hold"),
        ("float8e4m3fn", [float("inf")], "numbers that float8e4m3fn cannot hold"),
        ("uint64", [-1], "numbers that uint64 cannot hold"),
        ("float32", [np.ma.array([1.0, 2.0], mask=[0, 1])], "masked"),
        ("float32", [[1.0, np.ma.masked]], "masked"),
    ],
)
def test_numbers_that_would_change_are_refused(dtype, value, words):
    with pytest.raises(InputError, match=words):
        taken({"x": value}, {"x": (dtype, None)})


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("uint64", [2**63, 1]),
        ("uint64", [2**64 - 1]),
        ("float32", np.int64(5)),
        ("float32", range(4)),
        ("float32", [2**24]),
        ("float64", [-(2**53)]),
        ("int64", []),
        ("string", []),
    ],
)
def test_numbers_that_fit_are_taken_whatever_holds_them(dtype, value):
    array = taken({"x": value}, {"x": (dtype, None)})["x"]
    assert array.tolist() == (list(value) if np.ndim(value) else value)


@pytest.mark.parametrize("value", [["a\0", "b"], [b"a\0", "b"], "a\0", ["a", "\u00e9".encode()]])
def test_texts_keep_every_character(value):
    array = taken({"x": value}, {"x": ("string", None)})["x"]
    texts = value if isinstance(value, list) else [value]
    assert array.ravel().tolist() == [text.decode() if isinstance(text, bytes) else text for text in texts]


def test_lists_may_hold_arrays_and_tensors():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    rows = [torch.tensor([1.0, 2.0], requires_grad=True), np.float32([3, 4]), [5.0, 6]]
    assert taken({"x": rows})["x"].tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    narrow = [torch.tensor([1.5], dtype=torch.bfloat16)]
    assert taken({"x": narrow}, {"x": ("bfloat16", None)})["x"].tolist() == [[1.5]]


def test_columns_of_the_same_name_are_refused():
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    frame = pandas.DataFrame([[1.0, 2.0]], columns=["a", "a"])
    with pytest.raises(InputError, match="several columns of the same name"):
        taken(frame, {"x": ("float32", None)})


def test_infinity_and_nan_stay_what_they_are():
    array = taken({"x": [[float("inf"), float("nan")]]})["x"]
    assert np.isinf(array[0, 0])
    assert np.isnan(array[0, 1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float8e5m2", "float16"])
def test_narrow_types_are_made_of_pythons_numbers_too(dtype):
    assert taken({"x": [[1.5, 2.0]]}, {"x": (dtype, None)})["x"].tolist() == [[1.5, 2.0]]


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64])
def test_an_array_keeps_its_own_type_so_a_wrong_one_is_refused(dtype):
    with pytest.raises(InputError, match=f"has type {np.dtype(dtype).name}, expected float32"):
        taken({"x": np.ones((1, 2), dtype)})


def test_a_model_of_one_input_takes_an_array_without_a_name():
    assert list(taken(np.ones((3, 2), np.float32))) == ["x"]
    assert list(taken([[1.0, 2.0]])) == ["x"]
    with_default = {**ONE, "scale": ("float32", ())}
    assert list(taken(np.ones((3, 2), np.float32), with_default, ("x",))) == ["x"]


@pytest.mark.parametrize("specs", [{}, {"a": ("float32", None), "b": ("float32", None)}])
def test_a_model_of_several_inputs_needs_names(specs):
    with pytest.raises(InputError, match="inputs must map names to arrays, but they are a list; the model takes"):
        taken([1.0], specs)


class Elsewhere:
    """An array in the memory of another device, which DLPack can copy to the host."""

    def __init__(self, array, *, copies=True):
        self._array, self._copies = array, copies

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **wanted):
        if not self._copies:
            raise BufferError("this device cannot be read")
        assert wanted["dl_device"] == (1, 0), "the copy must be on the host"
        return self._array.__dlpack__()


@pytest.mark.skipif(int(np.__version__.split(".")[0]) < 2, reason="NumPy 1 cannot ask for a copy on the host")
def test_an_array_on_another_device_is_copied_to_the_host():
    assert taken({"x": Elsewhere(np.ones((1, 2), np.float32))})["x"].tolist() == [[1.0, 1.0]]
    with pytest.raises(InputError, match="cannot be made an array: this device cannot be read"):
        taken({"x": Elsewhere(np.ones((1, 2), np.float32), copies=False)})


class OnlyDlpack:
    def __init__(self, array):
        self._array = array

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **_wanted):
        return self._array.__dlpack__()


def test_dlpack_alone_is_enough():
    array = np.arange(4, dtype=np.float32).reshape(2, 2)
    np.testing.assert_array_equal(taken({"x": OnlyDlpack(array)})["x"], array)


def test_tensors_of_pytorch_are_taken_with_gradients_and_in_every_type_of_onnx():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    values = [[0.5, -2.0]]
    for dtype in ("float32", "float16", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        tensor = torch.tensor(values).to(getattr(torch, dtype))
        expected = {"bfloat16": "bfloat16", "float8_e4m3fn": "float8e4m3fn", "float8_e5m2": "float8e5m2"}.get(
            dtype, dtype
        )
        array = taken({"x": tensor}, {"x": (expected, None)})["x"]
        assert array.astype(np.float64).tolist() == values, dtype
    tracked = torch.tensor(values, requires_grad=True)
    assert taken(torch.nn.Parameter(tracked))["x"].tolist() == values
    assert taken(tracked.T.contiguous().T)["x"].tolist() == values
    half = torch.tensor([values[0] * 2], dtype=torch.bfloat16)[:, ::2]  # not contiguous
    assert taken({"x": half}, {"x": ("bfloat16", None)})["x"].astype(float).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("make", ["meta", "sparse", "quantized"])
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_memory_are_refused_with_the_reason(make):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    tensor = {
        "meta": lambda: torch.ones(1, 2, device="meta"),
        "sparse": lambda: torch.ones(1, 2).to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(1, 2), 0.1, 0, torch.qint8),
    }[make]()
    with pytest.raises(InputError, match="input 'x' cannot be made an array: "):
        taken({"x": tensor})


def test_nothing_imports_pytorch():
    before = "torch" in sys.modules
    taken({"x": [[1.0, 2.0]]})
    assert ("torch" in sys.modules) == before


COLUMNS = {"age": ("float32", ("n", 1)), "city": ("string", ("n", 1)), "count": ("int64", ("n",))}


def test_the_columns_of_a_frame_are_the_inputs_of_a_model_of_columns():
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    frame = pandas.DataFrame({"age": [1.5, None], "city": ["Rome", "Oslo"], "count": [3, 4]})
    arrays = taken(frame, COLUMNS)
    assert arrays["age"].dtype == np.float32
    np.testing.assert_array_equal(arrays["age"], [[1.5], [np.nan]])
    assert arrays["city"].tolist() == [["Rome"], ["Oslo"]]
    assert arrays["count"].tolist() == [3, 4]


def test_a_frame_of_numbers_is_the_table_of_a_model_of_one_input():
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    frame = pandas.DataFrame({"a": [1.5, 2.5], "b": [1, 2]})
    for given in (frame, {"x": frame}):
        assert taken(given)["x"].tolist() == [[1.5, 1.0], [2.5, 2.0]]
    assert taken({"x": frame["a"]}, {"x": ("float32", ("n",))})["x"].tolist() == [1.5, 2.5]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"a": ["x", "y"], "b": [1, 2]}, "column a' is a DataFrame of .*, expected float32"),
        ({"a": [1.0, 2.0]}, "has size 1 on axis 1, expected 2"),
        ({"a": [1e300, 2.0], "b": [1, 2]}, "numbers that float32 cannot hold"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused_with_its_column(columns, words):
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    with pytest.raises(InputError, match=words):
        taken(pandas.DataFrame(columns))


def test_missing_whole_numbers_are_refused():
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    frame = pandas.DataFrame({"age": [1.0], "city": ["Rome"], "count": pandas.Series([None], dtype="Int64")})
    with pytest.raises(InputError, match=r"'count' is a Series of .*, expected int64"):
        taken(frame, COLUMNS)


def test_types_that_numpy_lacks_are_views_of_the_same_bits():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    tensor = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16)
    array = taken({"x": tensor}, {"x": ("bfloat16", None)})["x"]
    assert array.dtype == ml_dtypes.bfloat16
    tensor[0, 0] = 5
    assert float(array[0, 0]) == 5.0, "nothing was copied"
