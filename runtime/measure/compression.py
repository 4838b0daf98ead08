"""Whether a link moves more bytes per second when tensors are compressed."""

from __future__ import annotations

import time

import numpy as np

from runtime.wire.compression import can_compress, compressed, decompressed

SLOW_BYTES_PER_S = 12_500_000
"""The bandwidth from which nothing is compressed: 100 Mbit/s."""

_SAMPLE_BYTES = 1 << 20
_BLOCK = 64  # values that share a scale
_TRIALS = 5


def compressed_rate_per_s(bytes_per_s: int) -> int:
    """Bytes of tensors that a link moves in a second when they are compressed, as measured on this host.

    Each byte is compressed, sent and decompressed before the next one, and the other end is taken to be as fast as this
    host. The tensors are like int8 borders behind a ReLU: normally distributed values, half of them zero, scaled by
    blocks.

    Args:
        bytes_per_s: the bandwidth of the link.

    Returns:
        The rate; 0 if the link is not slow, or zstandard is not installed here.
    """
    if bytes_per_s >= SLOW_BYTES_PER_S or not can_compress():
        return 0
    values = np.random.default_rng(0).standard_normal((_SAMPLE_BYTES // _BLOCK, _BLOCK)).clip(min=0)
    scaled = np.rint(values * (127 / values.max(axis=1, keepdims=True))).astype(np.int8)
    sample, times = scaled.tobytes(), []
    for _ in range(_TRIALS):
        begun = time.perf_counter_ns()
        frame = compressed(sample)
        decompressed(frame, len(sample))
        times.append(time.perf_counter_ns() - begun)
    return round(len(sample) / (min(times) / 1e9 + len(frame) / bytes_per_s))
