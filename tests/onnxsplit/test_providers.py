from __future__ import annotations

import json
import os
import sys
import time

import build
import msgspec
import numpy as np
import pytest
from onnx import helper
from plugins import fake_plugin

from onnxsplit.cost.assignment import ask_provider
from onnxsplit.errors import ModelRefused, ProviderError
from onnxsplit.model.graph import build_graph
from onnxsplit.model.in_memory import ModelFile
from onnxsplit.model.shapes import infer_shapes
from onnxsplit.model.source import open_model
from onnxsplit.npz import load_npz
from onnxsplit.planning.planner import partition
from onnxsplit.providers import (
    available_providers,
    installed_plugins,
    parse_provider,
    provider_here,
    provider_problem,
    threads_on_cores,
)
from onnxsplit.providers.openvino import openvino_options
from onnxsplit.session import open_session
from onnxsplit.stages.verify import verify
from onnxsplit.views.doctor import diagnose
from runtime.pipeline import Pipeline

needs_openvino = pytest.mark.skipif(
    provider_problem("openvino") is not None, reason=f"needs OpenVINO: {provider_problem('openvino')}"
)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on ``sys.path`` for packages; their modules are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("onnxruntime_ep_"):
            del sys.modules[name]


def test_an_installed_plugin_has_the_short_name_of_its_module(site):
    fake_plugin(site, "made-up", library="junk")
    assert "made-up" not in sys.modules
    assert ("made-up", "onnxruntime-ep-made-up") in [(plugin.name, plugin.package) for plugin in installed_plugins()]
    found = parse_provider("made-up:1:key=value")
    assert (found.name, dict(found.options)) == ("MadeUpExecutionProvider", {"device_id": "1", "key": "value"})


def test_a_package_that_only_requires_another_one_is_no_plugin(site):
    fake_plugin(site, "made-up")
    info = site / "onnxruntime_ep_bundle-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-ep-bundle\nVersion: 0.0.1\n")
    (info / "top_level.txt").write_text("\n")
    assert "bundle" not in [plugin.name for plugin in installed_plugins()]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({}, r"onnxruntime-ep-made-up 0\.0\.1 does not load into ONNX Runtime .*libplugin\.so"),
        ({"library": "junk" * 100}, r"onnxruntime-ep-made-up 0\.0\.1 does not load into ONNX Runtime .*ELF"),
        ({"code": "import no_such_module"}, r"onnxruntime-ep-made-up 0\.0\.1 does not load: .*no_such_module"),
        ({"code": "x = 1"}, r"onnxruntime-ep-made-up 0\.0\.1 does not load: .*get_ep_names"),
    ],
)
def test_a_damaged_plugin_is_named_with_its_reason(site, tmp_path, made, message):
    fake_plugin(site, "made-up", **made)
    with pytest.raises(ProviderError, match=message):
        open_session(build.save(build.chain(1), tmp_path), threads=1, provider="made-up")
    open_session(build.save(build.chain(1), tmp_path), threads=1, provider="cpu")


def test_a_plugin_that_is_not_installed_is_named_with_its_package(monkeypatch, tmp_path):
    monkeypatch.setattr("onnxsplit.providers.use.find_plugin", lambda name: None)
    with pytest.raises(ProviderError, match="pip install onnxruntime-ep-webgpu"):
        open_session(build.save(build.chain(1), tmp_path), threads=1, provider="webgpu")
    assert provider_here("webgpu") == "cpu"


@pytest.mark.skipif(
    "webgpu" not in [plugin.name for plugin in installed_plugins()], reason="needs onnxruntime-ep-webgpu"
)
def test_webgpu_without_a_gpu_says_what_there_is(tmp_path):
    problem = provider_problem("webgpu")
    assert problem is None or "ONNX Runtime sees: CPU" in problem


def test_openvino_gets_the_threads_and_the_precision_of_a_stage():
    found = openvino_options({}, 3)
    assert found["device_type"] == "CPU"
    assert json.loads(found["load_config"]) == {
        "CPU": {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_NUM_THREADS": "3"}
    }


def test_a_users_own_option_for_openvino_wins():
    found = openvino_options({"num_of_threads": "2", "precision": "BF16", "CACHE_DIR": "/c", "other": "x"}, 3)
    assert json.loads(found["load_config"])["CPU"] == {
        "EXECUTION_MODE_HINT": "ACCURACY",
        "INFERENCE_NUM_THREADS": "2",
        "INFERENCE_PRECISION_HINT": "bf16",
        "CACHE_DIR": "/c",
    }
    assert found["other"] == "x"


def test_openvino_on_a_gpu_is_told_no_threads():
    assert "INFERENCE_NUM_THREADS" not in openvino_options({"device_type": "GPU"}, 3)["load_config"]


@pytest.mark.parametrize(
    ("provider", "threads"),
    [
        ("cpu", 3),
        ("openvino", 3),
        ("openvino:num_of_threads=2", 2),
        ("openvino:device_type=GPU", 0),
        ("cuda:0", 0),
        ("webgpu", 0),
    ],
)
def test_how_many_threads_a_provider_has_on_the_cores(provider, threads):
    assert threads_on_cores(provider, 3) == threads


@needs_openvino
def test_openvino_runs_a_model_with_one_thread(tmp_path):
    path = build.save(build.chain(6, width=512), tmp_path)
    session = open_session(path, threads=1, provider="openvino")
    given = {"x": np.ones((64, 512), np.float32)}
    expected = open_session(path, threads=1).run(given)["y"]
    assert np.abs(session.run(given)["y"] - expected).max() <= 1e-5 * np.abs(expected).max()
    assert session.left_to_cpu == ()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(100):
        session.run(given)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert cpu <= 1.2 * wall  # one thread computes, whatever else the host does


@needs_openvino
def test_a_run_into_the_same_arrays_reads_their_new_values(tmp_path):
    """A plugin has memory of its own: ONNX Runtime copies an input into it when it is bound, not when it runs."""
    path = build.save(build.chain(2), tmp_path)
    there, here = (open_session(path, threads=1, provider=provider) for provider in ("openvino", "cpu"))
    x, y = np.zeros((4, 32), np.float32), np.zeros((4, 32), np.float32)
    for seed in range(4):
        x[...] = np.random.default_rng(seed).standard_normal(x.shape)
        assert there.run_into({"x": x}, {"y": y})["y"] is y
        assert np.abs(y - here.run({"x": x})["y"]).max() <= 1e-5


@needs_openvino
def test_openvino_refuses_a_property_that_it_does_not_know(tmp_path):
    with pytest.raises(ModelRefused, match="on the provider 'openvino:BOGUS=1'"):
        open_session(build.save(build.chain(1), tmp_path), threads=1, provider="openvino:BOGUS=1")


def test_loading_a_plugin_does_not_change_the_providers_of_onnx_runtime(site, tmp_path):
    before = available_providers()
    fake_plugin(site, "made-up", library="junk")
    assert "libplugin.so" in str(provider_problem("made-up"))
    assert available_providers() == before


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        ({"library": "junk" * 100}, "does not load into ONNX Runtime"),
        ({"code": "import os\nos._exit(3)"}, "loading it ended the process with 3"),
    ],
)
def test_doctor_names_what_is_wrong_with_a_plugin(site, monkeypatch, made, problem):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]))
    fake_plugin(site, "made-up", **made)
    found = {plugin.name: plugin for plugin in diagnose().plugins}["made-up"]
    assert (found.package, found.version, found.devices) == ("onnxruntime-ep-made-up", "0.0.1", ())
    assert problem in str(found.problem)


@needs_openvino
@pytest.mark.skipif("OpenVINOExecutionProvider" in available_providers(), reason="this ONNX Runtime has OpenVINO")
def test_doctor_lists_the_devices_of_a_plugin():
    found = {plugin.name: plugin for plugin in diagnose().plugins}["openvino"]
    assert found.problem is None
    assert any(device.startswith("CPU") for device in found.devices)


def beside_an_op_that_openvino_lacks(tmp_path):
    """MatMul, Relu and so on, and a Binarizer between them, which OpenVINO leaves to the CPU."""
    proto = build.chain(6, width=64)
    nodes = list(proto.graph.node)
    nodes[4].input[0] = "binary"  # the MatMul after the second Relu
    nodes.insert(4, helper.make_node("Binarizer", ["h1"], ["binary"], domain="ai.onnx.ml", threshold=0.1, name="bin"))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    return build.save(proto, tmp_path)


@needs_openvino
def test_a_provider_is_asked_which_ops_it_takes(tmp_path):
    path = beside_an_op_that_openvino_lacks(tmp_path)
    found = ask_provider(ModelFile(path), "openvino", threads=1)
    graph = build_graph(open_model(path))
    assert [graph.ops[index].op_type for index in found.left] == ["Binarizer"]
    assert found.refused is None
    assert ask_provider(ModelFile(path), "cpu", threads=1).left == ()


@needs_openvino
def test_a_provider_that_takes_all_and_then_fails_is_asked_about_each_type(tmp_path):
    """OpenVINO takes a Normalizer, and fails to prepare the model that holds it."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="matmul"),
        helper.make_node("Normalizer", ["m"], ["n"], domain="ai.onnx.ml", norm="L2", name="norm"),
        helper.make_node("MatMul", ["n", "w"], ["y"], name="last"),
    ]
    weight = build.constant("w", np.eye(8, dtype=np.float32))
    proto = build.model(nodes, [build.value("x", ["n", 8])], [build.value("y", ["n", 8])], [weight])
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    path = build.save(proto, tmp_path)
    tensors = infer_shapes(build_graph(open_model(path)), {"x": (1, 8)}).specs
    found = ask_provider(ModelFile(path), "openvino", threads=1, tensors=tensors)
    assert found.left == (1,)
    assert "refuses the model on the provider 'openvino'" in str(found.refused)


@needs_openvino
def test_a_cut_keeps_an_op_off_the_provider_that_lacks_it(tmp_path):
    path = beside_an_op_that_openvino_lacks(tmp_path)
    plan = partition(path, out=tmp_path / "m.plan", stages=2, provider="0=cpu,1=openvino", rounds=1)
    assert [stage.provider for stage in plan.stages] == ["cpu", "openvino"]
    first = build_graph(open_model(tmp_path / "m.plan" / plan.stages[0].file))
    assert "Binarizer" in [op.op_type for op in first.ops]
    assert all(not stage.left_to_cpu for stage in plan.stages)
    assert [(use.provider, use.left_to_cpu) for use in plan.providers] == [("cpu", {}), ("openvino", {"Binarizer": 1})]
    assert all(comparison.good for comparison in verify(tmp_path / "m.plan", path))
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    expected = open_session(path, threads=1).run({"x": x})["y"]
    with Pipeline.launch(tmp_path / "m.plan") as pipeline:
        found = pipeline.run({"x": x})["y"]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@needs_openvino
def test_an_op_that_falls_back_is_named_by_the_plan_by_verify_and_by_the_node(tmp_path):
    path = beside_an_op_that_openvino_lacks(tmp_path)
    plan = partition(path, out=tmp_path / "m.plan", stages=2, provider="openvino", rounds=1)
    left = [stage.left_to_cpu for stage in plan.stages]
    assert sorted(left, key=len) == [{}, {"Binarizer": 1}]
    told = []
    assert all(comparison.good for comparison in verify(tmp_path / "m.plan", path, tell=told.append))
    assert [(stage.ran_on, stage.left_to_cpu) for stage in told] == [("openvino", one) for one in left]
    with Pipeline.launch(tmp_path / "m.plan") as pipeline:
        pipeline.run({"x": np.ones((3, 64), np.float32)})
        assert [node.left_to_cpu for node in pipeline.stats()] == left


@needs_openvino
def test_verify_allows_what_the_provider_alone_does_to_the_model(tmp_path):
    path = build.save(build.chain(8, width=128), tmp_path)
    provider = "openvino:precision=BF16"
    partition(path, out=tmp_path / "m.plan", stages=2, provider=provider, rounds=1)
    (comparison,) = verify(tmp_path / "m.plan", path)
    exact, bf16 = (open_session(path, threads=1, provider=one) for one in ("cpu", provider))
    x = load_npz(tmp_path / "m.plan" / "example.npz")
    moved = np.abs(bf16.run(x)["y"] - exact.run(x)["y"]).max()
    assert comparison.good
    assert (comparison.provider_moved > 1e-4) == (moved > 1e-4 * np.abs(exact.run(x)["y"]).max())


def test_stages_of_a_provider_that_is_not_here_are_verified_on_the_cpu(tmp_path):
    path = build.save(build.chain(), tmp_path)
    plan = partition(path, out=tmp_path / "m.plan", stages=2, costs="analytic")
    stages = (plan.stages[0], msgspec.structs.replace(plan.stages[1], provider="nv-tensorrt-rtx"))
    (tmp_path / "m.plan" / "plan.json").write_bytes(msgspec.structs.replace(plan, stages=stages).to_json())
    told = []
    assert all(comparison.good for comparison in verify(tmp_path / "m.plan", path, tell=told.append))
    if provider_problem("nv-tensorrt-rtx") is not None:
        assert [(stage.stage, stage.ran_on) for stage in told] == [(1, "cpu")]
        assert "onnxruntime-ep-nv-tensorrt-rtx" in str(told[0].problem)
