"""Cluster files: written files are read back, and all errors are named together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxsplit.cluster import Cluster, Device, Link, parse_size
from onnxsplit.cluster_files import load_cluster
from onnxsplit.errors import ClusterError
from onnxsplit.planning.calibrate import measured, this_host

names = st.text(min_size=1, max_size=12).filter(lambda text: "\r" not in text)


@given(names, names, st.floats(0.001, 1000), st.none() | st.integers(1, 1 << 40), st.lists(names, max_size=2))
def test_what_is_written_is_read_back(tmp_path_factory, name, host, speed, memory, ops):
    speed = float(f"{speed:g}")
    device = Device(name, host, "cpu", speed, memory, 2, tuple(ops), ("Loop",))
    cluster = Cluster((device,), {(host, host): Link(5_000, 2_000_000_000, True)})
    file = tmp_path_factory.mktemp("cluster") / "cluster.toml"
    file.write_text(cluster.to_toml(), encoding="utf-8")
    assert load_cluster(file) == cluster


def test_links_go_by_device_then_host_then_default():
    a, b, c = Device("a", "one"), Device("b", "two"), Device("c", "three")
    cluster = Cluster((a, b, c), {("a", "b"): Link(1), ("one", "three"): Link(2)})
    assert [cluster.link(a, b), cluster.link(c, a), cluster.link(b, c)] == [Link(1), Link(2), Link()]


@pytest.mark.parametrize(
    ("text", "size"), [("512M", 512 << 20), ("2.5g", 5 << 29), ("7", 7), ("1KiB", 1024), ("x", None)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", r"no \[\[device\]\]"),
        ("device = 3", "must be written as"),
        ("[[device]]\n", "device 0: name is missing; it must be a text"),
        ('[[device]]\nname=""', "device 0: name must be a text that is not empty, found ''"),
        ('[[device]]\nname="a"\n[[link]]\nlatency_us=1', "link 0: between is missing"),
        (
            '[[device]]\nname="a"\n[[link]]\nbetween=["a","a"]\noverlapped=1',
            "overlapped must be true or false, found 1",
        ),
        ('caller=3\n[[device]]\nname="a"', "caller must be the name of a host or device, found 3"),
        ('[[device]]\nname="a"\nspeed=0', "speed must be a number above 0"),
        ('[[device]]\nname="a"\nspeed="fast"', "speed must be a number above 0"),
        ('[[device]]\nname="a"\nmemory="much"', "memory must be a size such as 512M"),
        ('[[device]]\nname="a"\nthread=2', "'thread' is unknown; allowed: .*threads"),
        ('[[device]]\nname="a"\n[[device]]\nname="a"', "'a' occurs twice"),
        ('[[device]]\nname="a"\nonly_ops="Conv"', "only_ops must be a list"),
        ('[[device]]\nname="a"\n[[link]]\nbetween=["a"]', "between must be a list of two hosts or devices"),
        ('[[device]]\nname="a"\n[[link]]\nbetween=["a","z"]', "'z' is not a device or host; known: a, local"),
        ('[[device]]\nname="a"\n[[link]]\nbetween=["a","a"]\nlatency_us=-1', "latency_us must be"),
        ("[[device", "not valid TOML"),
        ("x = " + "[" * 5_000, "not valid TOML"),
        ("x = " + "9" * 5_000, "not valid TOML"),
        ('[[device]]\nname="a"\nthreads=0.5', "threads must be a whole number from 1 to 1024, found 0.5"),
        ('[[device]]\nname="a"\nthreads=1000000000', "from 1 to 1024"),
        ('[[device]]\nname="a"\nspeed=nan', "speed must be a number above 0"),
        ('[[device]]\nname="a"\nspeed=inf', "speed must be a number above 0"),
        (f'[[device]]\nname="a"\nspeed={10**400}', "speed must be a number above 0"),
        (f'[[device]]\nname="a"\nmemory="{"9" * 400}T"', "memory must be a size such as 512M"),
        ('[[device]]\nname="a"\n[[link]]\nbetween=["a","a"]\nlatency_us=1e300', "latency_us must be a number from 0"),
        ('[[device]]\nname="a"\n[[link]]\nbetween=["a","a"]\nbytes_per_s=0.5', "bytes_per_s must be a number above 0"),
        ("".join(f'[[device]]\nname="{n}"\n' for n in range(256)), "256 devices; at most 255 are allowed"),
    ],
)
def test_bad_files_are_named(tmp_path, text, word):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ClusterError, match=word):
        load_cluster(tmp_path / "c.toml")


def test_all_violations_come_together(tmp_path):
    (tmp_path / "c.toml").write_text('x = 1\n[[device]]\nname="a"\nspeed=-1\nmemory="?"')
    with pytest.raises(ClusterError) as caught:
        load_cluster(tmp_path / "c.toml")
    assert str(caught.value).count("\n  - ") == 3


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(ClusterError, match="onnxsplit cluster init"):
        load_cluster(tmp_path / "c.toml")


def test_speeds_are_measured_for_devices_of_this_host(tmp_path):
    import build

    model = build.save(build.chain(), tmp_path)
    far = Device("far", "elsewhere", speed=7.0)
    cluster = Cluster((*this_host().devices, far), {})
    found = measured(cluster, model)
    assert found.devices[0].speed == 1
    assert all(device.speed > 0 for device in found.devices)
    assert found.devices[-1] == far
    with pytest.raises(ClusterError, match="no device of this host"):
        measured(Cluster((far,), {}), model)
