"""Services in Python: worker processes around models, as users write them and as they die."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pages
import pytest
from processes import children_of, running
from reader import Reader
from served import Served
from waiting import wait_until

APP = '''
"""Services of the tests."""
import asyncio
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from starlette.responses import Response

from onnxsplit import Busy, InputError, Models, endpoint, service

HERE = Path(__file__).parent


@service(models={"chain": "model.plan"}, workers=2, calls=4)
class TryIt:
    def __init__(self, models: Models) -> None:
        self.chain = models["chain"]
        (HERE / "made").open("a").write("x")

    @endpoint
    def total(self, values: list[float]) -> dict[str, float]:
        """Sum what the model makes of some values."""
        outputs = self.chain.run(np.array(values, np.float32)[None])
        return {"sum": float(outputs["y"].sum())}

    @endpoint
    async def twice(self, values: list[float]) -> dict[str, float]:
        array = np.array(values, np.float32)[None]
        answers = await asyncio.gather(self.chain.arun(array), self.chain.arun(array))
        return {"sum": float(sum(outputs["y"].sum() for outputs in answers))}

    @endpoint
    def held(self, values: list[float]) -> dict[str, float]:
        (HERE / "holding").open("a").write("x")
        while not (HERE / "go").exists():
            time.sleep(0.01)
        return self.total(values)

    @endpoint
    def blocked(self) -> dict[str, float]:
        return asyncio.run(self.wrong())

    @endpoint
    async def wrong(self) -> None:
        self.chain.run(np.ones((1, 32), np.float32))

    @endpoint
    def poison(self) -> None:
        (HERE / "poisoned").open("a").write("x")
        os._exit(3)

    @endpoint
    async def forever(self) -> None:
        (HERE / "waits").touch()
        try:
            await asyncio.sleep(600)
        finally:
            (HERE / "cancelled").touch()

    @endpoint
    def words(self, count: int) -> Iterator[str]:
        for number in range(count):
            (HERE / "spoken").write_text(str(number))
            yield f"word {number} " + "x" * 100_000

    @endpoint
    async def quick(self) -> str:
        return "quick"

    @endpoint
    def loud(self, size: int) -> None:
        raise InputError("x" * size + chr(0xDC80))

    @endpoint
    def leave(self) -> None:
        sys.exit(3)

    @endpoint
    def other_loop(self, values: list[float]) -> dict[str, float]:
        outputs = asyncio.run(self.chain.arun(np.array(values, np.float32)[None]))
        return {"sum": float(outputs["y"].sum())}

    @endpoint
    def child(self) -> int:
        return subprocess.Popen(["sleep", "600"], close_fds=False).pid

    @endpoint
    def fork(self) -> int:
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        process.start()
        return process.pid

    @endpoint
    def large(self, size: int) -> bytes:
        return bytes(size)

    @endpoint
    def head(self, status: int, value: str) -> Response:
        return Response("body", status, {"x-value": value})

    @endpoint
    def refused_stream(self) -> Iterator[str]:
        raise InputError("not so")
        yield ""

    @endpoint
    def busy(self) -> None:
        raise Busy("come back later")

    @endpoint
    def faulty(self) -> None:
        raise ValueError("a secret")


@service(models={"chain": "model.plan"}, path="/steps/sum")
class Steps:
    def preprocess(self, values: list[float]) -> np.ndarray:
        return np.array(values, np.float32)[None]

    def postprocess(self, outputs: dict[str, np.ndarray]) -> float:
        return float(outputs["y"].sum())


@service(timeout=2)
class Limited:
    def close(self) -> None:
        (HERE / "closed").touch()

    @endpoint
    def hold(self) -> Iterator[str]:
        yield "begun"
        while not (HERE / "go").exists():
            time.sleep(0.01)
        yield "done"

    @endpoint
    def stuck(self) -> None:
        time.sleep(600)

    @endpoint
    def ready(self) -> int:
        return os.getpid()


@service()
class Alone:
    @endpoint
    def greet(self, name: str = "you") -> str:
        return f"hello {name}"
'''
VALUES = [0.5] * 32


@pytest.fixture
def folder(tmp_path, chain_plan):
    shutil.copytree(chain_plan, tmp_path / "model.plan")
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


@pytest.fixture
def serve(folder, python_environment):
    """Starts a server with services and options."""
    with ExitStack() as opened:
        yield lambda *words: opened.enter_context(
            Served(*words, "--threads", "1", environment=python_environment, folder=folder)
        )


def post(server: Served, path: str, **fields: object) -> tuple[int, object]:
    status, headers, body = server.ask(path, json.dumps(fields).encode(), content_type="application/json")
    return status, json.loads(body) if headers["content-type"] == "application/json" else body.decode()


def workers(server: Served) -> list[int]:
    return [child.pid for child in children_of(server.process.pid, "runtime.services.worker")]


def metric(server: Served, name: str) -> float:
    lines = server.ask("/metrics")[2].decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


# Endpoints


def test_the_page_is_right(tmp_path, python_environment):
    pytest.importorskip("PIL", reason="needs the extra demo")
    (tmp_path / "models").symlink_to(pages.ROOT / "models")
    with ExitStack() as opened:
        reader = Reader(tmp_path, python_environment, opened)
        for kind, block in pages.blocks_of("docs/services.md"):
            reader.follow(kind, block)


def test_endpoints_ask_models(serve):
    server = serve("app.py:TryIt", "app.py:Steps", "app.py:Alone")
    status, total = post(server, "/try-it/total", values=VALUES)
    assert status == 200
    assert post(server, "/try-it/twice", values=VALUES) == (200, {"sum": pytest.approx(2 * total["sum"])})
    assert post(server, "/steps/sum", values=VALUES) == (200, pytest.approx(total["sum"]))
    assert post(server, "/alone/greet") == (200, "hello you")
    body = json.dumps({"inputs": [{"name": "x", "shape": [1, 32], "datatype": "FP32", "data": VALUES}]}).encode()
    direct = json.loads(server.ask("/v2/models/model/infer", body)[2])
    assert sum(direct["outputs"][0]["data"]) == pytest.approx(total["sum"])
    assert metric(server, 'nv_inference_request_success{model="model"') == 5
    assert metric(server, "onnxsplit_service_calls_total") == 4


def test_errors_have_the_status_of_their_kind(serve):
    server = serve("app.py:TryIt")
    assert post(server, "/try-it/total", value=[1])[0] == 400
    status, answer = post(server, "/try-it/total", values=[1.0])
    assert (status, "'x' has size 1 on axis 1" in answer["error"]) == (400, True)
    assert post(server, "/try-it/busy") == (503, {"error": "come back later"})
    status, answer = post(server, "/try-it/faulty")
    assert (status, answer) == (500, {"error": "TryIt.faulty failed with ValueError; the server's log says more"})
    assert wait_until(lambda: any("ValueError: a secret" in line for line in server.log))
    status, answer = post(server, "/try-it/wrong")
    assert (status, "await models['chain'].arun(...)" in answer["error"]) == (500, True)
    assert server.ask("/try-it/total")[0] == 405
    assert server.ask("/try-it/nothing", b"{}")[0] == 404


def test_endpoints_are_described(serve):
    server = serve("app.py:TryIt", "app.py:Steps")
    document = json.loads(server.ask("/openapi.json")[2])
    operation = document["paths"]["/try-it/total"]["post"]
    assert operation["summary"] == "Sum what the model makes of some values."
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rpartition("/")[2]]
    assert schema["properties"]["values"] == {"type": "array", "items": {"type": "number"}}
    assert "/steps/sum" in document["paths"]
    assert "text/event-stream" in document["paths"]["/try-it/words"]["post"]["responses"]["200"]["content"]


def test_tokens_guard_services(serve, folder):
    (folder / "tokens").write_text("a-token-of-the-tests\n")
    (folder / "tokens").chmod(0o600)
    server = serve("app.py:Alone", "--token-file", "tokens")
    assert server.ask("/alone/greet", b"")[0] == 401
    assert server.ask("/alone/greet", b"", authorization="Bearer a-token-of-the-tests")[0] == 200


def test_what_an_endpoint_does_wrong_costs_no_place(serve):
    server = serve("app.py:TryIt")
    for _ in range(9):  # more than the places of both workers
        status, answer = post(server, "/try-it/loud", size=3 << 20)
        assert (status, len(answer["error"]) < 3000) == (400, True)
        status, answer = post(server, "/try-it/leave")
        assert (status, "SystemExit" in answer["error"]) == (500, True)
        assert post(server, "/try-it/refused_stream") == (400, {"error": "not so"})
        assert post(server, "/try-it/head", status=700, value="x")[0] == 500
        assert post(server, "/try-it/head", status=200, value="x\r\ny: z")[0] == 500
    status, headers, _ = server.ask("/try-it/head?status=201&value=x", b"")
    assert (status, headers["x-value"]) == (201, "x")
    assert post(server, "/try-it/other_loop", values=VALUES)[0] == 200
    assert metric(server, "onnxsplit_service_executing") == 0
    assert metric(server, "onnxsplit_service_worker_restarts_total") == 0


def test_calls_whose_clients_leave_at_once_cost_no_place(serve):
    server = serve("app.py:TryIt")
    for _ in range(100):
        connection = http.client.HTTPConnection(server.host)
        connection.request("POST", "/try-it/quick")
        connection.close()
    wait_until(lambda: metric(server, "onnxsplit_service_executing") == 0, "all calls are over")
    assert post(server, "/try-it/quick") == (200, "quick")


def test_a_large_answer_comes_whole(serve):
    server = serve("app.py:TryIt")
    status, headers, body = server.ask("/try-it/large", b'{"size": 50000001}', content_type="application/json")
    assert (status, headers["content-length"], len(body)) == (200, "50000001", 50000001)


# Streams


def test_a_stream_waits_for_its_client_and_ends_with_it(serve, folder):
    server = serve("app.py:TryIt")
    connection = http.client.HTTPConnection(server.host)
    connection.request("POST", "/try-it/words?count=10000")
    answer = connection.getresponse()
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.read(100).startswith(b"data: word 0 ")
    spoken = wait_until(lambda: _settled(folder / "spoken"), "the stream waits")
    assert spoken < 9000  # it would be 1 GB
    connection.close()
    wait_until(lambda: metric(server, "onnxsplit_service_executing") == 0, "the call is over")
    assert metric(server, 'onnxsplit_service_calls_total{endpoint="words",outcome="CANCELED"') == 1
    _, _, whole = server.ask("/try-it/words?count=3", b"")
    assert [part[:12] for part in whole.split(b"\n\n")[:-1]] == [b"data: word 0", b"data: word 1", b"data: word 2"]


def _settled(file: Path) -> int | None:
    """The number in a file once it has not changed for a second; the writer is then waiting."""
    before = file.read_text()
    threading.Event().wait(1)
    return int(before) if before and file.read_text() == before else None


def test_a_client_that_goes_away_cancels_its_call(serve, folder):
    server = serve("app.py:TryIt")
    connection = http.client.HTTPConnection(server.host)
    connection.request("POST", "/try-it/forever")
    wait_until((folder / "waits").exists)
    connection.close()
    wait_until((folder / "cancelled").exists, "the endpoint is cancelled")


# Deaths


def test_calls_of_a_killed_worker_are_executed_by_others(serve, folder):
    server = serve("app.py:TryIt")
    expected = post(server, "/try-it/total", values=VALUES)
    with ThreadPoolExecutor(6) as threads:
        calls = [threads.submit(post, server, "/try-it/held", values=VALUES) for _ in range(6)]
        wait_until(lambda: (folder / "holding").exists() and (folder / "holding").stat().st_size == 6)
        os.kill(workers(server)[0], signal.SIGKILL)
        wait_until(lambda: (folder / "holding").stat().st_size > 6, "a call begins again")
        (folder / "go").touch()
        assert [call.result() for call in calls] == [expected] * 6
    wait_until(lambda: metric(server, "onnxsplit_service_workers") == 2, "the worker is replaced")
    assert metric(server, "onnxsplit_service_worker_restarts_total") == 1


def test_a_call_that_kills_its_workers_is_given_up_and_takes_no_other_with_it(serve, folder):
    server = serve("app.py:TryIt")
    expected = post(server, "/try-it/total", values=VALUES)
    with ThreadPoolExecutor(5) as threads:
        calls = [threads.submit(post, server, "/try-it/held", values=VALUES) for _ in range(4)]
        wait_until(lambda: (folder / "holding").exists() and (folder / "holding").stat().st_size == 4)
        poison = threads.submit(post, server, "/try-it/poison")
        wait_until(lambda: (folder / "poisoned").exists(), "the first worker dies")
        (folder / "go").touch()
        status, answer = poison.result()
        assert [call.result() for call in calls] == [expected] * 4
    assert status == 500
    assert "2 workers died of this call" in answer["error"]
    assert (folder / "poisoned").stat().st_size == 2


def test_a_call_without_end_is_given_up_and_its_worker_replaced(serve):
    server = serve("app.py:Limited")
    (before,) = workers(server)
    status, answer = post(server, "/limited/stuck")
    assert (status, "timeout of 2 s" in answer["error"]) == (504, True)
    wait_until(lambda: before not in workers(server), "the worker is ended")
    _, after = wait_until(lambda: _first_answer(server, "/limited/ready"), "another takes calls")
    assert after != before


def test_a_call_without_end_takes_no_other_with_it(serve, folder):
    server = serve("app.py:Limited")
    (pid,) = workers(server)
    connection = http.client.HTTPConnection(server.host)
    connection.request("POST", "/limited/hold")
    stream = connection.getresponse()
    assert stream.readline() == b"data: begun\n"
    assert post(server, "/limited/stuck")[0] == 504
    wait_until(lambda: any("a call does not stop" in line for line in server.log), "the worker is to end")
    assert running([pid])
    (folder / "go").touch()
    assert stream.read().endswith(b"data: done\n\n")
    connection.close()
    wait_until(lambda: not running([pid]), "the worker ends")


@pytest.mark.parametrize("way", ["child", "fork"])
def test_what_a_worker_has_started_ends_with_it(serve, way):
    server = serve("app.py:TryIt")
    _, answer = post(server, f"/try-it/{way}")
    child = int(answer)
    for pid in workers(server):
        os.kill(pid, signal.SIGKILL)  # the child has a copy of its socket
    wait_until(lambda: not running([child]), "the child ends")
    wait_until(lambda: metric(server, "onnxsplit_service_workers") == 2, "the workers are replaced")
    _, answer = post(server, f"/try-it/{way}")
    server.end()
    assert not running([int(answer)])


def test_a_worker_does_not_mix_an_edited_file_with_what_is_served(serve, folder):
    server = serve("app.py:Alone")
    (folder / "app.py").write_text(APP.replace("def greet", "def welcome"))
    (pid,) = workers(server)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: b"has changed; start the server again" in server.ask("/v2/health/ready")[2])
    (folder / "app.py").write_text(APP)
    wait_until(lambda: server.ask("/v2/health/ready")[0] == 200, "the service is back")
    assert post(server, "/alone/greet") == (200, "hello you")


def test_a_service_is_closed_with_its_worker(folder, python_environment):
    with Served("app.py:Limited", environment=python_environment, folder=folder):
        pass
    assert (folder / "closed").exists()


def _first_answer(server: Served, path: str) -> tuple[int, object] | None:
    status, answer = post(server, path)
    return (status, answer) if status == 200 else None


def test_a_killed_node_is_not_noticed(serve):
    server = serve("app.py:TryIt")
    expected = post(server, "/try-it/total", values=VALUES)
    for node in children_of(server.process.pid, "runtime.node"):
        node.kill()
    assert post(server, "/try-it/total", values=VALUES) == expected


def test_calls_are_answered_before_the_server_stops(serve, folder):
    server = serve("app.py:TryIt")
    expected = post(server, "/try-it/total", values=VALUES)
    pids = workers(server)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(post, server, "/try-it/held", values=VALUES)
        wait_until((folder / "holding").exists)
        for pid in (*pids, server.process.pid):  # as service managers do
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: any("stopping" in line for line in server.log))
        (folder / "go").touch()
        assert call.result() == expected
    assert server.wait() == 0
    assert not running(pids)


@pytest.mark.parametrize("busy", [False, True])
def test_workers_end_with_a_server_that_is_killed(folder, python_environment, busy):
    server = Served("app.py:TryIt", environment=python_environment, folder=folder)
    pids = workers(server)
    assert len(pids) == 2
    if busy:
        connection = http.client.HTTPConnection(server.host)
        connection.request("POST", "/try-it/held", json.dumps({"values": VALUES}))
        wait_until((folder / "holding").exists)
    server.process.kill()
    server.wait()
    if busy:
        connection.close()
    wait_until(lambda: not running(pids), "the workers have ended")


def test_more_calls_than_may_wait_are_refused(serve, folder):
    server = serve("app.py:TryIt", "--max-queue", "1")
    with ThreadPoolExecutor(9) as threads:
        calls = [threads.submit(post, server, "/try-it/held", values=VALUES) for _ in range(8)]
        wait_until(lambda: (folder / "holding").exists() and (folder / "holding").stat().st_size == 8)
        waiting = threads.submit(post, server, "/try-it/held", values=VALUES)
        wait_until(lambda: metric(server, "onnxsplit_service_waiting") == 1)
        status, answer = post(server, "/try-it/total", values=VALUES)
        assert (status, "--max-queue" in answer["error"]) == (503, True)
        (folder / "go").touch()
        assert {call.result()[0] for call in [*calls, waiting]} == {200}


def test_the_server_is_ready_only_with_a_worker(serve):
    server = serve("app.py:Steps")
    assert server.ask("/v2/health/ready")[0] == 200
    (pid,) = workers(server)
    os.kill(pid, signal.SIGSTOP)  # so that none is up while this asks
    os.kill(pid, signal.SIGKILL)
    reason = wait_until(lambda: server.ask("/v2/health/ready")[2], "the server is not ready")
    assert "no worker of Steps is up" in json.loads(reason)["error"]
    wait_until(lambda: server.ask("/v2/health/ready")[0] == 200, "it is ready again")


# Starts that fail


@pytest.mark.parametrize(
    ("code", "word", "message"),
    [
        ("def broken(:", "bad.py", "SyntaxError"),
        ("import nothing_of_this_name", "bad.py:Some", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("x = 1", "bad.py", "has no service; mark a class with @service"),
        (APP, "bad.py", "has several services; add :NAME (TryIt, Steps, Limited, Alone)"),
        (APP, "bad.py:Other", "has no service 'Other'; it has TryIt, Steps, Limited, Alone"),
        (APP.replace('"model.plan"', '"other.plan"'), "bad.py:Steps", "its model 'chain' is not there"),
        ("raise SystemExit('no settings')", "bad.py", "SystemExit: no settings"),
        ("import runtime.mine", "bad.py", "packages of these names are those of onnxsplit; rename yours"),
        (
            "from onnxsplit import *\n@service()\nclass A:\n  def __init__(self): raise OSError('no disk')\n"
            "  @endpoint\n  def a(self) -> None: ...",
            "bad.py", "A cannot be made: OSError: no disk",
        ),
        (
            "from onnxsplit import *\n@service()\nclass A:\n  @endpoint\n  def a(self, x) -> None: ...",
            "bad.py", "the parameter 'x' of A.a has no type",
        ),
    ],
)  # fmt: skip
def test_a_service_that_cannot_be_served_is_refused(folder, python_environment, code, word, message):
    (folder / "bad.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "onnxsplit", "serve", word, "--http-port", "0", "--grpc-port", "off"],
        cwd=folder, env=python_environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stderr.splitlines()[-1].find("Traceback") < 0


def test_missing_files_and_equal_paths_are_refused(folder, python_environment):
    def refusal(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "onnxsplit", "serve", *words],
            cwd=folder, env=python_environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode != 0
        return done.stderr

    assert "no such file" in refusal("missing.py:Service")
    assert "have the same name" in refusal("app.py:Alone", "app.py:Alone")
    (folder / "other.py").write_text(APP.replace("class Alone", "class Other").replace("def greet", "def sum"))
    (folder / "other.py").write_text((folder / "other.py").read_text().replace("@service()", '@service(path="/steps")'))
    assert "both have the path /steps/sum" in refusal("app.py:Steps", "other.py:Other")
