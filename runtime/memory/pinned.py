"""Pinned host memory for CUDA. A GPU copies from and to it directly, without a buffer of the driver's.

Shared memory is pinned piece by piece as it is used, because pinning allocates it. Without the CUDA runtime library or
the permission to lock memory, nothing is pinned, and copies are slower.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from contextlib import suppress

_LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
_PORTABLE, _READ_ONLY = 1, 8  # cudaHostRegisterPortable, cudaHostRegisterReadOnly
_log = logging.getLogger("runtime.pinned")

Pin = Callable[[int, int, bool], None]
"""Pins memory, given its address, its size in bytes, and whether this process may only read it."""


def cuda_pin() -> Pin | None:
    """A function that pins memory for CUDA; None when there is no CUDA runtime library."""
    for name in _LIBRARIES:
        with suppress(OSError):
            return pin_with(ctypes.CDLL(name))
    _log.info("no CUDA runtime library was found: memory between processes is not pinned")
    return None


def pin_with(library: ctypes.CDLL) -> Pin:
    """As :func:`cuda_pin`, with a CUDA runtime library that is already loaded."""
    library.cudaHostRegister.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
    library.cudaHostRegister.restype = ctypes.c_int
    refused = False

    def pin(address: int, size: int, read_only: bool) -> None:
        nonlocal refused
        if refused:
            return
        code = library.cudaHostRegister(address, size, _PORTABLE | (_READ_ONLY if read_only else 0))
        if code:
            refused = True
            _log.warning("CUDA refuses to pin %d bytes (error %d): copies to the device are slower", size, code)

    return pin
