"""What a container allows: limits of control groups of both versions, in files as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxsplit.control_group import free_in_group_bytes, quota_processors
from onnxsplit.machine_load import cpu_times, process_needed_s

MIB = 1 << 20


@pytest.fixture
def groups(tmp_path):
    """Write files below the root of the groups; returns the arguments that name them."""

    def write(own: str, files: dict[str, str]) -> dict[str, Path]:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            file = tmp_path / "root" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return {"root": tmp_path / "root", "own": tmp_path / "own"}

    return write


def test_the_memory_of_a_group_of_version_2_without_what_its_page_cache_can_give_back(groups):
    files = {"memory.max": f"{100 * MIB}\n", "memory.current": f"{90 * MIB}\n"}
    stat = f"anon {20 * MIB}\ninactive_file {60 * MIB}\nactive_file {10 * MIB}\n"
    own = {f"pod/box/{name}": text for name, text in files.items()} | {"pod/box/memory.stat": stat}
    where = groups("0::/pod/box\n", own | {"pod/memory.max": "max\n", "pod/memory.current": "5\n"})
    assert free_in_group_bytes(1 << 40, **where) == 70 * MIB
    assert free_in_group_bytes(30 * MIB, **where) == 30 * MIB


def test_the_memory_of_a_group_of_version_1_and_of_the_group_above_it(groups):
    files = {
        "memory/pod/memory.limit_in_bytes": str(50 * MIB),
        "memory/pod/memory.usage_in_bytes": str(40 * MIB),
        "memory/pod/box/memory.limit_in_bytes": str(100 * MIB),
        "memory/pod/box/memory.usage_in_bytes": str(10 * MIB),
        "memory/pod/memory.stat": f"inactive_file 0\ntotal_inactive_file {5 * MIB}\n",
    }
    assert free_in_group_bytes(1 << 40, **groups("9:cpu,cpuacct:/\n4:memory:/pod/box\n", files)) == 15 * MIB


def test_in_a_container_the_own_group_is_mounted_as_the_root(groups):
    where = groups(
        "4:memory:/docker/abc\n", {"memory/memory.limit_in_bytes": "20", "memory/memory.usage_in_bytes": "5"}
    )
    assert free_in_group_bytes(1 << 40, **where) == 15


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "400000 100000\n", "box/cpu.max": "200000 100000"}, 2.0),
        ({"cpu/box/cpu.cfs_quota_us": "50000\n", "cpu/box/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/box/cpu.cfs_quota_us": "-1\n", "cpu/box/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_processors_that_a_quota_allows(groups, files, quota):
    assert quota_processors(**groups("3:cpu:/box\n0::/box\n", files)) == quota


def test_a_host_without_control_groups_has_no_limits(tmp_path):
    where = {"root": tmp_path, "own": tmp_path / "nothing"}
    assert (free_in_group_bytes(7, **where), quota_processors(**where)) == (7, None)


def test_time_in_which_a_thread_waits_for_a_processor_is_processor_time_that_it_needs(tmp_path):
    for thread, text in {"5": "1000000000 3000000000 17\n", "6": "500000000 0 2\n", "7": ""}.items():
        (tmp_path / "5" / "task" / thread).mkdir(parents=True)
        (tmp_path / "5" / "task" / thread / "schedstat").write_text(text)
    assert process_needed_s(5, tmp_path) == 4.5
    assert process_needed_s(6, tmp_path) is None


def test_only_the_cores_of_a_process_count_as_idle(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu 10 0 0 30 0 0 0 0 0 0\ncpu0 4 0 0 20 0 0 0 0 0 0\ncpu1 6 0 0 10 0 0 0 0 0 0\nintr 5\n")
    nothing = cpu_times({1}, tmp_path / "absent")
    every, one = (cpu_times(cores, stat).idle_s_since(nothing) for cores in (None, {1}))
    assert one == pytest.approx(every / 3)
