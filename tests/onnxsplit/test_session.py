from __future__ import annotations

import subprocess
import sys
import weakref

import build
import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxsplit.binding import view_of
from onnxsplit.errors import ModelError, ProviderError
from onnxsplit.planning.planner import partition
from onnxsplit.providers import available_providers, parse_provider, providers_by_stage
from onnxsplit.session import open_session
from onnxsplit.stages.verify import verify


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("cpu", "CPUExecutionProvider", {}),
        ("cuda", "CUDAExecutionProvider", {}),
        ("cuda:1", "CUDAExecutionProvider", {"device_id": "1"}),
        ("openvino:device_type=GPU", "OpenVINOExecutionProvider", {"device_type": "GPU"}),
        (
            "XnnpackExecutionProvider:2:threads=4",
            "XnnpackExecutionProvider",
            {"device_id": "2", "threads": "4"},
        ),
    ],
)
def test_providers_are_read(text, name, options):
    found = parse_provider(text)
    assert (found.name, dict(found.options)) == (name, options)


@pytest.mark.parametrize("text", ["gpu", "cuda:x", "cpu:1", "cpu:arena=1", ""])
def test_unknown_providers_are_refused(text):
    with pytest.raises(ProviderError):
        parse_provider(text)


def test_providers_by_stage():
    assert providers_by_stage("cpu", 2) == ("cpu", "cpu")
    assert providers_by_stage("0=cuda:0,1=cpu", 3) == ("cuda:0", "cpu", "cpu")
    assert providers_by_stage("1=cuda:1", 2, default=["cuda:0", "cpu"]) == ("cuda:0", "cuda:1")
    with pytest.raises(ProviderError, match="the stages are 0 to 1"):
        providers_by_stage("2=cpu", 2)


@pytest.mark.skipif("CUDAExecutionProvider" in available_providers(), reason="this ONNX Runtime has CUDA")
def test_asking_for_cuda_without_it_says_what_to_install(tmp_path):
    with pytest.raises(ProviderError, match=r"onnxsplit\[gpu\]"):
        open_session(build.save(build.chain(1), tmp_path), threads=1, provider="cuda")


def test_a_model_onnx_runtime_refuses_is_an_error_of_ours(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"ONNX Runtime .* refuses the model"):
        open_session(tmp_path / "m.onnx", threads=1)


def test_bfloat16_goes_in_and_out(tmp_path):
    kind = TensorProto.BFLOAT16
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Neg", ["wide"], ["negated"]),
        helper.make_node("Cast", ["negated"], ["y"], to=kind),
    ]
    proto = build.model(nodes, [build.value("x", [2], kind)], [build.value("y", [2], kind)])
    session = open_session(build.save(proto, tmp_path), threads=1)
    found = session.run({"x": np.array([1.5, -2], dtype=ml_dtypes.bfloat16)})["y"]
    assert found.dtype == ml_dtypes.bfloat16
    assert found.tolist() == [-1.5, 2]


def strings_beside_bfloat16() -> onnx.ModelProto:
    """A model with strings and bfloat16 as inputs and outputs, and float32 between, so that it can be cut."""
    kind = TensorProto.BFLOAT16
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Neg", ["wide"], ["negated"]),
        helper.make_node("Cast", ["negated"], ["narrow"], to=kind),
        helper.make_node("Identity", ["s"], ["passed"]),
        helper.make_node("Identity", ["narrow"], ["y"]),
        helper.make_node("Identity", ["passed"], ["t"]),
    ]
    inputs = [build.value("x", ["n"], kind), build.value("s", ["n", "m"], TensorProto.STRING)]
    outputs = [build.value("y", ["n"], kind), build.value("t", ["n", "m"], TensorProto.STRING)]
    return build.model(nodes, inputs, outputs)


@pytest.mark.parametrize("texts", [[["a", "b \u20ac"], ["", "c" * 1000]], [[], []]])
def test_a_model_takes_and_gives_strings_beside_bfloat16(tmp_path, texts):
    """ONNX Runtime makes no value of strings, and takes bfloat16 as nothing else: "only supported from non-string"."""
    session = open_session(build.save(strings_beside_bfloat16(), tmp_path), threads=1)
    given = {"x": np.array([1.5, -2], ml_dtypes.bfloat16), "s": np.array(texts, dtype=object)}
    for _ in range(2):
        found = session.run(given)
        assert found["y"].dtype == ml_dtypes.bfloat16
        assert found["y"].tolist() == [-1.5, 2]
        assert found["t"].tolist() == texts


def test_a_stage_with_strings_beside_bfloat16_runs(tmp_path):
    model = build.save(strings_beside_bfloat16(), tmp_path)
    plan = partition(model, out=tmp_path / "m.plan", cut_at=["narrow", "passed"])
    assert {cut.tensor for cut in plan.cuts} == {"narrow", "passed"}
    assert all(c.exact for c in verify(tmp_path / "m.plan", model))


WITHOUT_RUNTIME = """
import sys, builtins
real = builtins.__import__
def guarded(name, *rest, **more):
    if name.split(".")[0] == "onnxruntime":
        raise {error}
    return real(name, *rest, **more)
builtins.__import__ = guarded
sys.argv = ["onnxsplit", {arguments}]
from onnxsplit.cli import main
main()
"""


def without_runtime(environment, error: str, *arguments: object):
    words = ", ".join(repr(str(argument)) for argument in arguments)
    code = WITHOUT_RUNTIME.format(error=error, arguments=words)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


ABSENT = "ModuleNotFoundError('No module named onnxruntime', name='onnxruntime')"


def test_without_onnx_runtime_analytic_partition_works(tmp_path, python_environment):
    model = build.save(build.chain(), tmp_path)
    arguments = ["partition", model, "-o", tmp_path / "p.plan", "--costs", "analytic"]
    done = without_runtime(python_environment, ABSENT, *arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p.plan" / "plan.json").exists()


def test_without_onnx_runtime_the_message_names_both_extras(tmp_path, chain_plan, python_environment):
    model = build.save(build.chain(), tmp_path)
    done = without_runtime(python_environment, ABSENT, "verify", chain_plan, model)
    assert done.returncode == 1
    assert "onnxsplit[cpu]" in done.stderr
    assert "onnxsplit[gpu]" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_onnx_runtime_that_fails_to_import_says_what_is_missing(tmp_path, chain_plan, python_environment):
    model = build.save(build.chain(), tmp_path)
    error = "ImportError('libcudart.so.13: cannot open shared object file')"
    done = without_runtime(python_environment, error, "verify", chain_plan, model)
    assert done.returncode == 1
    assert "libcudart.so.13" in done.stderr
    assert "Traceback" not in done.stderr


def test_answers_stay_right_when_more_places_came_than_bindings_are_kept(tmp_path):
    """A binding's inputs must live as long as the binding: before, one in 256 new ones read freed memory."""
    session = open_session(build.save(build.chain(6, 48), tmp_path), threads=1)
    source = np.random.default_rng(0)
    for into in [np.empty((70, 48), np.float32) for _ in range(1300)]:
        given = {"x": source.standard_normal((70, 48)).astype(np.float32)}
        found = session.run_into(given, {"y": into})["y"].copy()
        np.testing.assert_allclose(found, session.run(given)["y"], atol=1e-5)


def _scaled():
    """y = x * s, on a session that can be bound."""
    nodes = [helper.make_node("Mul", ["x", "s"], ["y"])]
    proto = build.model(nodes, [build.value("x", ["n"]), build.value("s", [1])], [build.value("y", ["n"])])
    return open_session(proto.SerializeToString(), threads=1)


def test_a_binding_reads_and_writes_where_it_was_bound_last():
    binding = _scaled().binding()
    x, y = np.arange(4, dtype=np.float32), np.zeros(4, np.float32)
    binding.read("x", x)
    binding.write("y", y)
    for factor in (2.0, 3.0):
        binding.feed("s", np.array([factor], np.float32))
        x += 1
        binding.run()
        assert np.array_equal(y, x * np.float32(factor))
    binding.make("y")
    binding.run()
    first = binding.made()["y"]
    binding.feed("x", np.ones(2, np.float32))
    binding.make("y")
    binding.run()
    assert view_of(first, "float32").tolist() == (x * 3).tolist()
    assert view_of(binding.made()["y"], "float32").tolist() == [3, 3]
    binding.read_value("x", first)
    binding.make("y")
    binding.run()
    assert view_of(binding.made()["y"], "float32").tolist() == (x * 9).tolist()


def test_a_binding_does_not_keep_large_tensors_of_one_run():
    binding = _scaled().binding()
    binding.feed("s", np.ones(1, np.float32))
    x, y = np.ones(1 << 16, np.float32), np.zeros(1 << 16, np.float32)
    gone = weakref.ref(x), weakref.ref(y)
    binding.feed("x", x)
    binding.fill("y", y)
    binding.run()
    assert y.all()
    del x, y
    assert [one() for one in gone] == [None, None]


def test_a_binding_names_what_onnx_runtime_refuses():
    binding = _scaled().binding()
    binding.feed("s", np.ones(1, np.float32))
    binding.feed("x", np.ones(3, np.float32))
    binding.write("y", np.zeros(2, np.float32))
    with pytest.raises(ModelError, match="shape"):
        binding.run()
