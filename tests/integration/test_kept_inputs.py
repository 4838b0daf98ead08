"""Answers and errors of a running plan whose inputs have defaults, or with inputs and outputs left out."""

from __future__ import annotations

import json

import build
import numpy as np
import pytest
from onnx import TensorProto, helper
from served import Served

from onnxsplit.errors import InputError
from onnxsplit.planning.planner import partition
from runtime import Pipeline
from runtime.bench import bench

X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
TEN = np.array([10.0], np.float32)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """y = relu(x * scale) * scale + shift in two stages, both of which read scale; z and its output are left out."""
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Mul", ["b", "scale"], ["c"]),
        helper.make_node("Add", ["c", "shift"], ["y"]),
        helper.make_node("Add", ["a", "z"], ["q"]),
    ]
    inputs = [
        build.value("x", ["n", 4]),
        build.value("z", ["n", 4]),
        build.value("scale", [1]),
        build.value("shift", [4]),
    ]
    outputs = [build.value("y", ["n", 4]), build.value("q", ["n", 4])]
    constants = [build.constant("scale", np.array([2.0], np.float32)), build.constant("shift", np.ones(4, np.float32))]
    folder = tmp_path_factory.mktemp("ends")
    path = build.save(build.model(nodes, inputs, outputs, constants), folder)
    made = partition(
        path, out=folder / "m.plan", cut_at=["b"], keep_inputs=["scale"], drop_outputs=["q"], costs="measured", rounds=1
    )
    assert all("scale" in stage.inputs for stage in made.stages)
    assert (made.tensors["x"].batch_axis, made.tensors["scale"].batch_axis) == (0, None)
    return folder / "m.plan"


def expected(x, scale):
    return np.maximum(x * scale, 0) * scale + 1


def test_an_input_with_a_default_may_be_left_out_of_any_request(plan):
    with Pipeline.launch(plan, micro_batch=2) as pipeline:
        asked = [({"x": X}, 2), ({"x": X, "scale": TEN}, 10), ({"x": np.concatenate([X] * 5)}, 2)] * 3
        futures = [pipeline.submit(given) for given, _ in asked]
        for (given, scale), future in zip(asked, futures, strict=True):
            assert np.array_equal(future.result(60)["y"], expected(given["x"], np.float32(scale)))


def test_a_value_for_a_constant_or_an_input_left_out_is_told_so(plan):
    with Pipeline.launch(plan) as pipeline:
        with pytest.raises(InputError, match=r"'shift' became a constant .* cut again with --keep-input shift to give"):
            pipeline.submit({"x": X, "shift": np.zeros(4, np.float32)})
        with pytest.raises(InputError, match=r"'z' is no longer an input: .*need it \(q\)"):
            pipeline.submit({"x": X, "z": X})
        with pytest.raises(InputError, match="'u' is unknown"):
            pipeline.submit({"x": X, "u": X})


def test_clients_see_that_an_input_is_optional_and_joined_requests_keep_their_own(plan, python_environment):
    def body(scale: float | None = None, **more: list[float]) -> bytes:
        def tensor(name: str, values: np.ndarray) -> dict:
            return {"name": name, "shape": values.shape, "datatype": "FP32", "data": values.tolist()}

        inputs = [tensor("x", X)] + ([tensor("scale", np.array([scale]))] if scale is not None else [])
        return json.dumps({"inputs": inputs + [tensor(n, np.array(v)) for n, v in more.items()]}).encode()

    with Served(plan, "--max-batch", 8, environment=python_environment) as server:
        config = json.loads(server.ask("/v2/models/m/config")[2])
        assert [(entry["name"], entry.get("optional", False)) for entry in config["input"]] == [
            ("x", False),
            ("scale", True),
        ]
        for scale in (None, 10.0, None, 3.0):
            status, _, answer = server.ask("/v2/models/m/infer", body(scale))
            assert status == 200, answer
            found = np.array(json.loads(answer)["outputs"][0]["data"], np.float32).reshape(3, 4)
            assert np.allclose(found, expected(X, np.float32(scale or 2)), rtol=1e-6)
        status, _, answer = server.ask("/v2/models/m/infer", body(shift=[0.0, 0, 0, 0]))
        assert status == 400
        assert "cut again with --keep-input shift" in json.loads(answer)["error"]
        import tritonclient.grpc as triton

        with triton.InferenceServerClient(server.grpc) as client:
            said = {entry.name: entry.optional for entry in client.get_model_config("m").config.input}
            assert said == {"x": False, "scale": True}
            given = triton.InferInput("x", X.shape, "FP32")
            given.set_data_from_numpy(X)
            assert np.array_equal(client.infer("m", [given]).as_numpy("y"), expected(X, np.float32(2)))


def test_no_rows_are_claimed_where_a_kept_input_says_how_they_are_grouped(tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Reshape", ["a", "shape"], ["b"]),
        helper.make_node("Sin", ["b"], ["y"]),
    ]
    inputs = [build.value("x", ["n", 4]), build.value("shape", [2], TensorProto.INT64)]
    shape = build.constant("shape", np.array([-1, 4]))
    path = build.save(build.model(nodes, inputs, [build.value("y", ["p", "q"])], [shape]), tmp_path)
    made = partition(path, stages=2, out=tmp_path / "m.plan", keep_inputs=["shape"], costs="measured", rounds=1)
    assert made.tensors["y"].batch_axis is None
    with Pipeline.launch(tmp_path / "m.plan", micro_batch=1) as pipeline:
        found = pipeline.run({"x": X, "shape": np.array([2, -1])})["y"]
        assert np.allclose(found, np.sin(np.maximum(X, 0)).reshape(2, -1))
        assert pipeline.run({"x": X})["y"].shape == (3, 4)


def test_a_plan_without_some_outputs_is_not_measured_against_the_whole_model(plan):
    with pytest.raises(InputError, match=r"leaves out the output q, .* without --model"):
        bench(plan, model=plan.parent / "model.onnx")
