"""Regions of system shared memory that clients on this host name, to give and take tensors there.

A region is read and written by copy, never mapped: a client that shortens its file while we look at it would end the
server with a bus error.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnxsplit.errors import InputError
from runtime.gateway.errors import Forbidden, UnknownRegion
from runtime.gateway.protocol import Place

_FOLDER = Path("/dev/shm")  # noqa: S108  where shm_open keeps them
_KEY = re.compile(r"/?[^/\0]{1,254}")
_MOST = 1024


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


class Regions:
    """The regions that are registered.

    Args:
        allowed: False refuses them all, as where clients are on other hosts.
    """

    def __init__(self, *, allowed: bool = True) -> None:
        self._allowed = allowed
        self._open: dict[str, tuple[Region, int]] = {}

    def register(self, region: Region) -> None:
        """Open a region.

        Raises:
            InputError: the name is taken, or the key or the size makes no sense.
            UnknownRegion: there is no such memory.
            Forbidden: it is not the user's own, or clients may be elsewhere.
        """
        if not self._allowed:
            raise Forbidden("regions of shared memory are for clients of this host; the server listens to others too")
        if region.name in self._open:
            raise InputError(f"region {region.name!r} is registered already; unregister it first")
        if len(self._open) >= _MOST:
            raise InputError(f"{_MOST} regions are registered, which is all there may be; unregister some")
        if not region.name or not _KEY.fullmatch(region.key) or region.key.strip("/") in ("", ".", ".."):
            raise InputError(f"region {region.name!r} has key {region.key!r}; a key is one name, as in /my_tensors")
        if region.offset < 0 or region.size_bytes <= 0:
            raise InputError(
                f"region {region.name!r} has offset {region.offset} and {region.size_bytes} bytes; the offset is 0 or "
                "more, the size 1 or more"
            )
        try:
            opened = os.open(_FOLDER / region.key.strip("/"), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise UnknownRegion(f"region {region.name!r}: cannot open {region.key!r}: {error.strerror}") from error
        try:
            found = os.fstat(opened)
            if found.st_uid != os.getuid() or not stat.S_ISREG(found.st_mode):
                raise Forbidden(f"region {region.name!r}: {region.key!r} is not shared memory of the server's user")
            if region.offset + region.size_bytes > found.st_size:
                raise InputError(
                    f"region {region.name!r} ends at byte {region.offset + region.size_bytes}; {region.key!r} has "
                    f"{found.st_size}"
                )
        except BaseException:
            os.close(opened)
            raise
        self._open[region.name] = region, opened

    def unregister(self, name: str) -> None:
        """Close a region, or all with an empty name; one that is not there is no error."""
        for gone in [name] if name else list(self._open):
            if gone in self._open:
                os.close(self._open.pop(gone)[1])

    def status(self, name: str = "") -> Mapping[str, Region]:
        """The regions by name, or one.

        Raises:
            UnknownRegion: there is none of this name.
        """
        if name and name not in self._open:
            raise UnknownRegion(f"region {name!r} is not registered")
        return {other: region for other, (region, _) in self._open.items() if name in ("", other)}

    def read(self, place: Place) -> bytes:
        """The bytes of a place.

        Raises:
            InputError: there is no such place.
        """
        region, opened = self._find(place)
        data = os.pread(opened, place.size_bytes, region.offset + place.offset)
        if len(data) != place.size_bytes:
            raise InputError(f"region {place.region!r} has become shorter than it was when it was registered")
        return data

    def write(self, place: Place, data: bytes | memoryview) -> None:
        """Put bytes at a place.

        Raises:
            InputError: there is no such place, or it is too short.
        """
        if len(data) > place.size_bytes:
            raise InputError(f"an output has {len(data)} bytes, and its place in {place.region!r} {place.size_bytes}")
        region, opened = self._find(place)
        try:
            if os.fstat(opened).st_size < region.offset + place.offset + len(data):
                raise InputError(f"region {place.region!r} has become shorter than it was when it was registered")
            os.pwrite(opened, data, region.offset + place.offset)
        except OSError as error:
            raise InputError(f"cannot write to region {place.region!r}: {error.strerror}") from error

    def _find(self, place: Place) -> tuple[Region, int]:
        if place.region not in self._open:
            raise InputError(f"region {place.region!r} is not registered")
        region, opened = self._open[place.region]
        if place.offset + place.size_bytes > region.size_bytes:
            raise InputError(
                f"bytes {place.offset} to {place.offset + place.size_bytes} are asked of region {place.region!r}, "
                f"which has {region.size_bytes}"
            )
        return region, opened

    def close(self) -> None:
        """Close all."""
        self.unregister("")
