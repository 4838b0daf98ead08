"""Which int8 borders a plan lets cross compressed, by the links of its cluster."""

from __future__ import annotations

import build
import msgspec
import numpy as np
import pytest

from onnxsplit.cluster import Cluster, Device, Link
from onnxsplit.cluster_files import load_cluster
from onnxsplit.errors import ClusterError
from onnxsplit.plan_check import plan_problems
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.border_sample import border_sample
from onnxsplit.planning.place import place
from onnxsplit.planning.planner import partition
from onnxsplit.views.borders import borders_text
from runtime.topology import compressed_tensors

SLOW = Link(bytes_per_s=2_000_000, compressed=True)
FAST = Link(bytes_per_s=100_000_000)


def write(folder, hosts: str, **links: Link):
    """A cluster with a device on each of some hosts, and links by the two letters of the hosts."""
    devices = tuple(Device(f"d{number}", host) for number, host in enumerate(hosts))
    file = folder / "cluster.toml"
    file.write_text(Cluster(devices, {(a, b): link for (a, b), link in links.items()}).to_toml())
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build.save(build.chain(9, 256), tmp_path_factory.mktemp("chain"))


def cut(model, folder, cluster, stages: int, border: str = "int8"):
    options = {"costs": "analytic", "dims": {"batch": 128}, "cluster": cluster, "border": border}
    return partition(model, stages=stages, out=folder / "m.plan", **options)


def test_numbers_of_int8_go_compressed_over_links_that_are_marked(tmp_path, model):
    far = Link(bytes_per_s=1000)  # so the device on b gets the stage in the middle
    plan = cut(model, tmp_path, write(tmp_path, "abc", ab=FAST, ac=far, bc=SLOW), 3)
    hosts = [stage.hosts[0] for stage in plan.stages]
    found = {(s, r): names for s in range(3) for r, names in compressed_tensors(plan, s).items()}
    slow = [(s, s + 1) for s in range(2) if {hosts[s], hosts[s + 1]} == {"b", "c"}]
    assert len(slow) == 1
    assert list(found) == slow
    for stage, _ in slow:
        (name,) = found[stage, stage + 1]
        assert plan.tensors[name].dtype == "int8"
    assert load_plan(tmp_path / "m.plan") == plan
    assert "1 of them goes compressed" in borders_text(plan.borders)


def test_other_forms_and_other_links_cross_as_they_are(tmp_path, model):
    slow = cut(model, tmp_path, write(tmp_path, "ab", ab=SLOW), 2)
    assert [border.compressed for border in slow.borders.tensors] == [(1,)]
    plans = [
        cut(model, tmp_path, write(tmp_path, "ab", ab=SLOW), 2, "float16"),
        cut(model, tmp_path, write(tmp_path, "ab", ab=FAST), 2),
        cut(model, tmp_path, None, 2),
    ]
    assert [border.compressed for plan in plans for border in plan.borders.tensors] == [()] * 3


def test_devices_of_one_host_never_compress(tmp_path, model):
    file = tmp_path / "cluster.toml"
    devices = (Device("one", "a"), Device("two", "a"))
    file.write_text(Cluster(devices, {("one", "two"): SLOW}).to_toml())
    assert [border.compressed for border in cut(model, tmp_path, file, 2).borders.tensors] == [()]


def test_another_place_has_other_links(tmp_path, model):
    cut(model, tmp_path, write(tmp_path, "ab", ab=FAST), 2)
    plan = place(tmp_path / "m.plan", write(tmp_path, "ab", ab=SLOW))
    assert [border.compressed for border in plan.borders.tensors] == [(1,)]
    plan = place(tmp_path / "m.plan", write(tmp_path, "ab", ab=FAST))
    assert [border.compressed for border in plan.borders.tensors] == [()]


@pytest.mark.parametrize("stages", [(0,), (7,)])
def test_a_plan_that_compresses_for_a_stage_that_does_not_read_is_refused(tmp_path, model, stages):
    plan = cut(model, tmp_path, write(tmp_path, "ab", ab=SLOW), 2)
    (border,) = plan.borders.tensors
    borders = msgspec.structs.replace(plan.borders, tensors=(msgspec.structs.replace(border, compressed=stages),))
    (problem,) = plan_problems(msgspec.structs.replace(plan, borders=borders))
    assert f"goes compressed to stage {stages[0]}, which does not read it" in problem


def test_a_cluster_file_says_which_links_compress(tmp_path):
    assert load_cluster(write(tmp_path, "ab", ab=SLOW)).links["a", "b"] == SLOW
    with pytest.raises(ClusterError, match="compressed is only for links between hosts"):
        load_cluster(write(tmp_path, "ab", aa=SLOW))


def test_a_sample_holds_the_numbers_that_would_cross(tmp_path):
    model = build.save(build.chain(30, 256), tmp_path)
    sample = border_sample(model, dims={"batch": 128})
    assert 4 <= len(sample) <= 8
    assert {len(numbers) for numbers in sample} == {128 * 256}
    blocks = np.abs(np.frombuffer(b"".join(sample), np.int8).reshape(-1, 64).astype(int)).max(axis=1)
    assert set(blocks) <= {0, 127}
    assert 127 in blocks
    assert border_sample(model, dims={"batch": 1}) == (), "too small to be compressed"


def test_a_model_without_int8_borders_has_no_sample(tmp_path):
    proto = build.chain(4, 256)
    proto.opset_import[0].version = 10
    assert border_sample(build.save(proto, tmp_path), dims={"batch": 128}) == ()
