"""Sequences of requests for models with recurrent states, from Triton's clients, against one ONNX Runtime session."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import build
import numpy as np
import onnxruntime
import pages
import psutil
import pytest
import zoo
from decoder_plans import cut, describe
from decoder_runs import FAMILIES, ROOM, Reference
from onnx import helper
from processes import children_of
from waiting import wait_until

pytest.importorskip("uvicorn", reason="needs the extra serve")

import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from reader import Reader
from served import PENDING, Served
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from onnxsplit.planning.planner import partition

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
WIDTH, STATE = 4, 8
STATES = ("--state", "h0=hn", "--state", "c0=cn")


def lstm() -> Any:
    """An LSTM whose states pass through the caller, with a linear map behind it."""
    rng = np.random.default_rng(5)

    def weights(name: str, *shape: int) -> Any:
        return build.constant(name, (rng.standard_normal(shape) / 3).astype(np.float32))

    state = [1, "batch", STATE]
    reads, writes = ["x", "W", "R", "B", "", "h0", "c0"], ["all", "hn", "cn"]
    return build.model(
        [
            helper.make_node("LSTM", reads, writes, hidden_size=STATE, name="lstm"),
            helper.make_node("MatMul", ["hn", "M"], ["y"], name="map"),
        ],
        [build.value("x", ["time", "batch", WIDTH]), build.value("h0", state), build.value("c0", state)],
        [build.value("y", [1, "batch", 3]), build.value("hn", state), build.value("cn", state)],
        [
            *(weights("W", 1, 4 * STATE, WIDTH), weights("R", 1, 4 * STATE, STATE)),
            *(weights("B", 1, 8 * STATE), weights("M", STATE, 3)),
        ],
    )


def memory() -> Any:
    """A model that remembers all its inputs: y is their sum, and the cache grows by one place with each request."""
    return build.model(
        [
            helper.make_node("Concat", ["past", "x"], ["present"], axis=1, name="join"),
            helper.make_node("ReduceSum", ["present", "axes"], ["y"], keepdims=0, name="sum"),
        ],
        [build.value("x", ["batch", 1, WIDTH]), build.value("past", ["batch", "before", WIDTH])],
        [build.value("y", ["batch", WIDTH]), build.value("present", ["batch", "after", WIDTH])],
        [build.constant("axes", np.array([1], np.int64))],
    )


class ByHand:
    """One session that is fed with its own states."""

    def __init__(self, model: Path, states: dict[str, str], **first: np.ndarray) -> None:
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.names = [one.name for one in self.session.get_outputs()]
        self.pairs = states
        self.states = first

    def step(self, **inputs: np.ndarray) -> np.ndarray:
        """The first output for the next inputs."""
        found = dict(zip(self.names, self.session.run(None, {**inputs, **self.states}), strict=True))
        self.states = {one: found[other] for one, other in self.pairs.items()}
        return found[self.names[0]]


def zeros(rows: int = 1) -> dict[str, np.ndarray]:
    return {name: np.zeros((1, rows, STATE), np.float32) for name in ("h0", "c0")}


@dataclass(frozen=True)
class Planned:
    """A model and its plan."""

    model: Path
    plan: Path

    def by_hand(self, rows: int = 1, **first: np.ndarray) -> ByHand:
        return ByHand(self.model, {"h0": "hn", "c0": "cn"}, **{**zeros(rows), **first})

    def wanted(self, chunks: list[np.ndarray]) -> list[np.ndarray]:
        hand = self.by_hand(chunks[0].shape[1])
        return [hand.step(x=chunk) for chunk in chunks]


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Planned:
    """The LSTM in two stages; its batch axes are proven."""
    folder = tmp_path_factory.mktemp("lstm")
    model = build.save(lstm(), folder)
    partition(model, stages=2, out=folder / "model.plan", costs="measured", rounds=0)
    return Planned(model, folder / "model.plan")


@pytest.fixture(scope="module")
def server(planned) -> Iterator[Served]:
    """A server that joins batches and has a response cache: neither may change what a sequence gets."""
    options = ("--max-batch", "4", "--response-cache", "1M", "--max-sequences", "64")
    with Served(planned.plan, *STATES, *options, environment=ENVIRONMENT) as running:
        yield running


def chunks(seed: int, count: int = 12, rows: int = 1) -> list[np.ndarray]:
    """The inputs of a sequence; each has a length of its own."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1 + at % 5, rows, WIDTH)).astype(np.float32) for at in range(count)]


def tensors(kind: Any, arrays: dict[str, np.ndarray]) -> list[Any]:
    given = []
    for name, array in arrays.items():
        tensor = kind.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        given.append(tensor)
    return given


class Client:
    """A client of one kind, for one sequence at a time: ``http``, ``grpc``, or ``stream``, gRPC's stream."""

    def __init__(self, server: Served, kind: str, model: str = "model") -> None:
        self.kind, self.model = kind, model
        self.module = triton_http if kind == "http" else triton_grpc
        address = server.host if kind == "http" else server.grpc
        self.client = self.module.InferenceServerClient(address)
        self.answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        if kind == "stream":
            self.client.start_stream(lambda result, error: self.answers.put((result, error)))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        if self.kind == "stream":
            self.client.stop_stream()
        self.client.close()

    def send(self, arrays: dict[str, np.ndarray], name: int | str, **place: bool) -> None:
        """Send a request into the stream."""
        flags = {"sequence_start": False, "sequence_end": False, **place}
        self.client.async_stream_infer(self.model, tensors(triton_grpc, arrays), sequence_id=name, **flags)

    def receive(self) -> Any:
        """The next answer of the stream."""
        result, error = self.answers.get(timeout=60)
        if error is not None:
            raise error
        return result

    def ask(
        self, arrays: dict[str, np.ndarray], name: int | str, *, outputs: tuple[str, ...] = (), **place: Any
    ) -> Any:
        """Send a request, and wait for its answer."""
        if self.kind == "stream":
            self.send(arrays, name, **place)
            return self.receive()
        wanted = [self.module.InferRequestedOutput(output) for output in outputs] or None
        given = tensors(self.module, arrays)
        return self.client.infer(self.model, given, outputs=wanted, sequence_id=name, **place)

    def series(self, name: int | str, series: list[np.ndarray]) -> list[np.ndarray]:
        """The outputs y for all chunks of a sequence."""
        last = len(series) - 1
        return [
            self.ask({"x": chunk}, name, sequence_start=at == 0, sequence_end=at == last).as_numpy("y")
            for at, chunk in enumerate(series)
        ]


def same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def running(server: Served) -> float:
    return server.metric("onnxsplit_sequences")


def nodes(server: Served) -> list[psutil.Process]:
    """The nodes of a server, those that were started first first."""
    return children_of(server.process.pid, "runtime.node")


def body(x: np.ndarray, **parameters: Any) -> bytes:
    tensor = {"name": "x", "shape": x.shape, "datatype": "FP32", "data": x.ravel().tolist()}
    return json.dumps({"inputs": [tensor], "parameters": parameters}).encode()


KINDS = pytest.mark.parametrize("kind", ["http", "grpc", "stream"])

# Answers


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Iterator[tuple[Reader, Path]]:
    """A reader who serves silero-vad as the page says, and the model's file."""
    try:
        model = zoo.fetch("silero-vad")
    except zoo.FetchError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("speech")
    partition(model, stages=2, out=folder / "vad.plan", costs="measured", rounds=0)
    with ExitStack() as opened:
        reader = Reader(folder, ENVIRONMENT, opened)
        reader.follow("console", pages.block_of("docs/serving.md", "$ onnxsplit serve vad.plan"))
        yield reader, model


@KINDS
def test_a_trained_model_hears_a_series_of_chunks_as_one_session_does(speech, kind):
    reader, model = speech
    rng, time = np.random.default_rng(3), np.arange(60 * 512) / 16000
    voice = np.sin(2 * np.pi * (140 + 30 * np.sin(2 * np.pi * 3 * time)) * time) * (np.sin(2 * np.pi * 1.1 * time) > 0)
    sound = (0.4 * voice + 0.01 * rng.standard_normal(time.size)).astype(np.float32)
    hand = ByHand(model, {"state": "stateN"}, state=np.zeros((2, 1, 128), np.float32))
    context, rate = np.zeros(64, np.float32), np.array(16000, np.int64)
    found, wanted = [], []
    with Client(reader.server, kind, "vad") as client:
        for at, chunk in enumerate(sound.reshape(60, 512)):
            heard = {"input": np.concatenate([context, chunk])[None], "sr": rate}
            answer = client.ask(heard, 9, sequence_start=at == 0, sequence_end=at == 59)
            found.append(answer.as_numpy("output"))
            wanted.append(hand.step(**heard))
            context = chunk[-64:]
    same(found, wanted)
    assert np.ptp(wanted) > 0.01  # the model tells the chunks apart


def test_the_client_of_the_page_hears_its_chunks(speech):
    reader, model = speech
    reader.follow("python", pages.block_of("docs/serving.md", "import numpy as np\nimport tritonclient"))
    hand = ByHand(model, {"state": "stateN"}, state=np.zeros((2, 1, 128), np.float32))
    heard = np.random.default_rng(0).standard_normal((3, 1, 576), np.float32)
    wanted = [hand.step(input=chunk, sr=np.array(16000)) for chunk in heard]
    found = np.array(re.findall(r"\[\[(.+)\]\]", reader.said), np.float32)
    np.testing.assert_allclose(found, np.ravel(wanted), rtol=0, atol=1e-6)


def test_a_repository_has_states_as_the_page_names_them(planned, tmp_path):
    shutil.copytree(planned.plan, tmp_path / "models" / "lstm" / "1")
    series = chunks(1)
    with ExitStack() as opened:
        reader = Reader(tmp_path, ENVIRONMENT, opened)
        reader.follow("console", pages.block_of("docs/serving.md", "$ onnxsplit serve models/ --state"))
        client = opened.enter_context(Client(reader.server, "grpc", "lstm"))
        same(client.series(7, series), planned.wanted(series))


@KINDS
def test_a_sequence_of_many_rows_gets_what_one_session_gives(server, planned, kind):
    series = chunks(1, rows=3)
    with Client(server, kind) as client:
        same(client.series("a text as its name", series), planned.wanted(series))
    assert running(server) == 0
    assert server.metric("onnxsplit_sequence_state_bytes") == 0


def test_a_stream_keeps_the_order_of_requests_sent_without_waiting(server, planned):
    many = {name: chunks(name, 15) for name in (1, 2, 3)}
    long = np.random.default_rng(8).standard_normal((1 << 15, 1, WIDTH)).astype(np.float32)  # decoded in a thread
    many[2].insert(1, long)
    with Client(server, "stream") as client:
        sent = []
        for at in range(16):
            for name, series in many.items():
                if at < len(series):
                    client.send({"x": series[at]}, name, sequence_start=at == 0, sequence_end=at == len(series) - 1)
                    sent.append(name)
        answers = [client.receive().as_numpy("y") for _ in sent]
    for name, series in many.items():
        same([y for one, y in zip(sent, answers, strict=True) if one == name], planned.wanted(series))
    assert running(server) == 0


def test_killing_nodes_amid_interleaved_sequences_changes_no_answer(server, planned):
    restarts = server.metric("onnxsplit_node_restarts_total")
    series = {name: chunks(20 + name, 40) for name in range(6)}

    def follow(name: int) -> list[np.ndarray]:
        found = []
        with Client(server, ("http", "grpc", "stream")[name % 3]) as client:
            for at, chunk in enumerate(series[name]):
                if name == 0 and at in (10, 25):
                    nodes(server)[0].kill()  # a node of each stage, one after the other
                place = {"sequence_start": at == 0, "sequence_end": at == 39}
                found.append(client.ask({"x": chunk}, 100 + name, **place).as_numpy("y"))
        return found

    with ThreadPoolExecutor(6) as pool:
        for name, found in enumerate(pool.map(follow, series)):
            same(found, planned.wanted(series[name]))
    assert server.metric("onnxsplit_node_restarts_total") >= restarts + 2


def test_the_same_bytes_sent_twice_advance_the_state_twice(server, planned):
    x = chunks(4, 1)[0]
    hand = planned.by_hand()
    assert server.ask("/v2/models/model/infer", body(x, sequence_id=5, sequence_start=True))[0] == 200
    hand.step(x=x)
    tensor = {"name": "x", "shape": x.shape, "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"sequence_id": 5}}).encode()
    length = {"Inference_Header_Content_Length": str(len(head))}
    for _ in range(4):
        status, _, answer = server.ask("/v2/models/model/infer", head + x.tobytes(), **length)
        assert status == 200, answer
        same([np.array(json.loads(answer)["outputs"][0]["data"], np.float32).reshape(1, 1, 3)], [hand.step(x=x)])
    assert server.ask("/v2/models/model/infer", body(x, sequence_id=5, sequence_end=True))[0] == 200
    assert server.metric("onnxsplit_response_cache_hits_total") == 0


# What a sequence is


def test_a_start_amid_a_sequence_starts_it_again(server, planned):
    x = chunks(6, 3)
    with Client(server, "grpc") as client:
        for start in (True, False, True, False):
            last = client.ask({"x": x[0]}, 7, sequence_start=start).as_numpy("y")
        assert running(server) == 1
        same([last], [planned.wanted([x[0], x[0]])[1]])
        client.ask({"x": x[0]}, 7, sequence_end=True)


def test_a_client_may_give_the_initial_state_and_ask_for_the_states(server, planned):
    x = chunks(7, 2)
    first = {"h0": np.full((1, 1, STATE), 0.3, np.float32)}
    hand = planned.by_hand(**first)
    with Client(server, "http") as client:
        answer = client.ask({"x": x[0], **first}, 8, outputs=("cn", "y"), sequence_start=True)
        same([answer.as_numpy("y")], [hand.step(x=x[0])])
        same([answer.as_numpy("cn")], [hand.states["c0"]])
        answer = client.ask({"x": x[1]}, 8, sequence_end=True)
        same([answer.as_numpy("y")], [hand.step(x=x[1])])
        assert [one["name"] for one in answer.get_response()["outputs"]] == ["y"]


def test_a_request_that_fails_leaves_the_sequence_as_it_was(server, planned):
    x = chunks(9, 3)
    wanted = planned.wanted(x)
    with Client(server, "grpc") as client:
        same([client.ask({"x": x[0]}, 11, sequence_start=True).as_numpy("y")], wanted[:1])
        for arrays, place, message in (
            ({"x": x[1][:, :, :2]}, {}, "expected 4"),
            ({"x": x[1], **zeros()}, {}, "'h0' is a state that the server keeps for this sequence; leave it out"),
            ({"x": x[1][:, :, :2]}, {"sequence_end": True}, "expected 4"),
            ({"x": x[1][:, :, :2]}, {"sequence_start": True}, "expected 4"),
            (
                {"x": np.repeat(x[1], 2, axis=1)},
                {},
                "has size 2, and the sequence has its state 'h0' with size 1",
            ),  # two rows for the states of one
        ):
            with pytest.raises(InferenceServerException, match=message):
                client.ask(arrays, 11, **place)
        same([client.ask({"x": chunk}, 11).as_numpy("y") for chunk in x[1:]], wanted[1:])
        client.ask({"x": x[0]}, 11, sequence_end=True)


@KINDS
def test_a_sequence_that_does_not_run_is_refused(server, kind):
    x = chunks(10, 1)[0]
    with Client(server, kind) as client:
        with pytest.raises(InferenceServerException, match=r"sequence 12 is not running.*specify the START flag"):
            client.ask({"x": x}, 12)
        client.ask({"x": x}, 12, sequence_start=True, sequence_end=True)
        with pytest.raises(InferenceServerException, match="sequence 12 is not running"):
            client.ask({"x": x}, 12)
    assert server.ask("/v2/models/model/infer", body(x, sequence_id=12))[0] == 400


@pytest.mark.parametrize("name", [-1, 2**64, 1.5, True, "x" * 129, [1]])
def test_a_sequence_has_a_number_or_a_short_text(server, name):
    status, _, said = server.ask("/v2/models/model/infer", body(chunks(1, 1)[0], sequence_id=name, sequence_start=True))
    assert status == 400
    assert "it must be a whole number from 1 to 18446744073709551615, or a text of at most 128" in said.decode()


def test_requests_without_a_sequence_have_their_states_with_them(server, planned):
    x = chunks(12, 1)[0]
    with Client(server, "grpc") as client:
        answer = client.ask({"x": x, **zeros()}, 0)
        same([answer.as_numpy("y")], planned.wanted([x]))
        assert answer.as_numpy("hn").shape == (1, 1, STATE)
        with pytest.raises(InferenceServerException, match="'h0' is missing"):
            client.ask({"x": x}, 0)
    status, _, said = server.ask("/v2/models/model/infer", body(x, sequence_start=True))
    assert (status, "need the sequence_id" in said.decode()) == (400, True)


def test_clients_are_told_of_sequences_and_not_of_states(server):
    with triton_http.InferenceServerClient(server.host) as client:
        described = client.get_model_metadata("model")
        assert [one["name"] for one in described["inputs"] + described["outputs"]] == ["x", "y"]
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        config = client.get_model_config("model").config
        assert [one.name for one in (*config.input, *config.output)] == ["x", "y"]
        assert config.WhichOneof("scheduling_choice") == "sequence_batching"
        batching = config.sequence_batching
        assert batching.max_sequence_idle_microseconds == 60_000_000
        assert batching.oldest.max_candidate_sequences == 64
        assert [(one.input_name, one.output_name) for one in batching.state] == [("h0", "hn"), ("c0", "cn")]


# Those that wait


def test_one_that_leaves_or_is_late_while_it_waits_changes_nothing(server, planned):
    x = chunks(13, 5)
    assert server.ask("/v2/models/model/infer", body(x[0], sequence_id=13, sequence_start=True))[0] == 200
    pending = server.metric(PENDING, 'model="model"')
    for node in nodes(server):
        node.suspend()
    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(server.ask, "/v2/models/model/infer", body(x[1], sequence_id=13))
            wait_until(lambda: server.metric(PENDING, 'model="model"') == pending + 1)
            host, port = server.host.split(":")
            with socket.create_connection((host, int(port))) as leaving:
                lost = body(x[2], sequence_id=13)
                head = f"POST /v2/models/model/infer HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(lost)}\r\n\r\n"
                leaving.sendall(head.encode() + lost)
                wait_until(lambda: server.metric(PENDING, 'model="model"') == pending + 2)
            wait_until(lambda: server.metric(PENDING, 'model="model"') == pending + 1, "the one that left is dropped")
            status, _, said = server.ask("/v2/models/model/infer", body(x[3], sequence_id=13, timeout=1000))
            assert (status, "while it waited for the one before it" in said.decode()) == (504, True)
            last = pool.submit(server.ask, "/v2/models/model/infer", body(x[4], sequence_id=13, sequence_end=True))
            wait_until(lambda: server.metric(PENDING, 'model="model"') == pending + 2)
            for node in nodes(server):
                node.resume()
            answers = [first.result(), last.result()]
    finally:
        for node in nodes(server):
            node.resume()
    found = [json.loads(answer[2])["outputs"][0]["data"] for answer in answers]
    wanted = planned.wanted([x[0], x[1], x[4]])[1:]
    same([np.array(data, np.float32).reshape(1, 1, 3) for data in found], wanted)


def test_requests_of_different_sequences_are_joined(server, planned):
    series = {name: [x[:2] for x in chunks(name, 10)[1::5]] for name in range(200, 240)}
    ran, answered = (server.metric(f"nv_inference_{what}", 'model="model"') for what in ("exec_count", "count"))
    for node in nodes(server):
        node.suspend()
    try:
        with Client(server, "stream") as client:
            for name, (first, _) in series.items():
                client.send({"x": first}, name, sequence_start=True)
            wait_until(lambda: server.metric(PENDING, 'model="model"') == 40)
            for node in nodes(server):
                node.resume()
            for name, (_, last) in series.items():
                client.send({"x": last}, name, sequence_end=True)
            answers = [client.receive().as_numpy("y") for _ in range(80)]
    finally:
        for node in nodes(server):
            node.resume()
    for position, own in enumerate(series.values()):
        same([answers[position], answers[40 + position]], planned.wanted(own))
    assert server.metric("nv_inference_count", 'model="model"') == answered + 80
    assert server.metric("nv_inference_exec_count", 'model="model"') < ran + 80


def test_accepted_requests_of_a_sequence_are_answered_before_the_server_stops(planned):
    x = chunks(17, 6)
    with Served(planned.plan, *STATES, environment=ENVIRONMENT) as server, Client(server, "stream") as client:
        for node in nodes(server):
            node.suspend()
        for at, chunk in enumerate(x):
            client.send({"x": chunk}, 1, sequence_start=at == 0)
        wait_until(lambda: server.metric(PENDING, 'model="model"') == len(x))
        server.process.terminate()
        wait_until(lambda: server.ask("/v2/health/ready")[0] == 503)
        for node in nodes(server):
            node.resume()
        same([client.receive().as_numpy("y") for _ in x], planned.wanted(x))


# Limits


def test_limits_of_number_and_idle_time_are_named(planned):
    x = chunks(14, 1)[0]
    options = ("--max-sequences", "2", "--sequence-idle", "3")
    with Served(planned.plan, *STATES, *options, environment=ENVIRONMENT) as server:
        for name in (1, 2):
            assert server.ask("/v2/models/model/infer", body(x, sequence_id=name, sequence_start=True))[0] == 200
        status, headers, said = server.ask("/v2/models/model/infer", body(x, sequence_id=3, sequence_start=True))
        assert (status, "--max-sequences allows 2" in said.decode(), "retry-after" in headers) == (503, True, True)
        assert server.ask("/v2/models/model/infer", body(x, sequence_id=2, sequence_start=True))[0] == 200
        wait_until(lambda: running(server) == 0, "idle sequences are dropped without a request")
        status, _, said = server.ask("/v2/models/model/infer", body(x, sequence_id=1))
        assert (status, "was idle for 3 s" in said.decode()) == (400, True)
        assert server.ask("/v2/models/model/infer", body(x, sequence_id=3, sequence_start=True))[0] == 200


def test_states_that_grow_stop_at_the_limit_of_bytes(tmp_path):
    model = build.save(memory(), tmp_path)
    partition(model, stages=2, out=tmp_path / "model.plan", costs="analytic")
    options = ("--state", "past=present", "--sequence-bytes", str(3 * 4 * WIDTH))
    with Served(tmp_path / "model.plan", *options, environment=ENVIRONMENT) as server:
        x = np.ones((1, 1, WIDTH), np.float32)

        def ask(**place: bool) -> tuple[int, Any]:
            status, _, said = server.ask("/v2/models/model/infer", body(x, sequence_id=1, **place))
            return status, json.loads(said)

        for at in range(3):
            status, said = ask(sequence_start=at == 0)
            assert status == 200, said
            assert said["outputs"][0]["data"] == [at + 1.0] * WIDTH
        for _ in range(2):
            status, said = ask()
            assert (status, "--sequence-bytes allows 48" in said["error"]) == (503, True)
        assert server.metric("onnxsplit_sequence_state_bytes") == 48
        status, said = ask(sequence_end=True)  # its states are not kept, so it has room
        assert said["outputs"][0]["data"] == [4.0] * WIDTH
        many = np.zeros((1 << 10, 1, WIDTH), np.float32)
        assert server.ask("/v2/models/model/infer", body(many, sequence_id=2, sequence_start=True))[0] == 503
        assert server.metric("onnxsplit_sequence_state_bytes") == 0


def test_a_model_that_is_loaded_again_has_no_sequences(planned):
    x = chunks(15, 1)[0]
    with Served(planned.plan, *STATES, environment=ENVIRONMENT) as server:
        assert server.ask("/v2/models/model/infer", body(x, sequence_id=1, sequence_start=True))[0] == 200
        with triton_http.InferenceServerClient(server.host) as client:
            client.unload_model("model")
            assert server.ask("/v2/models/model/infer", body(x, sequence_id=1))[0] == 503
            client.load_model("model")
        status, _, said = server.ask("/v2/models/model/infer", body(x, sequence_id=1))
        assert (status, "or its model was reloaded" in said.decode()) == (400, True)
        assert running(server) == 0


# Which tensors are states


def test_a_model_without_states_says_which_option_names_them(tmp_path):
    model = build.save(memory(), tmp_path)
    partition(model, stages=1, out=tmp_path / "model.plan", costs="analytic")
    with Served(tmp_path / "model.plan", environment=ENVIRONMENT) as server:
        x = np.ones((1, 1, WIDTH), np.float32)
        status, _, said = server.ask("/v2/models/model/infer", body(x, sequence_id=1, sequence_start=True))
        assert status == 400
        assert "start it with --state INPUT=OUTPUT" in said.decode()
        assert server.json("/v2/models/model")["platform"] == "ensemble"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("x=hn", "--state does not fit model 'model': input 'x' and output 'hn' do not fit each other"),
        ("h0", "--state h0 is not INPUT=OUTPUT"),
    ],
)
def test_a_state_that_does_not_fit_stops_the_server_with_the_reason(planned, word, message):
    command = [sys.executable, "-m", "onnxsplit", "serve", planned.plan, "--http-port", "0", "--grpc-port", "off"]
    done = subprocess.run(
        [*command, "--state", word], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("name", "kind"), [("plain", "append"), ("gqa", "in-place"), ("tensor scatter", "in-place")])
def test_the_caches_of_a_decoder_are_kept_without_an_option(name, kind, tmp_path):
    reference = Reference(FAMILIES[name])
    proto = FAMILIES[name].make(seed=0)
    room = ROOM if name == "tensor scatter" else None
    cut(proto, describe(name, proto, kind=kind, rows="one", chunk="one-row", capacity=room), tmp_path / "m.plan")
    inputs = {one.name for one in proto.graph.input}
    with Served(tmp_path / "m.plan", environment=ENVIRONMENT) as server, Client(server, "grpc", "m") as client:
        assert server.json("/v2/models/m")["platform"] == "ensemble"
        length = 0
        for at, tokens in enumerate(([5, 71, 13], [88], [2], [40])):
            total = length + len(tokens)
            given = {
                "input_ids": np.array([tokens], np.int64),
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.arange(length, total)[None],
                "write_indices": np.array([length]),
                "valid_lengths": np.array([total]),
            }
            place = {"sequence_start": at == 0, "sequence_end": at == 3}
            answer = client.ask({one: given[one] for one in given if one in inputs}, 1, **place)
            np.testing.assert_allclose(answer.as_numpy("logits"), reference.step([tokens]), rtol=0, atol=1e-4)
            assert len(answer.get_response().outputs) == 1
            length = total
