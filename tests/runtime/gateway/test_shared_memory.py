"""Clients' shared memory is read and written only where the client said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onnxsplit.errors import InputError
from runtime.gateway.errors import Forbidden, TooLarge, UnknownRegion
from runtime.gateway.protocol.inference import RegionSlice
from runtime.gateway.shared_memory import Region, SharedMemoryRegions


@pytest.fixture
def memory():
    file = Path(f"/dev/shm/test-region-{os.getpid()}")
    file.write_bytes(bytes(range(64)))
    yield file
    file.unlink(missing_ok=True)


@pytest.fixture
def regions(memory):
    made = SharedMemoryRegions("")
    made.register(Region("r", f"/{memory.name}", 16, 32))
    yield made
    made.close()


def test_places_count_from_where_the_region_begins(regions, memory):
    assert regions.read(RegionSlice("r", 4, 3)) == bytes([20, 21, 22])
    regions.write(RegionSlice("r", 30, 2), b"\xff\xff")
    assert memory.read_bytes()[44:50] == bytes([44, 45, 255, 255, 48, 49])


@pytest.mark.parametrize(
    "place", [RegionSlice("r", 0, 33), RegionSlice("r", 32, 1), RegionSlice("r", 1 << 60, 1), RegionSlice("q", 0, 1)]
)
def test_places_outside_are_refused(regions, place):
    with pytest.raises(InputError):
        regions.read(place)
    with pytest.raises(InputError):
        regions.write(place, b"x")


def test_an_output_larger_than_its_place_is_refused(regions):
    with pytest.raises(InputError, match="3 bytes, and its slice of region 'r' has 2"):
        regions.write(RegionSlice("r", 0, 2), b"abc")


def test_a_region_that_shrinks_does_not_end_the_server(regions, memory):
    os.truncate(memory, 20)
    with pytest.raises(InputError, match="shorter"):
        regions.read(RegionSlice("r", 0, 32))
    with pytest.raises(InputError, match="shorter"):
        regions.write(RegionSlice("r", 16, 8), bytes(8))
    assert memory.stat().st_size == 20


def test_links_and_other_things_are_refused(memory):
    link = memory.with_name(f"{memory.name}-link")
    link.symlink_to("/etc/passwd")
    fifo = memory.with_name(f"{memory.name}-fifo")
    os.mkfifo(fifo)
    try:
        for name, error in ((link.name, UnknownRegion), (fifo.name, Forbidden)):
            with pytest.raises(error):
                SharedMemoryRegions("").register(Region("r", name, 0, 8))
    finally:
        link.unlink()
        fifo.unlink()


def test_too_long_or_twice_or_not_allowed_is_refused(regions, memory):
    for region, words in (
        (Region("s", memory.name, 60, 8), "ends at byte 68"),
        (Region("s", memory.name, -1, 8), "offset -1"),
        (Region("s", memory.name, 0, 0), "0 bytes"),
        (Region("r", memory.name, 0, 8), "registered already"),
        (Region("", memory.name, 0, 8), "a key is one name"),
    ):
        with pytest.raises(InputError, match=words):
            regions.register(region)
    with pytest.raises(Forbidden, match="clients of this host"):
        SharedMemoryRegions("", allowed=False).register(Region("s", memory.name, 0, 8))


def test_nothing_is_registered_unless_the_server_was_told(memory):
    with pytest.raises(Forbidden, match="--shared-memory"):
        SharedMemoryRegions().register(Region("s", memory.name, 0, 8))


@pytest.mark.parametrize("prefix", ["", "onnxsplit"])
def test_names_of_the_runtime_are_never_registered(prefix):
    file = Path(f"/dev/shm/onnxsplit-{os.getpid()}")
    file.write_bytes(bytes(64))
    try:
        with pytest.raises(Forbidden, match="the runtime reserves"):
            SharedMemoryRegions(prefix).register(Region("s", file.name, 0, 8))
    finally:
        file.unlink()


def test_only_names_under_the_prefix_are_registered(memory):
    named = SharedMemoryRegions(memory.name[:-1])
    named.register(Region("s", f"/{memory.name}", 0, 8))
    named.close()
    with pytest.raises(Forbidden, match="begin with 'other'"):
        SharedMemoryRegions("other").register(Region("s", memory.name, 0, 8))


def test_one_request_reads_no_more_than_a_request_may_have(memory):
    regions = SharedMemoryRegions("", most_bytes=40)
    regions.register(Region("r", memory.name, 0, 64))
    read = regions.reader()
    assert read(RegionSlice("r", 0, 30)) == memory.read_bytes()[:30]
    with pytest.raises(TooLarge, match="more bytes than the 40"):
        read(RegionSlice("r", 0, 30))
    regions.close()


def test_what_the_system_writes_in_part_is_written_to_the_end(regions, memory, monkeypatch):
    """Linux writes and reads at most 2,147,479,552 bytes at once."""
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda opened, data, at: write(opened, data[:3], at))
    monkeypatch.setattr(os, "preadv", lambda opened, rooms, at: read(opened, [rooms[0][:3]], at))
    regions.write(RegionSlice("r", 0, 16), bytes(range(100, 116)))
    assert memory.read_bytes()[16:32] == bytes(range(100, 116))
    assert regions.read(RegionSlice("r", 0, 16)) == bytes(range(100, 116))


def test_what_is_unregistered_is_closed(regions):
    opened = len(list(Path("/proc/self/fd").iterdir()))
    regions.unregister("r")
    regions.unregister("r")
    assert len(list(Path("/proc/self/fd").iterdir())) == opened - 1
    assert regions.status() == {}
    with pytest.raises(UnknownRegion):
        regions.status("r")
