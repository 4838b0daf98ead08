"""The response cache: the same content finds the same outputs, and nothing else does."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np

from runtime.gateway.response_cache import ResponseCache

X = np.arange(6, dtype=np.float32).reshape(2, 3)
Y = {"y": np.ones(4, np.float32)}


def strings(*texts: str) -> np.ndarray:
    return np.array(texts, object)


def test_the_key_holds_everything_that_decides_the_outputs():
    cases = [
        ("p", ["y"], {"x": X}),
        ("q", ["y"], {"x": X}),
        ("p", ["y", "z"], {"x": X}),
        ("p", ["y"], {"a": X}),
        ("p", ["y"], {"x": X.reshape(3, 2)}),
        ("p", ["y"], {"x": X.view(np.int32)}),
        ("p", ["y"], {"x": -X}),
        ("p", ["y"], {"x": X, "z": np.zeros(0, np.float32)}),
        ("p", ["y"], {"x": np.float32(1).reshape(())}),
        ("p", ["y"], {"x": np.ones(3, ml_dtypes.bfloat16)}),
        ("p", ["y"], {"x": strings("ab", "c")}),
        ("p", ["y"], {"x": strings("a", "bc")}),
        ("p", ["y"], {"x": strings("abc", "")}),
    ]
    keys = [ResponseCache.key(*case) for case in cases]
    assert all(one != other for one, other in itertools.combinations(keys, 2))
    assert keys == [ResponseCache.key(*case) for case in cases]


def test_the_layout_of_memory_and_the_order_of_the_inputs_do_not_matter():
    transposed = np.asfortranarray(X)
    key = ResponseCache.key("p", ["y"], {"a": X, "b": X})
    assert key == ResponseCache.key("p", ["y"], {"b": transposed, "a": transposed})


def test_what_was_kept_is_found_and_is_not_what_a_caller_changes():
    cache = ResponseCache(10_000)
    cache.keep(b"k", Y)
    found = cache.find(b"k")
    assert list(found) == ["y"]
    found["y"] = found["more"] = None
    assert cache.find(b"k")["y"] is Y["y"]
    assert cache.find(b"other") is None


def test_bytes_are_bounded_and_what_was_unused_for_longest_leaves():
    cache = ResponseCache(5_000)
    for number in range(4):
        cache.keep(bytes([number]), Y)
        cache.find(b"\0")
    assert cache.held_bytes == len(cache) * (1024 + 16) <= 5_000
    cache.keep(b"\4", Y)
    assert [cache.find(bytes([number])) is not None for number in range(5)] == [True, False, True, True, True]
    cache.keep(b"\4", Y)
    assert cache.held_bytes == len(cache) * (1024 + 16)
    cache.keep(b"large", {"y": np.ones(2000, np.float32)})
    assert cache.find(b"large") is None


def test_rows_of_a_batch_do_not_keep_the_batch():
    cache, batch = ResponseCache(10_000), np.ones((64, 4), np.float32)
    cache.keep(b"k", {"y": batch[:1]})
    assert cache.find(b"k")["y"].base is None
