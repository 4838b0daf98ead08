"""The gateway with the clients that users have: every call of tritonclient's four clients, every type, every error."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zlib
from pathlib import Path

import build
import numpy as np
import pytest
from served import Served

from onnxsplit.planning.planner import partition
from onnxsplit.tensors import numpy_dtype

pytest.importorskip("uvicorn", reason="needs the extra serve")
triton_http = pytest.importorskip("tritonclient.http", reason="needs the extra test")
import tritonclient.grpc as triton_grpc  # noqa: E402
import tritonclient.grpc.aio as triton_grpc_aio  # noqa: E402
import tritonclient.http.aio as triton_http_aio  # noqa: E402
from tritonclient.utils import InferenceServerException, np_to_triton_dtype  # noqa: E402

from runtime.gateway.protocol.inference import DATATYPES  # noqa: E402

X = np.arange(64, dtype=np.float32).reshape(2, 32) / 64
CLIENTS = ("http", "grpc", "http.aio", "grpc.aio")


@pytest.fixture(scope="module")
def echo_plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("echo")
    # The search runs to its end, so that the plan is the same on a busy machine.
    partition(build.save(build.echo(), folder), stages=2, out=folder / "echo.plan", costs="analytic", time_limit=250)
    return folder / "echo.plan"


@pytest.fixture(scope="module")
def server(tmp_path_factory, chain_plan, diamond_plan, echo_plan):
    """A chain, a diamond, two heads, an echo of all types, and a chain in two versions."""
    folder = tmp_path_factory.mktemp("served")
    partition(build.save(build.chain(), folder), stages=2, out=folder / "chain.plan", costs="measured", rounds=0)
    partition(build.save(build.heads(), folder), stages=3, out=folder / "heads.plan", costs="analytic")
    for name, plan in (("diamond.plan", diamond_plan), ("echo.plan", echo_plan)):
        shutil.copytree(plan, folder / name)
    for version in ("1", "2", "10"):
        shutil.copytree(chain_plan, folder / "numbered" / version)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    plans = [folder / name for name in ("chain.plan", "diamond.plan", "echo.plan", "heads.plan", "numbered")]
    with Served(*plans, "--versions", "2", "--shared-memory", environment=environment) as found:
        yield found


class Client:
    """One of tritonclient's four clients, with common methods."""

    def __init__(self, kind: str, server: Served) -> None:
        self.kind = kind
        self.grpc = kind.startswith("grpc")
        self.module = triton_grpc if self.grpc else triton_http
        self._loop = asyncio.new_event_loop() if kind.endswith("aio") else None
        self._client = self._call(self._make, server)

    def _make(self, server):
        if not self._loop:
            made = triton_grpc if self.grpc else triton_http
            return made.InferenceServerClient(server.grpc if self.grpc else server.host)

        async def make():
            made = triton_grpc_aio if self.grpc else triton_http_aio
            return made.InferenceServerClient(server.grpc if self.grpc else server.host)

        return make()

    def _call(self, function, *args, **keywords):
        found = function(*args, **keywords)
        return self._loop.run_until_complete(found) if self._loop else found

    def __getattr__(self, name):
        return lambda *args, **keywords: self._call(getattr(self._client, name), *args, **keywords)

    def close(self):
        self._call(self._client.close)
        if self._loop:
            self._loop.close()

    def input(self, name, array, *, binary=True, datatype=None):
        made = self.module.InferInput(name, list(array.shape), datatype or np_to_triton_dtype(array.dtype))
        if self.grpc:
            made.set_data_from_numpy(array)
        else:
            made.set_data_from_numpy(array, binary_data=binary)
        return made

    def output(self, name, *, binary=True, **more):
        if self.grpc:
            return self.module.InferRequestedOutput(name, **more)
        return self.module.InferRequestedOutput(name, binary_data=binary, **more)

    def plain(self, message):
        """Return a message as a dict."""
        if not self.grpc:
            return message
        from google.protobuf import json_format

        return json_format.MessageToDict(message, preserving_proto_field_name=True)


@pytest.fixture(params=CLIENTS)
def client(request, server):
    found = Client(request.param, server)
    yield found
    found.close()


def expected(x=X):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(build.chain().SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


# Every call


def test_health(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("chain")
    assert client.is_model_ready("numbered", "10")
    assert client.is_model_ready("chain.stage1")


def test_metadata(client):
    server = client.plain(client.get_server_metadata())
    assert server["name"] == "onnxsplit"
    assert {"binary_tensor_data", "statistics", "system_shared_memory"} <= set(server["extensions"])
    model = client.plain(client.get_model_metadata("chain"))
    assert (model["name"], model["platform"], model["versions"]) == ("chain", "ensemble", ["1"])
    shape = model["inputs"][0].pop("shape")
    assert [int(size) for size in shape] == [-1, 32]
    assert model["inputs"] == [{"name": "x", "datatype": "FP32"}]
    assert client.plain(client.get_model_metadata("numbered"))["versions"] == ["2", "10"]


def test_configuration_is_of_an_ensemble_whose_steps_can_be_asked_for(client):
    config = client.plain(client.get_model_config("diamond"))
    config = config.get("config", config)
    steps = [step["model_name"] for step in config["ensemble_scheduling"]["step"]]
    assert (config["platform"], steps) == ("ensemble", [f"diamond.stage{stage}" for stage in range(4)])
    stage = client.plain(client.get_model_config(steps[3]))
    stage = stage.get("config", stage)
    assert sorted(entry["name"] for entry in stage["input"]) == ["left", "right"]


def test_inference(client):
    result = client.infer("chain", [client.input("x", X)], request_id="one")
    np.testing.assert_allclose(result.as_numpy("y"), expected(), rtol=1e-5)
    answer = client.plain(result.get_response())
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("chain", "1", "one")
    assert result.as_numpy("nothing") is None


@pytest.mark.parametrize("version", ["", "2", "10"])
def test_inference_of_a_version(client, version):
    result = client.infer("numbered", [client.input("x", X)], model_version=version)
    assert client.plain(result.get_response())["model_version"] == (version or "10")


def test_parameters(client):
    result = client.infer("chain", [client.input("x", X)], priority=2, timeout=60_000_000, parameters={"mine": "yes"})
    assert result.as_numpy("y").shape == (2, 32)


def test_classification(client):
    result = client.infer("chain", [client.input("x", X)], outputs=[client.output("y", class_count=3)])
    best = np.argsort(-expected(), axis=1, kind="stable")[:, :3]
    found = [[int(entry.decode().split(":")[1]) for entry in row] for row in result.as_numpy("y")]
    assert found == best.tolist()


def test_compression(client):
    for coding in ("gzip", "deflate"):
        if client.grpc:
            result = client.infer("chain", [client.input("x", X)], compression_algorithm=coding)
        else:
            result = client.infer(
                "chain", [client.input("x", X)],
                request_compression_algorithm=coding, response_compression_algorithm=coding,
            )  # fmt: skip
        np.testing.assert_allclose(result.as_numpy("y"), expected(), rtol=1e-5)


def test_statistics_count_each_stage_by_itself(client):
    def count(name):
        found = client.plain(client.get_inference_statistics(name))["model_stats"]
        return int(found[0].get("inference_count", 0)), int(found[0]["inference_stats"]["success"].get("ns", 0))

    names = ("chain", "chain.stage0", "chain.stage1")
    before = [count(name) for name in names]
    for _ in range(3):
        client.infer("chain", [client.input("x", X)])
    after = [count(name) for name in names]
    assert [b[0] - a[0] for a, b in zip(before, after, strict=True)] == [6, 6, 6], "rows run one by one here"
    assert all(b[1] > a[1] for a, b in zip(before, after, strict=True))
    everything = client.plain(client.get_inference_statistics())["model_stats"]
    assert {"chain", "chain.stage0", "diamond", "diamond.stage3"} <= {entry["name"] for entry in everything}


def test_the_repository(client):
    index = client.plain(client.get_model_repository_index())
    index = index if isinstance(index, list) else index["models"]
    states = {(entry["name"], entry["version"]): entry["state"] for entry in index}
    assert states["numbered", "1"] == "UNAVAILABLE"
    assert states["numbered", "10"] == states["chain", "1"] == "READY"
    client.unload_model("diamond")
    assert not client.is_model_ready("diamond")
    assert client.is_server_ready(), "what was unloaded on purpose is not missed"
    with pytest.raises(InferenceServerException, match="takes no requests: it was unloaded"):
        client.infer("diamond", [client.input("x", np.ones((1, 16), np.float32))])
    client.load_model("diamond")
    assert client.is_model_ready("diamond")
    assert client.infer("diamond", [client.input("x", np.ones((1, 16), np.float32))]).as_numpy("y").shape == (1, 16)
    with pytest.raises(InferenceServerException, match="a model is loaded without parameters"):
        client.load_model("diamond", config="{}")


def test_shared_memory(client):
    import tritonclient.utils.shared_memory as shm

    out_bytes, name = expected().nbytes, f"test-{os.getpid()}-{id(client)}"
    region = shm.create_shared_memory_region("both", f"/{name}", X.nbytes + out_bytes)
    try:
        shm.set_shared_memory_region(region, [X])
        client.register_system_shared_memory("both", f"/{name}", X.nbytes + out_bytes)
        status = client.plain(client.get_system_shared_memory_status())
        status = status[0] if isinstance(status, list) else status["regions"]["both"]
        assert (status["name"], int(status["byte_size"])) == ("both", X.nbytes + out_bytes)
        given = client.module.InferInput("x", list(X.shape), "FP32")
        given.set_shared_memory("both", X.nbytes)
        wanted = client.output("y")
        wanted.set_shared_memory("both", out_bytes, X.nbytes)
        result = client.infer("chain", [given], outputs=[wanted])
        output = result.get_output("y")
        assert not (output.parameters if client.grpc else output.get("parameters"))
        found = shm.get_contents_as_numpy(region, np.float32, list(X.shape), X.nbytes)
        np.testing.assert_allclose(found, expected(), rtol=1e-5)
        wanted.set_shared_memory("both", out_bytes, 2 * X.nbytes)
        with pytest.raises(InferenceServerException, match="are outside of region"):
            client.infer("chain", [given], outputs=[wanted])
        with pytest.raises(InferenceServerException, match="registered already"):
            client.register_system_shared_memory("both", f"/{name}", 8)
        client.unregister_system_shared_memory("both")
        client.unregister_system_shared_memory()
        with pytest.raises(InferenceServerException, match="not registered"):
            client.infer("chain", [given], outputs=[wanted])
    finally:
        shm.destroy_shared_memory_region(region)


def test_what_is_not_there_says_so(client):
    assert not client.plain(client.get_cuda_shared_memory_status())
    client.unregister_cuda_shared_memory()
    code = "UNIMPLEMENTED" if client.grpc else "501"
    for call in (
        client.get_trace_settings,
        lambda: client.update_trace_settings(settings={"trace_level": ["OFF"]}),
        client.get_log_settings,
        lambda: client.update_log_settings({"log_info": True}),
        lambda: client.register_cuda_shared_memory("r", b"aGFuZGxl", 0, 64),
    ):
        with pytest.raises(InferenceServerException, match="this server does not have") as error:
            call()
        assert code in str(error.value.status())


def test_callbacks_and_streams(server):
    with triton_http.InferenceServerClient(server.host, concurrency=4) as http:
        given = Client("http", server).input("x", X)
        futures = [http.async_infer("chain", [given], request_id=str(number)) for number in range(8)]
        assert [f.get_result().get_response()["id"] for f in futures] == [str(number) for number in range(8)]
    with triton_grpc.InferenceServerClient(server.grpc) as rpc:
        given = triton_grpc.InferInput("x", [2, 32], "FP32")
        given.set_data_from_numpy(X)
        found, done = [], threading.Event()

        def heard(result, error):
            found.append(str(error) if error is not None else result.get_response().id)
            if len(found) == 21:
                done.set()

        called = threading.Event()
        rpc.async_infer("chain", [given], callback=lambda result, error: called.set())
        assert called.wait(60)
        rpc.start_stream(heard)
        for number in range(20):
            rpc.async_stream_infer("chain", [given], request_id=str(number))
        rpc.async_stream_infer("nobody", [given])
        assert done.wait(60)
        rpc.stop_stream()
        assert found[:20] == [str(number) for number in range(20)]
        assert "model 'nobody' is unknown" in found[20]


def test_a_stream_of_the_asyncio_client(server):
    async def talk():
        async with triton_grpc_aio.InferenceServerClient(server.grpc) as rpc:
            given = triton_grpc.InferInput("x", [2, 32], "FP32")
            given.set_data_from_numpy(X)

            async def ask():
                for number in range(5):
                    yield {"model_name": "chain", "inputs": [given], "request_id": str(number)}

            return [result.get_response().id async for result, error in rpc.stream_infer(ask()) if error is None]

    assert asyncio.run(talk()) == ["0", "1", "2", "3", "4"]


# Every type


def sample(dtype):
    if dtype == "string":
        return np.array([["", "a b"], ["ä漢", "line\nend"]], object)
    if dtype == "bool":
        return np.array([[True, False], [False, True]])
    kind = numpy_dtype(dtype)
    if kind.kind in "iu":
        top = np.iinfo(kind)
        return np.array([[top.min, top.max], [0, 1]], kind)
    return np.array([[0.5, -2], [1e3, 0]]).astype(kind)


SAMPLES = {dtype: sample(dtype) for dtype in build.ECHOED}
NOT_JSON = ("float16", "bfloat16")  # tritonclient sends these as bytes only


def wide(dtype):
    """Return a sample in types that JSON can have: bfloat16 becomes float32."""
    return SAMPLES[dtype].astype(np.float32) if dtype == "bfloat16" else SAMPLES[dtype]


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_every_type_comes_back_through_the_clients(client, binary):
    if client.grpc and not binary:
        pytest.skip("gRPC has no JSON; its typed contents have a test of their own")
    modes = {dtype: binary or dtype in NOT_JSON for dtype in SAMPLES}
    inputs = [
        client.input(f"in_{dtype}", SAMPLES[dtype], binary=mode, datatype=DATATYPES[dtype])
        for dtype, mode in modes.items()
    ]
    result = client.infer("echo", inputs, outputs=[client.output(f"out_{d}", binary=mode) for d, mode in modes.items()])
    for dtype in SAMPLES:
        found = result.as_numpy(f"out_{dtype}")
        if dtype == "string":
            found = np.array([x.decode() if isinstance(x, bytes) else x for x in found.ravel()], object).reshape(2, 2)
        assert np.array_equal(found, SAMPLES[dtype]), dtype


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_every_type_comes_back_as_json(server, nested):
    def items(dtype):
        return [item for row in wide(dtype).tolist() for item in row]

    given = [
        {
            "name": f"in_{dtype}", "shape": [2, 2], "datatype": DATATYPES[dtype],
            "data": wide(dtype).tolist() if nested else items(dtype),
        }
        for dtype in SAMPLES
    ]  # fmt: skip
    answer = server.json("/v2/models/echo/infer", {"inputs": given})
    assert answer["outputs"] == [
        {"name": f"out_{dtype}", "datatype": DATATYPES[dtype], "shape": [2, 2], "data": items(dtype)}
        for dtype in SAMPLES
    ]


def test_every_type_comes_back_from_typed_contents(server):
    import grpc
    from tritonclient.grpc import service_pb2 as pb
    from tritonclient.grpc import service_pb2_grpc

    fields = {
        "bool": "bool",
        "float32": "fp32",
        "float64": "fp64",
        "int64": "int64",
        "uint64": "uint64",
        "string": "bytes",
    }
    values = {d: [item.encode() if d == "string" else item for item in wide(d).ravel().tolist()] for d in SAMPLES}
    request = pb.ModelInferRequest(model_name="chain")
    plain = request.inputs.add(name="x", datatype="FP32", shape=[2, 32])
    plain.contents.fp32_contents.extend(X.ravel().tolist())
    with grpc.insecure_channel(server.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        np.testing.assert_allclose(
            triton_grpc.InferResult(stub.ModelInfer(request)).as_numpy("y"), expected(), rtol=1e-5
        )
        for dtype in SAMPLES:
            field = fields.get(dtype, "uint" if dtype.startswith("u") else "int")
            single = pb.ModelInferRequest(model_name="echo")
            tensor = single.inputs.add(name=f"in_{dtype}", datatype=DATATYPES[dtype], shape=[2, 2])
            if dtype in NOT_JSON:
                words = "can only be given in raw_input_contents"
            else:
                getattr(tensor.contents, f"{field}_contents").extend(values[dtype])
                words = "the inputs do not fit the model"  # only this input was read; the others are missing
            with pytest.raises(grpc.RpcError) as error:
                stub.ModelInfer(single)
            assert words in error.value.details()
            assert f"'in_{dtype}' is missing" not in error.value.details()
            assert f"'in_{dtype}' has" not in error.value.details()


def test_a_subset_of_the_outputs_runs_only_the_stages_it_needs(client, server):
    plan = server.json("/v2/models/heads/config")["ensemble_scheduling"]["step"]
    makes = {name: step["model_name"] for step in plan for name in step["output_map"]}

    def count(name):
        return server.json(f"/v2/models/{makes[name]}/stats")["model_stats"][0]["inference_count"]

    before = {name: count(name) for name in ("a", "left", "right")}
    result = client.infer("heads", [client.input("x", X[:, :16].copy())], outputs=[client.output("right")])
    assert result.as_numpy("right").shape == (2, 16)
    assert result.as_numpy("left") is None
    assert {name: count(name) - before[name] for name in before} == {"a": 1, "left": 0, "right": 1}


# Every error


def infer(server, body, path="/v2/models/chain/infer", **headers):
    status, _, found = server.ask(path, body if isinstance(body, bytes) else json.dumps(body).encode(), **headers)
    return status, json.loads(found).get("error", "")


def tensor(**changed):
    return {"name": "x", "shape": [1, 32], "datatype": "FP32", "data": [0.5] * 32, **changed}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "does not fit the protocol"),
        (b"", "does not fit the protocol"),
        (b"[]", "does not fit the protocol"),
        (b"\xff\xfe", "does not fit the protocol"),
        (b'{"inputs":' + b"[" * 100_000, "does not fit the protocol"),
        ({"inputs": []}, "'x' is missing"),
        ({"inputs": [tensor(), tensor()]}, "given twice"),
        ({"inputs": [tensor(name="z")]}, "'z' is unknown"),
        ({"inputs": [tensor(datatype="FP99")]}, "datatype 'FP99'; allowed: BOOL"),
        ({"inputs": [tensor(datatype="INT64", data=[1] * 32)]}, "has type int64, expected float32"),
        ({"inputs": [tensor(shape=[1, 31])]}, "has 32 elements; shape [1, 31] has 31"),
        ({"inputs": [tensor(shape=[-1, 32])]}, "sizes must be 0 or more"),
        ({"inputs": [tensor(shape=[1] * 40)]}, "at most 32"),
        ({"inputs": [tensor(shape=[32])]}, "expected 2: [batch, 32]"),
        ({"inputs": [tensor(data=["a"] * 32)]}, "are not FP32"),
        ({"inputs": [tensor(data=[None] * 32)]}, "are not FP32"),
        ({"inputs": [tensor(data=[[1] * 16, [1] * 15])]}, "has 31 elements"),
        ({"inputs": [tensor(datatype="UINT8", data=[300] * 32)]}, "are not UINT8"),
        ({"inputs": [tensor(datatype="BOOL", data=[1] * 32)]}, "are not BOOL"),
        ({"inputs": [tensor(data=None, parameters={"binary_data_size": 8})]}, "needs exactly one of"),
        ({"inputs": [{"name": "x", "shape": [1, 32], "datatype": "FP32"}]}, "needs exactly one of"),
        ({"inputs": [tensor()], "outputs": [{"name": "q"}]}, "has no output 'q'; it has y"),
        ({"inputs": [tensor()], "outputs": [{"name": "y"}, {"name": "y"}]}, "asked for an output twice"),
        ({"inputs": [tensor()], "parameters": {"timeout": "soon"}}, "parameter 'timeout' is 'soon'"),
        ({"inputs": [tensor()], "parameters": {"timeout": -1}}, "timeout is -1"),
        ({"inputs": [tensor()], "parameters": {"sequence_id": 3}}, "sequence_id"),
        ({"inputs": [tensor()], "outputs": [{"name": "y", "parameters": {"classification": -1}}]}, "classification"),
        ({"inputs": [{**tensor(), "parameters": {"shared_memory_region": "r"}}]}, "needs shared_memory_region"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_request_is_said(server, body, message):
    status, said = infer(server, body)
    assert status == 400
    assert message in said


@pytest.mark.parametrize(
    ("sizes", "header", "message"),
    [
        ([128], "9999", "the body has"),
        ([128], "x", "it must be a number of bytes"),
        ([127], None, "has 127 bytes; FP32 of shape [1, 32] has 128"),
        ([1 << 40], None, "claims 1099511627776 bytes"),
        ([-1], None, "claims -1 bytes"),
        ([64], None, "has 64 bytes"),
    ],
)
def test_what_is_wrong_with_binary_tensors_is_said(server, sizes, header, message):
    head = json.dumps(
        {"inputs": [{"name": "x", "shape": [1, 32], "datatype": "FP32", "parameters": {"binary_data_size": sizes[0]}}]}
    ).encode()
    length = header or str(len(head))
    status, said = infer(server, head + bytes(128), Inference_Header_Content_Length=length)
    assert status == 400
    assert message in said


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/v2/models/nobody/infer", 404, "model 'nobody' is unknown; this server has chain"),
        ("/v2/models/chain/versions/7/infer", 404, "has no version '7'; it has 1"),
        ("/v2/models/numbered/versions/1/infer", 503, "takes no requests"),
        ("/v2/models/chain.stage0/infer", 501, "ask 'chain'"),
        ("/v2/models/chain.stage9/infer", 404, "is unknown"),
        ("/v2/nothing", 404, "/openapi.json lists all paths"),
    ],
)
def test_unknown_models_versions_and_paths_are_reported(server, path, status, message):
    found, said = infer(server, {"inputs": [tensor()]}, path)
    assert (found, message in said) == (status, True), said


def test_a_wrong_method_is_said(server):
    status, headers, body = server.ask("/v2/models/chain/infer")
    assert (status, headers["allow"]) == (405, "POST")
    assert "method not allowed" in json.loads(body)["error"]


def test_errors_have_their_grpc_codes(server):
    with triton_grpc.InferenceServerClient(server.grpc) as rpc:
        given = triton_grpc.InferInput("x", [2, 32], "FP32")
        given.set_data_from_numpy(X)
        for call, code in (
            (lambda: rpc.infer("nobody", [given]), "NOT_FOUND"),
            (lambda: rpc.infer("chain", []), "INVALID_ARGUMENT"),
            (lambda: rpc.infer("numbered", [given], model_version="1"), "UNAVAILABLE"),
            (lambda: rpc.infer("chain.stage0", [given]), "UNIMPLEMENTED"),
            (lambda: rpc.get_model_config("nobody"), "NOT_FOUND"),
            (lambda: rpc.unload_model("nobody"), "NOT_FOUND"),
        ):
            with pytest.raises(InferenceServerException) as error:
                call()
            assert code in str(error.value.status())


def test_infinite_outputs_cannot_be_json(server):
    head = {**tensor(parameters={"binary_data_size": 128}), "data": None}
    body = json.dumps({"inputs": [{name: value for name, value in head.items() if value is not None}]}).encode()
    data = np.full(32, np.inf, np.float32).tobytes()
    status, said = infer(server, body + data, Inference_Header_Content_Length=str(len(body)))
    assert (status, "ask for it as binary data" in said) == (400, True)


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_bodies_are_bounded(server, coding, pack):
    status, said = infer(server, pack(bytes(300 << 20)), Content_Encoding=coding)
    assert (status, "decompressed, the request has more" in said) == (413, True)
    status, said = infer(server, pack(json.dumps({"inputs": [tensor()]}).encode())[:-5], Content_Encoding=coding)
    assert (status, "ends within its" in said) == (400, True)
    status, said = infer(server, b"not compressed", Content_Encoding=coding)
    assert (status, f"is not {coding}" in said) == (400, True)


def test_an_unknown_coding_is_said(server):
    status, said = infer(server, b"x", Content_Encoding="br")
    assert (status, "allowed: gzip, deflate" in said) == (400, True)


def test_pages_of_other_sites_are_refused(server):
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        status, said = infer(server, {"inputs": [tensor()]}, **headers)
        assert status == 403
        assert "evil.example" in said


@pytest.mark.parametrize("key", ["../etc/passwd", "/", "..", "a/b", "", "/no-such-memory", "x" * 300])
def test_regions_are_of_shared_memory_alone(server, key):
    status, said = infer(server, {"key": key, "byte_size": 64}, "/v2/systemsharedmemory/region/r/register")
    assert status == (404 if key == "/no-such-memory" else 400), said
    assert "region 'r'" in said


# Metadata, statistics and description


def test_metrics_follow_prometheus_rules(server):
    from prometheus_client.parser import text_string_to_metric_families

    infer(server, {"inputs": [tensor()]})
    status, headers, body = server.ask("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    ours = [family for name, family in families.items() if name.startswith("onnxsplit_")]
    assert len(ours) > 15
    assert {name for name in families if not name.startswith(("onnxsplit_", "nv_inference_"))} == set()
    labels = {label for family in families.values() for sample in family.samples for label in sample.labels}
    assert labels <= {"model", "version", "stage", "replica", "reason", "result", "device", "le"}
    for family in ours:
        assert family.documentation
        assert family.type != "counter" or all(s.name.endswith(("_total", "_created")) for s in family.samples)
        assert not re.search(r"_(ms|us|ns|milliseconds)\b", family.name)
    run = [s for s in families["onnxsplit_node_run_seconds"].samples if s.labels["model"] == "chain"]
    count = {s.labels["stage"]: s.value for s in run if s.name.endswith("_count")}
    last = {s.labels["stage"]: s.value for s in run if s.labels.get("le") == "+Inf"}
    assert count == last
    assert all(value > 0 for value in count.values())


@pytest.mark.parametrize("examples", [10, pytest.param(100, marks=pytest.mark.exhaustive)])
def test_the_description_holds(tmp_path, python_environment, examples):
    """Schemathesis makes valid and invalid requests from the description, and compares the answers with it."""
    pytest.importorskip("schemathesis", reason="needs the extra test")
    # These operations answer 501, as described. A tensor that the schema allows may not fit the model, so refusals are
    # allowed.
    refused = "trace/setting|logging|cudasharedmemory/region/.*/register|unload"
    # A plan that was cut at named tensors is not planned anew, so that no change of the plan takes long.
    partition(build.save(build.chain(), tmp_path), out=tmp_path / "model.plan", cut_at=["h2"], costs="analytic")
    with Served(tmp_path / "model.plan", environment=python_environment) as server:
        document = server.json("/openapi.json")
        assert sum(len(verbs) for verbs in document["paths"].values()) > 35
        done = subprocess.run(
            [Path(sys.executable).parent / "schemathesis", "run", f"{server.http}/openapi.json", "--max-examples",
             str(examples), "--exclude-path-regex", refused, "--exclude-checks", "positive_data_acceptance",
             "--no-color", "--seed", "1"],
            capture_output=True, text=True, check=False, cwd=tempfile.gettempdir(),
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(re.search(r"(\d+) generated", done.stdout)[1]) > 20 * examples
