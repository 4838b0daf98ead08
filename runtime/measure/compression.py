"""Whether a link moves more bytes of a model's int8 borders per second when they are compressed."""

from __future__ import annotations

import time
from collections.abc import Sequence

from onnxsplit.cluster import Link
from runtime.wire.compression import compressed, decompressed

SLOW_BYTES_PER_S = 12_500_000
"""The bandwidth from which nothing is compressed: 100 Mbit/s."""

_GAIN = 1.05  # a smaller gain is not worth the time of the nodes
_TRIALS = 5


def is_slow(pair: tuple[str, str], link: Link) -> bool:
    """Whether tensors may cross compressed: the link is between two hosts, and below 100 Mbit/s."""
    return pair[0] != pair[1] and link.bytes_per_s < SLOW_BYTES_PER_S


def pays(sample: Sequence[bytes], link: Link) -> bool:
    """Whether a link moves at least 5 % more bytes per second when they are compressed, as measured on this host.

    Each tensor is compressed, sent and decompressed before the next one, and one that does not shrink is sent as it is.
    Both ends are taken to be as fast as this host.

    Args:
        sample: the bytes of several tensors.
        link: the link.
    """
    spent_ns, sent_bytes = 0, 0
    for raw in sample:
        times = []
        for _ in range(_TRIALS):
            begun = time.perf_counter_ns()
            frame = compressed(raw)
            if shrinks := len(frame) < len(raw):
                decompressed(frame, len(raw))
            times.append(time.perf_counter_ns() - begun)
        spent_ns += min(times)
        sent_bytes += len(frame) if shrinks else len(raw)
    size = sum(map(len, sample))
    return _GAIN * (spent_ns / 1e9 + sent_bytes / link.bytes_per_s) < size / link.bytes_per_s
