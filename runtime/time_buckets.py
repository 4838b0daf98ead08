"""Buckets for times, whose width is proportional to the time. Pure.

Times below 32 ns have a bucket each. Above, every power of two is divided into 16 buckets, as HdrHistogram does:

    time     16  17 .. 31 | 32    34   .. 62 | 64      68     .. 124 | ...
    bucket   16  17 .. 31 | 32    33   .. 47 | 48      49     ..  63 | ...
"""

from __future__ import annotations

_BITS = 5  # bits of a time that are kept
_SHIFT = _BITS - 1


def bucket_of(time_ns: int) -> int:
    """The bucket of a time; one below 0 counts as 0."""
    shift = time_ns.bit_length() - _BITS
    if shift <= 0 or time_ns < 0:
        return max(0, time_ns)
    return (shift << _SHIFT) + (time_ns >> shift)


def middle_of(bucket: int) -> int:
    """The time in the middle of a bucket. It differs from each time in the bucket by at most 1/32 of that time."""
    shift = max(0, (bucket >> _SHIFT) - 1)
    return ((bucket - (shift << _SHIFT)) << shift) + (1 << shift) // 2
