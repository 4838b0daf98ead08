"""Regions of system shared memory that clients on this host register, to pass tensors in them.

The server copies from and to regions and never maps them: if a client truncated a mapped file, a bus error would kill
the server.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from onnxsplit.errors import InputError, shown
from runtime.gateway.errors import Forbidden, TooLarge, UnknownRegion
from runtime.gateway.protocol.inference import ReadRegion, RegionSlice

_FOLDER = Path("/dev/shm")  # noqa: S108  where shm_open keeps its objects
_KEY = re.compile(r"/?[^/\0]{1,254}")
_MOST_REGIONS = 1024
_RESERVED = "onnxsplit"


@dataclass(frozen=True)
class Region:
    """A region as a client registered it.

    Attributes:
        name: Name that requests use.
        key: Name of the shared memory object, as ``shm_open`` takes it.
        offset: Position in the object at which the region begins, in bytes.
        size_bytes: Size of the region.
    """

    name: str
    key: str
    offset: int
    size_bytes: int


class SharedMemoryRegions:
    """The registered regions. Callable from any thread.

    A client that registers a region makes the server read and write it. So the server's operator must allow this, and
    may restrict the names.

    Args:
        prefix: Beginning of the names that may be registered. None allows no region, an empty text all names except
            those that the runtime reserves for itself.
        allowed: False refuses all regions, for servers that clients on other hosts reach.
        most_bytes: Most bytes that one request may read.
    """

    def __init__(self, prefix: str | None = None, *, allowed: bool = True, most_bytes: int = 1 << 30) -> None:
        self._prefix = prefix
        self._allowed = allowed
        self._most_bytes = most_bytes
        self._lock = threading.Lock()  # a descriptor closed during a read may belong to another file by then
        self._open: dict[str, tuple[Region, int]] = {}

    @property
    def enabled(self) -> bool:
        """True when clients may register regions."""
        return self._allowed and self._prefix is not None

    @property
    def any(self) -> bool:
        """True when a region is registered."""
        return bool(self._open)

    def register(self, region: Region) -> None:
        """Register a region.

        Raises:
            InputError: The name is taken, or the key, the offset or the size is not valid.
            UnknownRegion: There is no such shared memory.
            Forbidden: The server does not allow regions, or not this key.
        """
        with self._lock:
            self._check(region)
            self._open[region.name] = region, _opened(region)

    def _check(self, region: Region) -> None:
        """Check the fields of a registration before anything is opened."""
        if not self._allowed:
            raise Forbidden(
                "only clients of this host may use shared memory, and this server listens to other hosts too"
            )
        if self._prefix is None:
            raise Forbidden(
                "this server does not use shared memory of clients; start it with --shared-memory [PREFIX] to allow "
                "names that begin with PREFIX"
            )
        if region.name in self._open:
            raise InputError(f"region {shown(region.name)} is registered already; unregister it first")
        if len(self._open) >= _MOST_REGIONS:
            raise InputError(f"{_MOST_REGIONS} regions are registered, which is the limit; unregister some")
        if not region.name or not _KEY.fullmatch(region.key) or region.key.strip("/") in ("", ".", ".."):
            raise InputError(
                f"region {shown(region.name)} has key {shown(region.key)}; a key is one name, as in /my_tensors"
            )
        key = region.key.strip("/")
        if key.startswith(_RESERVED):
            raise Forbidden(
                f"region {shown(region.name)}: the runtime reserves names that begin with {_RESERVED!r}, as "
                f"{shown(region.key)} does; choose another"
            )
        if not key.startswith(self._prefix):
            raise Forbidden(
                f"region {shown(region.name)}: this server allows names that begin with {self._prefix!r} "
                f"(--shared-memory), and {shown(region.key)} does not"
            )
        if region.offset < 0 or region.size_bytes <= 0:
            raise InputError(
                f"region {shown(region.name)} has offset {shown(region.offset)} and {shown(region.size_bytes)} bytes; "
                "the offset must be 0 or more, the size 1 or more"
            )

    def unregister(self, name: str) -> None:
        """Unregister a region, or all when the name is empty. A region that is not registered is not an error."""
        with self._lock:
            for one in [name] if name else list(self._open):
                if one in self._open:
                    os.close(self._open.pop(one)[1])

    def status(self, name: str = "") -> Mapping[str, Region]:
        """The regions by name: all of them when the name is empty, otherwise one.

        Raises:
            UnknownRegion: No region of this name is registered.
        """
        if name and name not in self._open:
            raise UnknownRegion(f"region {shown(name)} is not registered")
        return {other: region for other, (region, _) in self._open.items() if name in ("", other)}

    def reader(self) -> ReadRegion:
        """A function that reads slices for one request. It raises TooLarge when they exceed a request's limit."""
        left = self._most_bytes

        def read(region_slice: RegionSlice) -> bytearray:
            nonlocal left
            left -= region_slice.size_bytes
            if left < 0:
                raise TooLarge(
                    f"the inputs in shared memory have more bytes than the {self._most_bytes} allowed for a request "
                    "(--max-body)"
                )
            return self.read(region_slice)

        return read

    def read(self, region_slice: RegionSlice) -> bytearray:
        """The bytes of a slice.

        Raises:
            InputError: The region is not registered, or the slice is outside of it.
        """
        data = bytearray(region_slice.size_bytes)
        with self._descriptor(region_slice) as (opened, at), memoryview(data) as rest:
            done = 0
            while done < len(data):
                size = os.preadv(opened, [rest[done:]], at + done)
                if not size:
                    raise InputError(_shorter(region_slice))
                done += size
        return data

    def write(self, region_slice: RegionSlice, data: bytes | memoryview) -> None:
        """Write bytes at the beginning of a slice.

        Raises:
            InputError: The region is not registered, or the slice is outside of it or too short.
        """
        if len(data) > region_slice.size_bytes:
            raise InputError(
                f"an output has {len(data)} bytes, and its slice of region {shown(region_slice.region)} has "
                f"{region_slice.size_bytes}"
            )
        with self._descriptor(region_slice) as (opened, at), memoryview(data) as rest:
            try:
                if os.fstat(opened).st_size < at + len(data):
                    raise InputError(_shorter(region_slice))
                done = 0
                while done < len(data):  # the system writes two gigabytes at once at most
                    done += os.pwrite(opened, rest[done:], at + done)
            except OSError as error:
                raise InputError(f"cannot write to region {shown(region_slice.region)}: {error.strerror}") from error

    @contextmanager
    def _descriptor(self, region_slice: RegionSlice) -> Iterator[tuple[int, int]]:
        """A descriptor that stays open even if the region is unregistered, and the slice's position in the file."""
        with self._lock:
            region, opened = self._find(region_slice)
            own = os.dup(opened)
        try:
            yield own, region.offset + region_slice.offset
        finally:
            os.close(own)

    def _find(self, region_slice: RegionSlice) -> tuple[Region, int]:
        name, start = region_slice.region, region_slice.offset
        if name not in self._open:
            raise InputError(f"region {shown(name)} is not registered")
        region, opened = self._open[name]
        end = start + region_slice.size_bytes
        if end > region.size_bytes:
            raise InputError(
                f"bytes {start} to {end} are outside of region {shown(name)}, which has {region.size_bytes}"
            )
        return region, opened

    def close(self) -> None:
        """Unregister all regions."""
        self.unregister("")


def _opened(region: Region) -> int:
    """The descriptor of a region's shared memory, which must belong to this user and be large enough."""
    try:
        opened = os.open(_FOLDER / region.key.strip("/"), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise UnknownRegion(
            f"region {shown(region.name)}: cannot open {shown(region.key)}: {getattr(error, 'strerror', error)}"
        ) from error
    try:
        status = os.fstat(opened)
        if status.st_uid != os.getuid() or not stat.S_ISREG(status.st_mode):
            raise Forbidden(
                f"region {shown(region.name)}: {shown(region.key)} is not shared memory of the server's user"
            )
        if region.offset + region.size_bytes > status.st_size:
            raise InputError(
                f"region {shown(region.name)} ends at byte {shown(region.offset + region.size_bytes)}; "
                f"{shown(region.key)} has {status.st_size}"
            )
    except BaseException:
        os.close(opened)
        raise
    return opened


def _shorter(region_slice: RegionSlice) -> str:
    return f"region {shown(region_slice.region)} has become shorter since it was registered"
