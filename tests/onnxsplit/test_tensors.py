from __future__ import annotations

import io
import random
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest

from onnxsplit import npz
from onnxsplit.errors import InputError
from onnxsplit.npz import load_npz, save_npz
from onnxsplit.tensors import check_inputs, dtype_name, numpy_dtype


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


def npy(header: str, data: bytes = b"", *, version: int = 1) -> bytes:
    """A file of NumPy's with any header."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text + data


def header(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"


LIES = {
    "more than there is": npy(header("(4,)"), bytes(15)),
    "less than there is": npy(header("(4,)"), bytes(17)),
    "a product beyond 2^64": npy(header(f"({1 << 40}, {1 << 40})"), bytes(16)),
    "nothing, of a size beyond all memory": npy(header(f"(0, {1 << 62})")),
    "a negative size": npy(header("(-4,)"), bytes(16)),
    "negative sizes with a positive product": npy(header("(-2, -2)"), bytes(16)),
    "sizes that are not integers": npy(header("(4.0,)"), bytes(16)),
    "more dimensions than NumPy has": npy(header(str((1,) * 99)), bytes(4)),
    "texts of no length without end": npy(header(f"({1 << 40},)", "'<U0'")),
    "objects": npy(header("(1,)", "'|O'"), bytes(8)),
    "records": npy(header("(1,)", "[('a', '<f4'), ('b', '<f4')]"), bytes(8)),
    "dates": npy(header("(1,)", "'<M8[s]'"), bytes(8)),
    "half a surrogate pair": npy(header("(1,)", "'<U1'"), (0xD800).to_bytes(4, "little")),
    "no code point": npy(header("(1,)", "'<U1'"), b"\xff" * 4),
    "bytes that are not UTF-8": npy(header("(1,)", "'|S1'"), b"\xff"),
    "a header longer than allowed": npy(" " * 70_000 + header("(4,)"), bytes(16), version=2),
    "a header longer than the file": npy(header("(4,)"), version=2)[:9] + b"\xff" * 8,
    "a header that nests": npy("(" * 5_000),
    "a header that is not a literal": npy("__import__('os')"),
    "no magic": b"no array",
    "nothing": b"",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_member_that_lies_is_refused(tmp_path, lie):
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        archive.writestr("x.npy", LIES[lie])
    with pytest.raises(InputError, match=r"cannot read .*t.npz: .*It must be an .npz archive of plain arrays"):
        load_npz(tmp_path / "t.npz")


@pytest.mark.parametrize(
    "note", [b"[]", b'{"x": 1}', b'{"x": "object"}', b"{", b"\xff", b"[" * 100_000, b" " * (2 << 20)]
)
def test_invalid_notes_are_refused(tmp_path, note):
    with zipfile.ZipFile(tmp_path / "t.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy(header("(1,)"), bytes(4)))
        archive.writestr("onnxsplit.dtypes.json", note)
    with pytest.raises(InputError, match="cannot read"):
        load_npz(tmp_path / "t.npz")


def test_a_note_of_another_width_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        archive.writestr("x.npy", npy(header("(2,)", "'<u4'"), bytes(8)))
        archive.writestr("onnxsplit.dtypes.json", b'{"x": "bfloat16"}')
    with pytest.raises(InputError, match="uint32 cannot hold the bits of bfloat16"):
        load_npz(tmp_path / "t.npz")


def test_an_encrypted_archive_is_refused(tmp_path):
    np.savez(tmp_path / "t.npz", x=np.ones(3))
    content = bytearray((tmp_path / "t.npz").read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "t.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"'x.npy' is encrypted; write the archive without a password"):
        load_npz(tmp_path / "t.npz")


def test_a_member_that_is_there_twice_is_refused(tmp_path):
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr("x.npy", npy(header("(1,)"), bytes(4)))
    with pytest.raises(InputError, match=r"holds 'x.npy' 2 times"):
        load_npz(tmp_path / "t.npz")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_numpy_does_not_write_is_refused(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "t.npz", "w", method) as archive:
        archive.writestr("x.npy", npy(header("(1,)"), bytes(4)))
    with pytest.raises(InputError, match="compressed by another method"):
        load_npz(tmp_path / "t.npz")


def test_an_archive_that_unpacks_to_more_than_half_of_the_memory_is_refused_unread(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "t.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "abc":
            archive.writestr(f"{name}.npy", npy(header("(250_000,)".replace("_", "")), bytes(1_000_000)))
    assert (tmp_path / "t.npz").stat().st_size < 10_000
    monkeypatch.setattr(npz, "free_memory_bytes", lambda: 4_000_000)
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    with pytest.raises(InputError, match=r"unpacks to 3000\d+ bytes; at most 2000000, half of the free memory"):
        load_npz(tmp_path / "t.npz")


def test_the_other_byte_order_comes_back_as_this_host_s(tmp_path):
    np.savez(tmp_path / "t.npz", x=np.array([1.5, -2], ">f4"), n=np.array([[258]], ">i8"), s=np.array(["ö"], ">U1"))
    back = load_npz(tmp_path / "t.npz")
    assert [array.dtype.str for array in back.values()] == ["<f4", "<i8", "|O"]
    assert [array.tolist() for array in back.values()] == [[1.5, -2], [[258]], ["ö"]]


def test_every_order_and_size_of_an_array_survives(tmp_path):
    given = {
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "scalar": np.array(7, np.int8),
        "empty": np.zeros((0, 3), np.float16),
        "large": np.arange(700_000, dtype=np.float32).reshape(7, -1)[:, ::2],
    }
    save_npz(tmp_path / "t.npz", given)
    for name, array in load_npz(tmp_path / "t.npz").items():
        assert array.dtype == given[name].dtype
        assert np.array_equal(array, given[name]), name


def test_bytes_of_numpy_come_back_as_text(tmp_path):
    np.savez(tmp_path / "t.npz", s=np.array(["größer".encode(), b"a"]))
    assert load_npz(tmp_path / "t.npz")["s"].tolist() == ["größer", "a"]


def damaged(content: bytes, source: random.Random) -> bytes:
    """Return an archive with some bytes changed, removed or inserted, mostly in its headers."""
    changed = bytearray(content)
    for _ in range(source.choice([1, 1, 2, 8])):
        at = source.randrange(len(changed) + 1)
        match source.randrange(5):
            case 0:
                changed[at : at + 1] = source.randbytes(1)
            case 1:
                del changed[at : at + source.choice([1, 4, 100])]
            case 2:
                changed[at:at] = source.randbytes(source.choice([1, 4, 30]))
            case 3:
                changed[at : at + 4] = source.choice([b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f"])
            case 4:
                begin = max(0, changed.find(b"{'descr'"))
                changed[begin + source.randrange(80)] = source.choice(b"(){}[]'0123456789-,:LOV<>|#")
    return bytes(changed)


def test_no_damage_to_an_archive_ends_in_anything_but_an_input_error(tmp_path):
    arrays = {"x": np.arange(6, dtype=np.float32), "s": np.array(["a", "ö"]), "b": np.ones(3, ml_dtypes.bfloat16)}
    save_npz(tmp_path / "own.npz", arrays)
    packed = io.BytesIO()
    np.savez_compressed(packed, x=np.arange(60).reshape(3, 20), s=np.array([b"ab", b"c"]))
    originals = [(tmp_path / "own.npz").read_bytes(), packed.getvalue()]
    source, refused = random.Random(17), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy warns about headers of its old versions
        for _ in range(2_000):
            (tmp_path / "t.npz").unlink(missing_ok=True)  # writing over a file is slow on some file systems
            (tmp_path / "t.npz").write_bytes(damaged(source.choice(originals), source))
            try:
                load_npz(tmp_path / "t.npz")
            except InputError:
                refused += 1
    assert 1_000 < refused < 2_000


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
