"""Compressed tensors: what is sent, and what is refused before it takes memory."""

from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from onnxsplit.cluster import Link
from runtime.errors import ProtocolError
from runtime.measure.compression import SLOW_BYTES_PER_S, is_slow, pays
from runtime.wire import codec, compression
from runtime.wire.messages.data import Fragment, TensorHead, TensorPlace

SPARSE = np.random.default_rng(0).integers(0, 9, (4, 25_000)).astype(np.int8)
HEAD = TensorHead("x", "int8", (4, 25_000), None, True)


def nowhere(place, dtype, shape):
    raise ProtocolError("no memory is mapped here")


def decoded(heads, frames):
    return codec.decode_tensors(heads, [memoryview(bytes(frame)) for frame in frames], nowhere)


def test_a_compressed_tensor_arrives_as_it_was_between_others():
    tensors = {"before": np.ones(9000, np.float32), "x": SPARSE, "small": np.ones(3, np.int8), "after": SPARSE}
    heads, frames = codec.encode_tensors(tensors, None, {"x", "small"})
    assert [head.zstd for head in heads] == [False, True, False, False]
    assert len(frames[1]) < SPARSE.nbytes / 1.5
    assert len(frames[2]) == SPARSE.nbytes
    back = decoded(heads, frames)
    assert list(back) == list(tensors)
    for name, array in tensors.items():
        assert np.array_equal(back[name], array)
        assert back[name].dtype == array.dtype


@given(st.binary(min_size=1, max_size=3000), st.integers(1, 50))
def test_any_bytes_come_back(raw, times):
    assert compression.decompressed(compression.compressed(raw * times), len(raw) * times) == raw * times


def test_what_does_not_shrink_goes_as_it_is():
    noise = np.random.default_rng(0).integers(-128, 128, 100_000).astype(np.int8)
    heads, frames = codec.encode_tensors({"x": noise}, None, {"x"})
    assert (heads[0].zstd, len(frames[0])) == (False, noise.nbytes)


def test_only_int8_is_compressed():
    heads, _ = codec.encode_tensors({"x": np.zeros(9000, np.float32)}, None, {"x"})
    assert not heads[0].zstd


def test_tensors_in_shared_memory_are_not_compressed():
    place = TensorPlace(3, 4, 5)
    heads, frames = codec.encode_tensors({"x": SPARSE}, {"x": place}, {"x"})
    assert (heads[0].payload, heads[0].zstd, frames) == (place, False, [])


def test_a_fragment_is_compressed_only_as_far_as_its_reader_allows(monkeypatch):
    monkeypatch.setattr(codec, "MAX_FRAME_BYTES", 150_000)
    heads, frames = codec.encode_tensors({"one": SPARSE, "two": SPARSE}, None, {"one", "two"})
    assert [head.zstd for head in heads] == [True, False]
    assert np.array_equal(decoded(heads, frames)["two"], SPARSE)


def without_size(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(raw)


FRAME = compression.compressed(SPARSE.tobytes())
BOMB = compression.compressed(bytes(256 << 20))
LIE = bytearray(compression.compressed(bytes(200_000)))  # states 100,000 bytes and holds more
assert LIE[5:9] == (200_000).to_bytes(4, "little")
LIE[5:9] = (100_000).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (BOMB, "states 268435456 bytes of content; expected 100000"),
        (bytes(LIE), "not one whole Zstandard frame"),
        (compression.compressed(bytes(99_999)), "states 99999 bytes"),
        (without_size(SPARSE.tobytes()), "states -1 bytes"),
        (FRAME[:-3], "not one whole Zstandard frame"),
        (FRAME[:3], "not one whole Zstandard frame"),
        (b"", "not one whole Zstandard frame"),
        (FRAME + b"x", "not one whole Zstandard frame"),
        (FRAME + FRAME, "not one whole Zstandard frame"),
        (SPARSE.tobytes(), "not one whole Zstandard frame"),
        (bytes.fromhex("502a4d18 04000000 01020304"), "states 0 bytes"),  # a frame to be skipped
    ],
)
def test_a_frame_that_is_not_this_tensor_is_refused_without_taking_memory(frame, reason):
    tracemalloc.start()
    with pytest.raises(ProtocolError, match=rf"tensor 'x': .*{reason}"):
        codec.decode_tensors((HEAD,), [frame], nowhere)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@given(st.data())
def test_a_damaged_frame_is_refused_or_has_the_right_size(data):
    frame = bytearray(FRAME)
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        back = decoded((HEAD,), [frame])
    except ProtocolError:
        return
    assert back["x"].shape == SPARSE.shape


@pytest.mark.parametrize(
    "head",
    [
        TensorHead("x", "float32", (25_000,), None, True),
        TensorHead("x", "string", (1,), None, True),
        TensorHead("x", "int8", (0, 5), None, True),
        TensorHead("x", "int8", (-4, -25_000), None, True),
        TensorHead("x", "int8", (1 << 40, 1 << 40), None, True),
        TensorHead("x", "int8", (1 << 45,), None, True),
        TensorHead("x", "int8", (codec.MAX_FRAME_BYTES + 1,), None, True),
    ],
)
def test_a_head_that_may_not_be_compressed_is_refused(head):
    with pytest.raises(ProtocolError, match="compressed"):
        codec.decode_tensors((head,), [FRAME], nowhere)


def test_only_frames_are_compressed():
    for payload, reason in ((FRAME, "only frames of int8"), (TensorPlace(0, 1, 2), "cannot lie in shared memory")):
        with pytest.raises(ProtocolError, match=reason):
            codec.decode_tensors((TensorHead("x", "int8", (4, 25_000), payload, True),), [], nowhere)


def test_the_sizes_of_the_frames_of_a_fragment_are_limited_together(monkeypatch):
    monkeypatch.setattr(codec, "MAX_FRAME_BYTES", 2 * SPARSE.nbytes - 1)
    heads = [TensorHead(name, "int8", SPARSE.shape, None, True) for name in "ab"]
    with pytest.raises(ProtocolError, match="compressed tensor 'b' has 100000 bytes; those of a fragment may have"):
        codec.decode_tensors(heads, [FRAME, FRAME], nowhere)


@pytest.mark.parametrize("flag", [2, "lz4", None])
def test_another_flag_than_yes_or_no_is_refused(flag):
    head = TensorHead("x", "int8", (4, 25_000), None, flag)
    with pytest.raises(ProtocolError, match="violates the protocol"):
        codec.decode_data(codec.encode(Fragment(1, 1, 0, 1000, 0, 0, -1, (0,), ("y",), (head,), ())))


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    compression.can_compress.cache_clear()
    yield
    compression.can_compress.cache_clear()


def test_without_the_library_a_compressed_tensor_is_refused_with_the_reason(no_library):
    with pytest.raises(ProtocolError, match="tensor 'x': it is compressed, and zstandard is not installed here"):
        codec.decode_tensors((HEAD,), [FRAME], nowhere)


def test_only_links_between_hosts_below_100_mbit_per_s_are_slow():
    assert is_slow(("a", "b"), Link(bytes_per_s=SLOW_BYTES_PER_S - 1))
    assert not is_slow(("a", "b"), Link(bytes_per_s=SLOW_BYTES_PER_S))
    assert not is_slow(("a", "a"), Link(bytes_per_s=1000))


def test_compression_pays_if_the_link_is_slower_than_the_hosts_and_the_numbers_shrink():
    noise = np.random.default_rng(0).bytes(100_000)
    slow, memory = Link(bytes_per_s=10_000), Link(bytes_per_s=10**15)
    assert pays([SPARSE.tobytes()], slow)
    assert pays([SPARSE.tobytes(), noise], slow)
    assert not pays([SPARSE.tobytes()], memory)
    assert not pays([SPARSE.tobytes(), *[noise] * 20], slow), "less than 5 %"
    assert not pays([noise], slow)
    assert not pays([], slow)
