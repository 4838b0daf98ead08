"""SharedMemoryRegions of system shared memory that clients on this host name, to give and take tensors there.

A region is read and written by copy, never mapped: a client that shortens its file while we look at it would end the
server with a bus error.
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
from runtime.gateway.protocol import Read, RegionSlice

_FOLDER = Path("/dev/shm")  # noqa: S108  where shm_open keeps them
_KEY = re.compile(r"/?[^/\0]{1,254}")
_MOST = 1024
_OWN = "onnxsplit"


@dataclass(frozen=True)
class Region:
    """A region as it was registered.

    Attributes:
        name: by which requests call it.
        key: of the shared memory object, as ``shm_open`` takes it.
        offset: where it begins in that, in bytes.
        size_bytes: how long it is.
    """

    name: str
    key: str
    offset: int
    size_bytes: int


class SharedMemoryRegions:
    """The regions that are registered. Callable from any thread.

    Whoever can register a region can have the server read and write it, so nobody can unless the server was told whose
    memory that may be.

    Args:
        prefix: of the names of shared memory that may be registered; None allows none, and empty any. Names that are
            kept for the runtime are never allowed.
        allowed: False refuses them all, as where clients are on other hosts.
        most_bytes: that a request may read.
    """

    def __init__(self, prefix: str | None = None, *, allowed: bool = True, most_bytes: int = 1 << 30) -> None:
        self._prefix = prefix
        self._allowed = allowed
        self._most_bytes = most_bytes
        self._lock = threading.Lock()  # a descriptor that is closed while it is read may be another's by then
        self._open: dict[str, tuple[Region, int]] = {}

    @property
    def enabled(self) -> bool:
        """True where regions can be registered."""
        return self._allowed and self._prefix is not None

    @property
    def any(self) -> bool:
        """True when some are."""
        return bool(self._open)

    def register(self, region: Region) -> None:
        """Open a region.

        Raises:
            InputError: the name is taken, or the key or the size makes no sense.
            UnknownRegion: there is no such memory.
            Forbidden: the server was not told to, the key has another prefix, or clients may be elsewhere.
        """
        with self._lock:
            self._register(region)

    def _register(self, region: Region) -> None:
        if not self._allowed:
            raise Forbidden("regions of shared memory are for clients of this host; the server listens to others too")
        if self._prefix is None:
            raise Forbidden(
                "this server reads and writes no shared memory of clients; start it with --shared-memory [PREFIX], "
                "which allows names that begin with PREFIX"
            )
        if region.name in self._open:
            raise InputError(f"region {shown(region.name)} is registered already; unregister it first")
        if len(self._open) >= _MOST:
            raise InputError(f"{_MOST} regions are registered, which is all there may be; unregister some")
        if not region.name or not _KEY.fullmatch(region.key) or region.key.strip("/") in ("", ".", ".."):
            raise InputError(
                f"region {shown(region.name)} has key {shown(region.key)}; a key is one name, as in /my_tensors"
            )
        key = region.key.strip("/")
        if key.startswith(_OWN):
            raise Forbidden(
                f"region {shown(region.name)}: names that begin with {_OWN!r} are kept for the runtime itself, and "
                f"{shown(region.key)} does; choose another"
            )
        if not key.startswith(self._prefix):
            raise Forbidden(
                f"region {shown(region.name)}: this server uses shared memory whose name begins with {self._prefix!r} "
                f"(--shared-memory), and {shown(region.key)} does not"
            )
        if region.offset < 0 or region.size_bytes <= 0:
            raise InputError(
                f"region {shown(region.name)} has offset {shown(region.offset)} and {shown(region.size_bytes)} bytes; "
                "the offset is 0 or more, the size 1 or more"
            )
        try:
            opened = os.open(_FOLDER / key, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise UnknownRegion(
                f"region {shown(region.name)}: cannot open {shown(region.key)}: {getattr(error, 'strerror', error)}"
            ) from error
        try:
            found = os.fstat(opened)
            if found.st_uid != os.getuid() or not stat.S_ISREG(found.st_mode):
                raise Forbidden(
                    f"region {shown(region.name)}: {shown(region.key)} is not shared memory of the server's user"
                )
            if region.offset + region.size_bytes > found.st_size:
                raise InputError(
                    f"region {shown(region.name)} ends at byte {shown(region.offset + region.size_bytes)}; "
                    f"{shown(region.key)} has {found.st_size}"
                )
        except BaseException:
            os.close(opened)
            raise
        self._open[region.name] = region, opened

    def unregister(self, name: str) -> None:
        """Close a region, or all with an empty name; one that is not there is no error."""
        with self._lock:
            for gone in [name] if name else list(self._open):
                if gone in self._open:
                    os.close(self._open.pop(gone)[1])

    def status(self, name: str = "") -> Mapping[str, Region]:
        """The regions by name, or one.

        Raises:
            UnknownRegion: there is none of this name.
        """
        if name and name not in self._open:
            raise UnknownRegion(f"region {shown(name)} is not registered")
        return {other: region for other, (region, _) in self._open.items() if name in ("", other)}

    def reader(self) -> Read:
        """Reads for one request: gives the bytes of places, as long as they are not more than a request may have.

        It raises InputError where there is no such place, and TooLarge for more bytes.
        """
        left = self._most_bytes

        def read(place: RegionSlice) -> bytearray:
            nonlocal left
            left -= place.size_bytes
            if left < 0:
                raise TooLarge(
                    f"the inputs in shared memory have more bytes than the {self._most_bytes} that a request may have "
                    "(--max-body)"
                )
            return self.read(place)

        return read

    def read(self, place: RegionSlice) -> bytearray:
        """The bytes of a place.

        Raises:
            InputError: there is no such place.
        """
        data = bytearray(place.size_bytes)
        with self._opened(place) as (opened, at), memoryview(data) as rest:
            done = 0
            while done < len(data):
                size = os.preadv(opened, [rest[done:]], at + done)
                if not size:
                    raise InputError(
                        f"region {shown(place.region)} has become shorter than it was when it was registered"
                    )
                done += size
        return data

    def write(self, place: RegionSlice, data: bytes | memoryview) -> None:
        """Put bytes at a place.

        Raises:
            InputError: there is no such place, or it is too short.
        """
        if len(data) > place.size_bytes:
            raise InputError(
                f"an output has {len(data)} bytes, and its place in {shown(place.region)} {place.size_bytes}"
            )
        with self._opened(place) as (opened, at), memoryview(data) as rest:
            try:
                if os.fstat(opened).st_size < at + len(data):
                    raise InputError(
                        f"region {shown(place.region)} has become shorter than it was when it was registered"
                    )
                done = 0
                while done < len(data):  # the system writes two gigabytes at once at most
                    done += os.pwrite(opened, rest[done:], at + done)
            except OSError as error:
                raise InputError(f"cannot write to region {shown(place.region)}: {error.strerror}") from error

    @contextmanager
    def _opened(self, place: RegionSlice) -> Iterator[tuple[int, int]]:
        """A descriptor that stays open, whoever unregisters the region, and where in it the place begins."""
        with self._lock:
            region, opened = self._find(place)
            mine = os.dup(opened)
        try:
            yield mine, region.offset + place.offset
        finally:
            os.close(mine)

    def _find(self, place: RegionSlice) -> tuple[Region, int]:
        if place.region not in self._open:
            raise InputError(f"region {shown(place.region)} is not registered")
        region, opened = self._open[place.region]
        if place.offset + place.size_bytes > region.size_bytes:
            raise InputError(
                f"bytes {place.offset} to {place.offset + place.size_bytes} are asked of region {shown(place.region)}, "
                f"which has {region.size_bytes}"
            )
        return region, opened

    def close(self) -> None:
        """Close all."""
        self.unregister("")
