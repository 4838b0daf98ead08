"""Damaged GGUF files are one clear error, and cost no more memory than their size."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

import gguf_files
import gguf_tokenizers

from onnxsplit.errors import ExportError
from onnxsplit.export import export
from onnxsplit.export.gguf.header import read_header


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    gguf_files.random_llama(path, "Q8_0", vocabulary=gguf_tokenizers.SIZE, tokenizer=gguf_tokenizers.byte_level)
    return path.read_bytes()


def refusal(data, folder):
    """The message about a file; None if it is exported. Any error but the project's own fails the test."""
    path = folder / "damaged.gguf"
    path.write_bytes(data)
    try:
        export(str(path), folder / "model.onnx", check=False)
    except ExportError as error:
        return str(error)
    return None


def header_bytes(data):
    return data.index(b"token_embd.weight") + 2000  # with the table of tensors


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_of_a_header_are_exported_or_refused(whole, tmp_path, data):
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, header_bytes(whole)))] = data.draw(st.integers(0, 255))
    assert len(refusal(bytes(changed), tmp_path) or "") < 1000


def test_an_empty_file_is_refused_in_words(tmp_path):
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ExportError, match=r"m\.gguf is empty; fetch it again"):
        read_header(tmp_path / "m.gguf")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(share, whole, tmp_path):
    assert refusal(whole[: int(share * len(whole))], tmp_path) is not None


def field(name, kind, value):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


HUGE = 1 << 60
CASES = {
    "fields": struct.pack("<QQ", 0, HUGE),
    "tensors": struct.pack("<QQ", HUGE, 0),
    "text": struct.pack("<QQ", 0, 1) + field(b"a", 8, struct.pack("<Q", HUGE)),
    "list of texts": struct.pack("<QQ", 0, 1) + field(b"a", 9, struct.pack("<IQ", 8, HUGE)),
    "list of numbers": struct.pack("<QQ", 0, 1) + field(b"a", 9, struct.pack("<IQ", 12, HUGE)),
    "list of lists": struct.pack("<QQ", 0, 1) + field(b"a", 9, struct.pack("<IQ", 9, 1)) * 100,
    "axes": struct.pack("<QQQ", 1, 0, 1) + b"a" + struct.pack("<I", 1 << 31),
    "sizes": struct.pack("<QQQ", 1, 0, 1) + b"a" + struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0),
    "place": struct.pack("<QQQ", 1, 0, 1) + b"a" + struct.pack("<IQIQ", 1, 8, 0, HUGE),
    "type": struct.pack("<QQQ", 1, 0, 1) + b"a" + struct.pack("<IQIQ", 1, 8, 999, 0),
    "name twice": struct.pack("<QQ", 0, 2) + field(b"a", 0, b"\1") * 2,
    "tensor twice": struct.pack("<QQ", 2, 0) + (struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 8, 0, 0)) * 2,
    "alignment": struct.pack("<QQ", 0, 1) + field(b"general.alignment", 4, struct.pack("<I", 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_beyond_the_file_are_refused_before_memory_is_taken(name, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + CASES[name] + bytes(64))
    tracemalloc.start()
    try:
        with pytest.raises(ExportError) as error:
            read_header(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 600
    assert peak < 4 << 20


@pytest.mark.parametrize(("version", "message"), [(1, "version 1; versions 2 and 3"), (3 << 24, "big-endian")])
def test_other_versions_are_one_clear_message(version, message, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", version) + bytes(64))
    with pytest.raises(ExportError, match=message):
        read_header(path)
