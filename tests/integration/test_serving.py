"""Serving under load, with faults, under attack, and at its end."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import build
import numpy as np
import psutil
import pytest
from onnx import TensorProto, helper
from processes import children_of

pytest.importorskip("uvicorn", reason="needs the extra serve")

import ports
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from served import PENDING, Served
from tritonclient.utils import InferenceServerException
from waiting import wait_until

from onnxsplit.planning.planner import partition

INFER = b"POST /v2/models/model/infer HTTP/1.1\r\nHost: localhost\r\n"


def asked(rows=1, value=0.5, **parameters) -> bytes:
    tensor = {"name": "x", "shape": [rows, 32], "datatype": "FP32", "data": [value] * (32 * rows)}
    return json.dumps({"inputs": [tensor], "parameters": parameters}).encode()


@pytest.fixture(scope="module")
def batched_plan(tmp_path_factory):
    """A chain whose batch axis is proven."""
    folder = tmp_path_factory.mktemp("batched")
    partition(build.save(build.chain(), folder), stages=2, out=folder / "chain.plan", costs="measured", rounds=0)
    return folder / "chain.plan"


@pytest.fixture(scope="module")
def slow_plan(tmp_path_factory):
    """A plan whose request of 64 rows takes some milliseconds."""
    folder = tmp_path_factory.mktemp("slow")
    partition(build.save(build.chain(6, 512), folder), stages=2, out=folder / "slow.plan", costs="analytic")
    return folder / "slow.plan"


def slow_request(**parameters: object) -> tuple[bytes, dict[str, str]]:
    array = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    inputs = [{"name": "x", "shape": [64, 512], "datatype": "FP32", "parameters": {"binary_data_size": array.nbytes}}]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True, **parameters}}).encode()
    return head + array.tobytes(), {"Inference_Header_Content_Length": str(len(head))}


def nodes(server: Served) -> list[psutil.Process]:
    return children_of(server.process.pid, "runtime.node")


def stop(server: Served) -> None:
    """Stop the nodes, so that no request is answered."""
    for node in nodes(server):
        node.suspend()


def go_on(server: Served) -> None:
    for node in nodes(server):
        node.resume()


def refuses(server: Served) -> bool:
    try:
        return server.ask("/v2/health/ready")[0] == 503
    except OSError:
        return True  # it no longer listens


# Faults


def test_kill_9_of_nodes_under_load_fails_no_request(chain_plan, python_environment):
    x = np.ones((1, 32), np.float32)
    ending = threading.Event()
    problems: list[str] = []
    counts: Counter[str] = Counter()

    def over_http():
        while not ending.is_set():
            status, _, body = server.ask("/v2/models/model/infer", asked())
            counts["http"] += 1
            if status != 200:
                problems.append(body.decode())

    def over_grpc():
        given = triton_grpc.InferInput("x", [1, 32], "FP32")
        given.set_data_from_numpy(x)
        with triton_grpc.InferenceServerClient(server.grpc) as client:
            while not ending.is_set():
                try:
                    client.infer("model", [given])
                except InferenceServerException as error:
                    problems.append(str(error))
                counts["grpc"] += 1

    def restarts_and_ready() -> tuple[float, float]:
        return server.metric("onnxsplit_node_restarts_total"), server.metric("onnxsplit_node_up")

    with Served(chain_plan, "--replicas", "2", environment=python_environment) as server:
        threads = [threading.Thread(target=target) for target in (over_http, over_http, over_grpc, over_grpc)]
        for thread in threads:
            thread.start()
        try:
            for killed in range(7):
                wait_until(lambda so_many=killed: restarts_and_ready() == (so_many, 4))
                before = Counter(counts)
                wait_until(lambda since=before: min((counts - since)[name] for name in ("http", "grpc")) > 10)
                if killed < 6:
                    victims = nodes(server)
                    os.kill(victims[len(victims) // 2].pid, signal.SIGKILL)
        finally:
            ending.set()
            for thread in threads:
                thread.join()
    assert problems == []


def test_overload_is_refused_with_reasons_and_what_is_accepted_is_in_time(slow_plan, python_environment):
    bodies = slow_request(), slow_request(timeout=500)  # microseconds, fewer than a request takes
    found: list[tuple[int, str]] = []
    ending = threading.Event()

    def ask(number):
        body, headers = bodies[number % 2]
        while not ending.is_set():
            status, _, answer = server.ask("/v2/models/slow/infer", body, **headers)
            found.append((status, "" if status == 200 else json.loads(answer)["error"]))

    def counts() -> Counter[int]:
        return Counter(status for status, _ in found)

    with Served(slow_plan, "--threads", "1", environment=python_environment) as server:
        with ThreadPoolExecutor(40) as pool:
            asking = [pool.submit(ask, number) for number in range(40)]
            try:
                wait_until(lambda: min(counts()[200], counts()[503]) > 20)
            finally:
                ending.set()
        assert [future.exception() for future in asking] == [None] * 40
        assert server.ask("/v2/models/slow/infer", bodies[0][0], **bodies[0][1])[0] == 200, "and then all is well again"
    assert set(counts()) <= {200, 503, 504}
    for status, words in found:
        assert status == 200 or re.search(
            "is expected in .* left|requests wait|time the request had|time ran out", words
        )


def test_slow_and_half_open_clients_do_not_affect_others(chain_plan, python_environment):
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
    with Served(chain_plan, environment=python_environment) as server:
        host, _, port = server.host.partition(":")
        before = psutil.Process(server.process.pid).memory_info().rss
        opened = [socket.create_connection((host, int(port))) for _ in range(200)]
        for number, connection in enumerate(opened):
            match number % 4:
                case 0:
                    connection.sendall(INFER + b"X-Slow: ")  # half a header
                case 1:
                    connection.sendall(INFER + b"Content-Length: 200000000\r\n\r\n{")  # a body that does not come
                case 2:
                    connection.sendall(INFER + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz")
        rpc_host, _, rpc_port = server.grpc.partition(":")
        silent = [socket.create_connection((rpc_host, int(rpc_port))) for _ in range(50)]
        for _ in range(200):
            assert server.ask("/v2/models/model/infer", asked())[0] == 200
        for number, connection in enumerate(opened):
            connection.settimeout(60)
            answer = b""
            try:
                while piece := connection.recv(4096):
                    answer += piece
            except ConnectionResetError:
                pass
            expected = {0: b"", 1: b"HTTP/1.1 408", 2: b"HTTP/1.1 400", 3: b""}[number % 4]
            assert answer.startswith(expected), (number, answer)
            connection.close()
        for connection in silent:
            connection.close()
        assert psutil.Process(server.process.pid).memory_info().rss - before < 60 << 20
        assert server.ask("/v2/models/model/infer", asked())[0] == 200


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        (b"GET /" + b"a" * 100_000, b"400", b"larger than the 65536 bytes"),
        (b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 20_000 + b"\r\n", b"400", b"larger than the 65536 bytes"),
        (b"GET / HTTP/1.1\r\nX-A: " + b"b" * 100_000, b"400", b"larger than the 65536 bytes"),
        (b"\x16\x03\x01 hello", b"400", b"not HTTP/1.1"),
        (INFER + b"Content-Length: 99999999999\r\n\r\n", b"413", b"max-body"),
        (INFER + b"Content-Length: -5\r\n\r\n", b"400", b"not HTTP/1.1"),
    ],
    ids=["endless line", "many headers", "endless header", "TLS", "huge body", "negative body"],
)  # fmt: skip
def test_what_is_not_a_request_is_answered_and_hung_up(served_chain, sent, status, words):
    host, _, port = served_chain.host.partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        with suppress(OSError):  # it may have closed the connection already
            connection.sendall(sent)
        answer = b""
        try:
            while piece := connection.recv(4096):
                answer += piece
        except ConnectionResetError:
            pass
    assert answer.split()[1] == status
    assert words in answer


@pytest.fixture(scope="module")
def served_chain(chain_plan):
    from pathlib import Path

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with Served(chain_plan, environment=environment) as server:
        yield server


def test_a_client_that_goes_away_gives_its_request_up(slow_plan, python_environment):
    body, headers = slow_request()
    length = headers["Inference_Header_Content_Length"]
    head = (
        f"POST /v2/models/slow/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        f"Inference-Header-Content-Length: {length}\r\n\r\n"
    ).encode()
    with Served(slow_plan, "--timing", "silence_s=300", environment=python_environment) as server:
        host, _, port = server.host.partition(":")
        stop(server)
        opened = [socket.create_connection((host, int(port))) for _ in range(60)]
        for connection in opened:
            connection.sendall(head + body)
        wait_until(lambda: server.metric(PENDING) == 60)
        for connection in opened:
            connection.close()
        wait_until(lambda: server.metric(PENDING) == 0)
        assert server.metric("onnxsplit_request_failures_total", 'reason="canceled"') == 60
        go_on(server)
        assert server.ask("/v2/models/slow/infer", body, **headers)[0] == 200


# Batching


def test_joined_requests_get_their_own_rows(batched_plan, python_environment):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    whole = onnxruntime.InferenceSession(build.chain().SerializeToString(), options, ["CPUExecutionProvider"])
    source = np.random.default_rng(3)
    inputs = [source.standard_normal((rows, 32)).astype(np.float32) for rows in source.integers(1, 4, 200)]

    with Served(batched_plan, "--max-batch", "8", "--max-delay", "100", environment=python_environment) as server:

        def ask(x):
            with triton_http.InferenceServerClient(server.host) as client:
                given = triton_http.InferInput("x", list(x.shape), "FP32")
                given.set_data_from_numpy(x)
                return client.infer("chain", [given]).as_numpy("y")

        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(ask, inputs))
        statistics = server.json("/v2/models/chain/stats")["model_stats"][0]
    for x, y in zip(inputs, found, strict=True):
        np.testing.assert_allclose(y, whole.run(None, {"x": x})[0], rtol=1e-4, atol=1e-5)
    assert statistics["inference_count"] == sum(len(x) for x in inputs)
    assert statistics["execution_count"] < 150, "200 requests were joined"
    assert max(entry["batch_size"] for entry in statistics["batch_stats"]) > 3


def test_a_request_that_fails_in_a_batch_fails_alone(tmp_path, python_environment):
    table = build.constant("table", np.arange(64, dtype=np.float32).reshape(16, 4))
    ops = [helper.make_node("Gather", ["table", "i"], ["row"]), helper.make_node("Relu", ["row"], ["y"])]
    proto = build.model(
        ops, [build.value("i", ["batch"], TensorProto.INT64)], [build.value("y", ["batch", 4])], [table]
    )
    partition(build.save(proto, tmp_path), stages=2, out=tmp_path / "rows.plan", costs="measured", rounds=0)
    plan = json.loads((tmp_path / "rows.plan" / "plan.json").read_text())
    assert plan["tensors"]["i"]["batch_axis"] == 0

    with Served(
        tmp_path / "rows.plan", "--max-batch", "16", "--max-delay", "100", environment=python_environment
    ) as server:

        def ask(row):
            tensor = {"name": "i", "shape": [1], "datatype": "INT64", "data": [row]}
            status, _, body = server.ask("/v2/models/rows/infer", json.dumps({"inputs": [tensor]}).encode())
            return status, json.loads(body)

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(ask, [0, 1, 99, 3, 4, 5, 6, 7]))
    assert [status for status, _ in found] == [200, 200, 500, 200, 200, 200, 200, 200]
    assert "stage" in found[2][1]["error"]
    assert found[7][1]["outputs"][0]["data"] == [28, 29, 30, 31]


def test_a_full_queue_refuses_an_ordinary_request_for_a_more_important_one(chain_plan, python_environment):
    words = ("--priority-levels", "3", "--max-queue", "1", "--inflight", "1", "--timing", "silence_s=300")
    with Served(chain_plan, *words, environment=python_environment) as server, ThreadPoolExecutor(3) as pool:
        stop(server)
        first = pool.submit(server.ask, "/v2/models/model/infer", asked())
        wait_until(lambda: server.metric(PENDING) == 1)
        ordinary = pool.submit(server.ask, "/v2/models/model/infer", asked())
        wait_until(lambda: server.metric(PENDING) == 2)
        assert server.ask("/v2/models/model/infer", asked(priority=3))[0] == 503
        with triton_grpc.InferenceServerClient(server.grpc) as client:
            tensor = triton_grpc.InferInput("x", [1, 32], "FP32")
            tensor.set_data_from_numpy(np.ones((1, 32), np.float32))
            important = pool.submit(client.infer, "model", [tensor], priority=1)
            status, _, body = ordinary.result(60)
            assert (status, "a more important request has arrived" in body.decode()) == (503, True)
            go_on(server)
            assert first.result(60)[0] == 200
            assert important.result(60).as_numpy("y").shape == (1, 32)
        assert server.ask("/v2/models/model/infer", asked(priority=-1))[0] == 400
        assert server.ask("/v2/models/model/infer", asked(priority="high"))[0] == 400


def test_the_response_cache_answers_the_same_inputs_without_a_run(chain_plan, python_environment):
    with Served(chain_plan, "--response-cache", "1M", environment=python_environment) as server:
        answers = [server.json("/v2/models/model/infer", json.loads(asked(value=value))) for value in (1.0, 2.0, 1.0)]
        assert answers[0] == answers[2] != answers[1]
        with triton_grpc.InferenceServerClient(server.grpc) as client:
            tensor = triton_grpc.InferInput("x", [1, 32], "FP32")
            tensor.set_data_from_numpy(np.ones((1, 32), np.float32))
            output = triton_grpc.InferRequestedOutput("y", class_count=2)
            found = client.infer("model", [tensor], outputs=[output]).as_numpy("y")
            values = np.float32(answers[0]["outputs"][0]["data"])
            assert [int(text.split(b":")[1]) for text in found.ravel()] == list(np.argsort(-values)[:2])
            (stats,) = client.get_inference_statistics("model").model_stats
        assert (stats.inference_stats.cache_hit.count, stats.inference_stats.cache_miss.count) == (2, 2)
        assert (stats.inference_stats.success.count, stats.inference_count) == (4, 2)
        stopped = server.json("/v2/models/model/infer", json.loads(asked(value=2.0)))
        assert stopped == answers[1]
        assert server.metric("onnxsplit_response_cache_hits_total") == 3
        assert server.metric("onnxsplit_node_requests_total", 'stage="0"') == 2
        server.ask("/v2/repository/models/model/unload", b"{}")
        assert server.ask("/v2/models/model/infer", asked(value=2.0))[0] == 503, "a model that is gone answers nothing"


# Access


def test_probes_need_no_token_and_learn_only_whether_the_server_is_ready(chain_plan, python_environment, token_file):
    with Served(chain_plan, "--token-file", token_file, environment=python_environment) as server:
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert (server.ask(path)[0], server.ask(path)[2]) == (200, b"")
            assert server.ask(path, Authorization="Bearer wrong")[0] == 200
            assert server.ask(path, method="POST")[0] == 401
            assert server.ask(path, Host="elsewhere.example")[0] == 403
        with triton_grpc.InferenceServerClient(server.grpc) as client:
            assert client.is_server_live()
            assert client.is_server_ready()
        good = {"Authorization": "Bearer sesame-open-yourself-now"}
        assert server.ask("/v2/repository/models/model/unload", b"{}", **good)[0] == 200
        status, _, body = server.ask("/v2/health/ready")
        assert (status, body) == (503, b""), "only authorised clients learn why"
        assert server.ask("/v2/health/ready", **good)[2] != b""


@pytest.fixture
def token_file(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("# for the tests\nsesame-open-yourself-now\n")
    file.chmod(0o600)
    return file


def test_tokens_guard_everything(chain_plan, python_environment, token_file):
    with Served(chain_plan, "--token-file", token_file, environment=python_environment) as server:
        for path in ("/", "/metrics", "/v2", "/events", "/slowest", "/openapi.json", "/v2/models/model/ready"):
            status, headers, body = server.ask(path)
            assert (status, "Authorization: Bearer" in json.loads(body)["error"]) == (401, True), path
            assert headers["www-authenticate"].startswith("Basic")
        good = "Bearer sesame-open-yourself-now"
        assert server.ask("/metrics", Authorization=good)[0] == 200
        assert server.ask("/metrics", Authorization="Bearer sesame-open-yourself-nox")[0] == 401
        assert server.ask("/", Authorization="Basic YW55OnNlc2FtZS1vcGVuLXlvdXJzZWxmLW5vdw==")[0] == 200
        assert server.ask("/", Authorization="Basic !!!")[0] == 401
        with triton_grpc.InferenceServerClient(server.grpc) as client:
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                client.get_server_metadata()
            assert client.is_server_ready(headers={"authorization": good})
            heard: list[object] = []
            done = threading.Event()
            client.start_stream(lambda result, error: (heard.append(error), done.set()))
            given = triton_grpc.InferInput("x", [1, 32], "FP32")
            given.set_data_from_numpy(np.ones((1, 32), np.float32))
            with suppress(InferenceServerException):  # when the refusal was faster
                client.async_stream_infer("model", [given])
            assert done.wait(60)
            assert "UNAUTHENTICATED" in str(heard[0])
    assert "sesame" not in "".join(server.log)


@pytest.mark.parametrize(("text", "mode", "words"), [
    ("sesame-open-yourself-now", 0o644, "can be read by others"),
    ("short", 0o600, "at least 16 characters"),
    ("# nothing", 0o600, "at least 16 characters"),
])  # fmt: skip
def test_weak_token_files_are_refused(chain_plan, python_environment, tmp_path, text, mode, words):
    file = tmp_path / "tokens"
    file.write_text(text)
    file.chmod(mode)
    status, errors = start(python_environment, chain_plan, "--token-file", file)
    assert (status, words in errors) == (1, True), errors


def test_tls(chain_plan, python_environment, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here to make a certificate; install it with: apt-get install openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    with Served(chain_plan, "--tls-cert", certificate, "--tls-key", key, environment=python_environment) as server:
        assert server.http.startswith("https://")
        context = ssl.create_default_context(cafile=certificate)
        with urllib.request.urlopen(f"{server.http}/v2/health/ready", context=context, timeout=60) as answer:
            assert answer.status == 200
        with triton_grpc.InferenceServerClient(server.grpc, ssl=True, root_certificates=str(certificate)) as client:
            assert client.is_server_ready()
        with triton_grpc.InferenceServerClient(server.grpc) as client, pytest.raises(InferenceServerException):
            client.is_server_ready(client_timeout=2)
    assert start(python_environment, chain_plan, "--tls-cert", certificate)[1].count("belong together") == 1


# Settings


def start(environment, *words, folder=None) -> tuple[int, str]:
    """Return the exit status and the output of a start that fails."""
    command = [sys.executable, "-P", "-m", "onnxsplit", "serve", "--http-port", "0", "--grpc-port", "0"]
    done = subprocess.run(
        [*command, *map(str, words)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stderr


def test_the_command_line_goes_before_the_environment_before_the_file(chain_plan, python_environment, tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "onnxsplit.toml").write_text(
        "[serve]\nmax-queue = 7\nmax-body = '1M'\ninflight = 3\nreplicas = ['0=2']\n"
    )
    environment = {**python_environment, "ONNXSPLIT_SERVE_INFLIGHT": "5", "ONNXSPLIT_SERVE_MAX_BODY": "2M"}
    with Served(chain_plan, "--max-body", "3M", environment=environment, folder=inner) as server:
        assert len(nodes(server)) == 3
        status, _, body = server.ask("/v2/models/model/infer", bytes(4 << 20))
        assert (status, f"at most {3 << 20}" in body.decode()) == (413, True)
    said = next(line for line in server.log if "differ from the defaults" in line)
    assert "max-body = 3145728 (command line)" in said
    assert "inflight = 5 (environment)" in said
    assert "max-queue = 7 (onnxsplit.toml)" in said


@pytest.mark.parametrize(("text", "words"), [
    ("[serve]\nmax-quue = 7\n", "has no option 'max-quue'"),
    ("[srve]\n", "there is no command 'srve'"),
    ("max-queue = 7\n", "is outside of a table"),
    ("[serve\n", "is not valid TOML"),
    ("[serve]\nmax-queue = 'many'\n", "'many' is not a valid integer"),
    ("[serve]\ninsecure = 'no'\n", "allowed: true, false"),
])  # fmt: skip
def test_a_wrong_settings_file_is_refused_by_name(chain_plan, python_environment, tmp_path, text, words):
    (tmp_path / "onnxsplit.toml").write_text(text)
    status, errors = start(python_environment, chain_plan, folder=tmp_path)
    assert (status, words in errors) == (2, True), errors


def test_a_port_in_use_is_said_before_anything_is_started(chain_plan, python_environment, free_port):
    with socket.create_server(("127.0.0.1", free_port)):
        for option in ("--http-port", "--grpc-port"):
            status, errors = start(python_environment, chain_plan, option, str(free_port))
            assert status == 1
            assert re.search(rf"cannot .* 127\.0\.0\.1:{free_port}.*{option}", errors), errors
            assert "node starts" not in errors


def test_two_plans_of_one_name_are_refused(chain_plan, python_environment, tmp_path):
    shutil.copytree(chain_plan, tmp_path / chain_plan.name)
    status, errors = start(python_environment, chain_plan, tmp_path / chain_plan.name)
    assert (status, "two plans would be served as model 'model'" in errors) == (1, True)


def test_nodes_started_by_hand_can_be_waited_for(chain_plan, python_environment, tmp_path):
    address = f"ipc://{tmp_path}/c"
    by_hand = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address, "--plan", str(chain_plan)],
            env=python_environment, stderr=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]  # fmt: skip
    with Served(chain_plan, "--launcher", "none", "--bind", address, environment=python_environment) as server:
        assert server.ask("/v2/models/model/infer", asked())[0] == 200
    assert [process.wait(timeout=60) for process in by_hand] == [0, 0]


# The end


def test_a_plan_for_several_hosts_is_not_silently_served_by_one(chain_plan, python_environment, tmp_path):
    from onnxsplit.planning.place import place

    (tmp_path / "cluster.toml").write_text(
        "".join(f'[[device]]\nname = "{name}"\nhost = "{name}"\n' for name in ("edge-1", "edge-2"))
    )
    place(chain_plan, tmp_path / "cluster.toml", out=tmp_path / "placed.plan")
    status, errors = start(python_environment, tmp_path / "placed.plan")
    assert status == 1
    assert re.search(r"placed on several hosts \(edge-.: stage .; edge-.: stage .\)", errors), errors
    assert "node starts" not in errors
    with Served(tmp_path / "placed.plan", "--launcher", "local", environment=python_environment) as server:
        assert len(nodes(server)) == 2
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "onnxsplit", "serve", str(tmp_path / "placed.plan"), "--launcher", "none",
         "--bind", f"ipc://{tmp_path}/here", "--http-port", "0", "--grpc-port", "off"],
        env=python_environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = {host: next(line for line in process.stderr if f"on {host}" in line) for host in ("edge-1", "edge-2")}
    assert all(f"onnxsplit node --connect ipc://{tmp_path}/here --host {host}" in said[host] for host in said)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_no_other_ports_are_opened_than_those_that_were_named(chain_plan, python_environment):
    named = [ports.free_port() for _ in range(7)]
    control, results, files, first, second, http, grpc = named
    address = f"tcp://127.0.0.1:{control}"
    words = ("--launcher", "none", "--bind", address, "--ports", f"{results},{files}")
    started = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address, "--bind", f"tcp://127.0.0.1:{port}"],
            env=python_environment, stderr=subprocess.DEVNULL,
        )
        for port in (first, second)
    ]  # fmt: skip
    chosen = ("--http-port", http, "--grpc-port", grpc)
    with Served(chain_plan, *words, *chosen, environment=python_environment) as server:
        assert server.ask("/v2/models/model/infer", asked())[0] == 200
        opened = {pid: listening(pid) for pid in (server.process.pid, *(node.pid for node in started))}
    assert opened[server.process.pid] == {control, results, files, http, grpc}
    assert {tuple(opened[node.pid]) for node in started} == {(first,), (second,)}
    assert [node.wait(60) for node in started] == [0, 0]
    for given, words in (("5556", "is not two different ports"), ("5556,5556", "is not two"), ("5556,0", "is not two")):
        status, errors = start(
            python_environment, chain_plan, "--launcher", "none", "--bind", address, "--ports", given
        )
        assert (status, words in errors) == (2, True), errors


def listening(pid: int) -> set[int]:
    connections = psutil.Process(pid).net_connections("tcp")
    return {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}


def test_sigterm_answers_what_was_accepted_and_refuses_the_rest(slow_plan, python_environment):
    body, headers = slow_request()
    with ThreadPoolExecutor(30) as pool:
        server = Served(slow_plan, "--timing", "silence_s=300", environment=python_environment)
        stop(server)
        waiting = [pool.submit(server.ask, "/v2/models/slow/infer", body, **headers) for _ in range(30)]
        wait_until(lambda: server.metric(PENDING) == 30)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(server))
        go_on(server)
        assert server.wait() == 0
        statuses = Counter(future.result()[0] for future in waiting)
    assert statuses == {200: 30}


def test_ctrl_c_while_nodes_start_leaves_nothing(chain_plan, python_environment):
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "onnxsplit", "serve", str(chain_plan), "--http-port", "0", "--grpc-port", "0"],
        env=python_environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "node starts" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0
