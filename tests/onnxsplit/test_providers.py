from __future__ import annotations

import json
import os
import sys
import time

import build
import numpy as np
import pytest
from plugins import fake_plugin

from onnxsplit.errors import ModelRefused, ProviderError
from onnxsplit.providers import (
    available_providers,
    installed_plugins,
    parse_provider,
    provider_here,
    provider_problem,
    uses_cores,
)
from onnxsplit.providers.openvino import openvino_options
from onnxsplit.session import open_session
from onnxsplit.views.doctor import diagnose

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


def test_which_providers_use_the_hosts_cores():
    assert [uses_cores(text) for text in ("cpu", "openvino", "openvino:device_type=GPU", "cuda:0", "webgpu")] == [
        True,
        True,
        False,
        False,
        False,
    ]


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
