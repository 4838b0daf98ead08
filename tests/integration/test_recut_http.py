"""Changing the plan of a served model: what clients, operators, metrics and the page see of it."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import build
import numpy as np
import pages
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("tritonclient.grpc", reason="needs the extra test")

import tritonclient.grpc as triton_grpc
from gateways import gateway, until
from processes import children_of, running
from reader import Reader
from recuts import ENVIRONMENT, PATH, GrpcCaller, X, answer, begun, callers, generations, more, recut, serve
from served import Served
from sleeping import Devices, SleepingLauncher
from waiting import wait_until

import onnxsplit

TOKEN = "open-the-door-of-this-server"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Plans beside each other: a model, the same cut elsewhere, another model; a link to a plan elsewhere."""
    folder = tmp_path_factory.mktemp("beside")
    model = build.save(build.chain(), folder)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for out, cut_at in (
        (folder / "early.plan", ["h0"]),
        (folder / "late.plan", ["h4"]),
        (elsewhere / "x.plan", ["h2"]),
    ):
        onnxsplit.partition(model, out=out, cut_at=cut_at, costs="analytic")
    onnxsplit.partition(model, stages=2, out=folder / "model.plan", costs="analytic")
    onnxsplit.partition(build.chain(width=16), out=folder / "other.plan", costs="analytic")
    (folder / "linked.plan").symlink_to(elsewhere / "x.plan")
    return folder


@pytest.fixture(scope="module")
def shared(folder) -> Iterator[Served]:
    """A server for tests that leave it as it was, but for the cut."""
    with serve(folder) as server:
        yield server


# Under load


def test_no_request_is_lost_or_wrong_while_the_plan_changes(folder):
    with serve(folder) as server:
        first = generations(server)
        assert [(g["generation"], g["takes_requests"]) for g in first["generations"]] == [(1, True)]
        assert (first["phase"], first["last"], first["advice"], first["drift"]) == ("steady", "", "", {})
        clients = [lambda x: answer(server, x), lambda x: answer(server, x), GrpcCaller(server), GrpcCaller(server)]
        with callers(clients) as answered:
            more(answered)
            change = begun(server)
            both = generations(server)
            more(answered)
            status, document = change.result(120)
            more(answered)
        after = generations(server)
        assert [g["generation"] for g in both["generations"]] == [1, 2]
        assert sum(g["takes_requests"] for g in both["generations"]) == 1
        assert (status, document["kept"], document["why"]) == (200, True, document["why"])
        assert document["old"] == first["generations"][0]["plan"]
        (only,) = after["generations"]
        assert (only["plan"], only["generation"], only["takes_requests"]) == (document["new"], 2, True)
        assert (only["nodes"], only["ready"]) == (2, 2)
        assert after["recuts"]["kept"] == 1
        assert server.metric("onnxsplit_generation") == 2
        assert server.metric("onnxsplit_recuts_total", 'result="kept"') == 1
        assert server.metric("onnxsplit_recuts_total") == 1
        assert "onnxsplit_drift_ratio" not in server.ask("/metrics")[2].decode(), "it is not watched"
        assert server.metric("onnxsplit_request_failures_total") == 0


# What is refused


@pytest.mark.parametrize(
    "name", ["nothing.plan", "../beside/early.plan", "a/b", ".", "..", "linked.plan", "/tmp", "\0"]
)
def test_a_name_that_is_not_that_of_a_plan_beside_is_refused(shared, name):
    status, document = recut(shared, {"plan": name})
    assert status == 400, document
    assert "plan" in document["error"]
    assert "elsewhere" not in document["error"], "nothing is told of other folders"


@pytest.mark.parametrize(
    ("document", "what"),
    [
        ({"plan": ""}, "length >= 1"),
        ({"plan": "x" * 256}, "length <= 255"),
        ({"plan": 7}, "Expected `str | null`"),
        ({"folder": "x"}, "unknown field `folder`"),
        ({"devices": {"0": 0}}, ">= 1e-06"),
        ({"devices": {"0": 1e-7}}, ">= 1e-06"),
        ({"devices": {"gpu": 0.5}}, "'gpu' is neither a device nor a host of the plan; these are 0, 1"),
        ({"plan": "early.plan", "devices": {"0": 0.5}}, "leave out plan, or leave out devices"),
    ],
)
def test_a_document_that_makes_no_sense_is_refused(shared, document, what):
    status, found = recut(shared, document)
    assert (status, what in found["error"]) == (400, True), found


def test_a_plan_of_another_model_is_refused_with_the_reason(shared):
    status, document = recut(shared, {"plan": "other.plan"})
    assert status == 409
    assert "is a plan of another model: its 'x' is float32 [batch, 16]" in document["error"]
    assert generations(shared)["recuts"]["refused"] >= 1
    assert len(generations(shared)["generations"]) == 1


def test_a_second_change_meanwhile_is_refused(folder):
    with serve(folder) as server:
        change = begun(server)
        status, document = recut(server, {"plan": "late.plan"})
        assert (status, "is being changed already" in document["error"]) == (409, True)
        assert change.result(120)[0] == 200


def test_a_plan_that_was_cut_at_named_tensors_is_not_planned_anew(folder):
    with serve(folder, "--rebalance", "advise", plan="early.plan") as server:
        status, _, body = server.ask("/v2/repository/models/early/recut", b"{}")
        assert (status, "(--cut-at); partition the model without --cut-at" in json.loads(body)["error"]) == (409, True)
        wait_until(lambda: any("no cut of this plan can be advised" in line for line in server.log))


def test_a_model_that_is_not_loaded_has_no_plan_to_change(folder):
    with serve(folder) as server:
        assert server.ask("/v2/repository/models/model/unload", b"{}")[0] == 200
        for status, document in (recut(server, {"plan": "early.plan"}), recut(server, {})):
            assert (status, "takes no requests: it was unloaded" in document["error"]) == (503, True)
        assert server.ask("/v2/models/model/generations")[0] == 503
        assert server.ask("/v2/repository/models/nothing/recut", b"{}")[0] == 404
        assert server.metric("onnxsplit_generation") == 0, "there is none"


def test_a_change_needs_the_token(folder, tmp_path):
    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o600)
    with serve(folder, "--token-file", file) as server:
        assert recut(server, {"plan": "early.plan"})[0] == 401
        assert server.ask("/v2/models/model/generations")[0] == 401
        assert recut(server, {"plan": "nothing.plan"}, Authorization=f"Bearer {TOKEN}")[0] == 400


# Planned anew


def test_the_model_is_planned_anew_for_the_speeds_that_are_given(folder):
    with serve(folder) as server:
        status, document = recut(server, {"devices": {"0": 0.25}})
        assert status == 200, document
        assert document["predicted_gain"] >= 1
        assert document["seconds"]["planning"] > 0
        again = recut(server, {})
        assert again[0] == 200, again
        counts = generations(server)["recuts"]
        assert counts["kept"] + counts["rolled_back"] + counts["no_gain"] == 2
        assert np.isfinite(answer(server)).all()


# Ends


def test_a_change_goes_on_when_its_client_goes_away(folder):
    with serve(folder) as server:
        connection = http.client.HTTPConnection(server.host)
        connection.request("POST", PATH, json.dumps({"plan": "early.plan"}))
        wait_until(lambda: len(generations(server)["generations"]) == 2)
        connection.close()
        wait_until(lambda: generations(server)["recuts"]["kept"] == 1)
        wait_until(lambda: generations(server)["phase"] == "steady")


def test_sigterm_while_a_plan_loads_ends_all_in_order(folder, tmp_path):
    temporary, cache = tmp_path / "t", tmp_path / "cache"
    temporary.mkdir()
    environment = {**ENVIRONMENT, "TMPDIR": str(temporary), "XDG_CACHE_HOME": str(cache)}
    server = Served(folder / "model.plan", environment=environment)
    nodes = [child.pid for child in children_of(server.process.pid, "runtime.node", recursive=True)]
    assert len(nodes) == 2
    change = begun(server)
    wait_until(lambda: len(children_of(server.process.pid, "runtime.node", recursive=True)) > 2)
    nodes = [child.pid for child in children_of(server.process.pid, "runtime.node", recursive=True)]
    assert server.end() == 0, server.log
    assert change.exception(60) is not None or change.result()[0] == 503
    assert running(nodes) == []
    assert list(temporary.glob("onnxsplit-*")) == []
    assert not any(cache.glob("onnxsplit/recuts/*"))
    assert "Traceback" not in "".join(server.log)


# What else goes on


def test_the_cache_of_responses_is_kept(folder):
    with serve(folder, "--response-cache", "1M") as server:
        before = answer(server)
        assert recut(server, {"plan": "early.plan"})[0] == 200
        np.testing.assert_array_equal(answer(server), before)
        assert server.metric("onnxsplit_response_cache_hits_total") == 1


def test_a_sequence_goes_on(tmp_path):
    state = build.model(
        [build.helper.make_node("Add", ["x", "s"], ["t"], name="add"), build.helper.make_node("Neg", ["t"], ["y"])],
        [build.value("x", ["batch", 4]), build.value("s", ["batch", 4])],
        [build.value("y", ["batch", 4]), build.value("t", ["batch", 4])],
        [],
    )
    model = build.save(state, tmp_path)
    for name in ("model.plan", "other.plan"):
        onnxsplit.partition(model, out=tmp_path / name, stages=2 if name == "model.plan" else 1, costs="analytic")
    with serve(tmp_path, "--state", "s=t") as server:
        client = triton_grpc.InferenceServerClient(server.grpc)

        def step(**place: Any) -> float:
            tensor = triton_grpc.InferInput("x", [1, 4], "FP32")
            tensor.set_data_from_numpy(np.ones((1, 4), np.float32))
            return float(client.infer("model", [tensor], sequence_id=7, **place).as_numpy("y")[0, 0])

        assert step(sequence_start=True) == -1
        change = begun(server, "other.plan")
        counted = 1
        while not change.done():
            counted += 1
            assert step() == -counted
        assert change.result()[0] == 200, change.result()
        assert step(sequence_end=True) == -counted - 1


def test_a_stream_goes_on(folder):
    with serve(folder) as server:
        expected, answers = answer(server), []
        client = triton_grpc.InferenceServerClient(server.grpc)
        client.start_stream(lambda result, error: answers.append(error or result.as_numpy("y").ravel()))
        tensor = triton_grpc.InferInput("x", [1, 32], "FP32")
        tensor.set_data_from_numpy(X)
        change, sent = begun(server), 0
        while not change.done() or sent < 20:
            client.async_stream_infer("model", [tensor])
            sent += 1
            wait_until(lambda: len(answers) == sent)  # noqa: B023  it is called at once
        client.stop_stream()
        assert change.result()[0] == 200
        assert all(np.allclose(found, expected, rtol=1e-4, atol=1e-5) for found in answers)


APP = '''
"""A service whose model changes its plan."""
import numpy as np

from onnxsplit import Models, endpoint, service


@service(models={"model": "model.plan"})
class Summing:
    def __init__(self, models: Models) -> None:
        self.model = models["model"]

    @endpoint
    def total(self, scale: float) -> float:
        """Sum what the model makes of some values."""
        return float(self.model.run(np.full((1, 32), scale, np.float32))["y"].sum())
'''


def test_the_model_of_a_service_can_change(folder):
    (folder / "app.py").write_text(APP)
    with Served("app.py:Summing", environment=ENVIRONMENT, folder=folder) as server:
        (path,) = [path for path in server.json("/openapi.json")["paths"] if path.endswith("/total")]

        def total() -> float:
            return json.loads(server.ask(path, b'{"scale": 0.5}', content_type="application/json")[2])

        expected, change = total(), begun(server)
        while not change.done():
            assert total() == pytest.approx(expected, rel=1e-4)
        assert change.result()[0] == 200, change.result()
        assert total() == pytest.approx(expected, rel=1e-4)


# Polling


def put(plan: Path, target: Path) -> None:
    """Put a copy of a plan into its place at once, as partition does."""
    copy = target.with_name(f".{target.name}.tmp")
    shutil.copytree(plan, copy)
    if target.exists():
        shutil.rmtree(target)
    copy.rename(target)


def test_polling_does_not_undo_a_change_and_what_is_put_on_disk_wins(folder, tmp_path):
    put(folder / "model.plan", tmp_path / "model.plan")
    put(folder / "early.plan", tmp_path / "early.plan")
    with serve(tmp_path, "--poll", "0.1") as server, callers([lambda x: answer(server, x)]) as answered:
        status, document = recut(server, {"plan": "early.plan"})
        assert status == 200
        more(answered, 20)
        assert generations(server)["generations"][0]["plan"] == document["new"], "the folder has not changed"
        put(folder / "late.plan", tmp_path / "model.plan")
        wait_until(lambda: generations(server)["generations"][0]["plan"] not in (document["old"], document["new"]))
        assert generations(server)["generations"][0]["generation"] == 1
        more(answered)


def test_a_plan_that_is_put_on_disk_during_a_change_wins(folder, tmp_path):
    put(folder / "model.plan", tmp_path / "model.plan")
    put(folder / "early.plan", tmp_path / "early.plan")
    with serve(tmp_path, "--poll", "0.1") as server, callers([lambda x: answer(server, x)]) as answered:
        change = begun(server)
        put(folder / "late.plan", tmp_path / "model.plan")
        late = onnxsplit.load_plan(folder / "late.plan")
        cut = late.cuts[0].tensor
        wait_until(lambda: cut in str(server.json("/v2/models/model/config")["ensemble_scheduling"]))
        status, said = change.result(120)
        assert status in (200, 503), said
        more(answered)
        assert len(generations(server)["generations"]) == 1


# What ``onnxsplit status`` shows


def test_status_shows_both_plans_and_which_one_takes_requests(folder):
    with serve(folder) as server:

        def shown(*words: str) -> str:
            command = [sys.executable, "-P", "-m", "onnxsplit", "status", "--pid", str(server.process.pid), *words]
            return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout

        assert "plan 1" not in shown()
        change = begun(server)
        both = shown()
        assert change.result(120)[0] == 200
        (one,) = json.loads(shown("--json"))["pipelines"]
    assert re.search(r"model.plan {2}\(process \d+, \w+; plan 1, which takes (no )?new requests\): ", both), both
    assert re.search(r"early.plan {2}\(process \d+, \w+; plan 2, which takes (no )?new requests\): ", both), both
    assert both.count("which takes new requests") == 1
    assert (Path(one["plan"]).name, one["role"]) == ("early.plan", "")


# The documentation


def test_the_page_about_changes_runs_as_it_stands(tmp_path):
    model = build.save(build.chain(), tmp_path)
    for name, stages in (("model.plan", 2), ("other.plan", 3)):
        onnxsplit.partition(model, out=tmp_path / name, stages=stages, costs="analytic")
    with ExitStack() as opened:
        reader = Reader(tmp_path, ENVIRONMENT, opened)
        for kind, block in pages.blocks_of("docs/recut.md"):
            reader.follow(kind, block)
        server = reader.server
        assert server is not None
        found = generations(server)
        assert found["advice"], "it is watched"
        assert found["recuts"]["kept"] == 1, found


# Advice


def test_a_slow_device_is_seen_in_the_advice_and_in_the_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{pages.ROOT}:{pages.ROOT / 'tests' / 'support'}")  # nodes are such modules
    devices = Devices(tmp_path, ["h0", "h1", "h2"])
    plan = devices.plan(tmp_path)
    launcher = SleepingLauncher(onnxsplit.load_plan(plan), devices, op_s=0.02)

    async def serve_and_slow_down() -> None:
        running = {"launcher": launcher, "rebalance": "advise", "inflight": 8}
        async with gateway(plan, running=running) as (http_url, version, _):
            pipeline = version.pipeline
            assert pipeline is not None
            host = http_url.removeprefix("http://")
            stop = asyncio.Event()

            async def load() -> None:
                while not stop.is_set():
                    await pipeline.arun({"t0": np.ones((1, 64), np.float32)})

            loading = [asyncio.ensure_future(load()) for _ in range(8)]
            await until(lambda: "usual speeds" in pipeline.recuts.advice, 240)
            devices.set("h1", 0.4)

            def seen() -> bool:
                recuts = pipeline.recuts
                return "device h1 runs at 0." in recuts.advice and recuts.drift["h1"] > 1.5

            await until(seen, 240)
            found = await asyncio.to_thread(fetched, host, "/v2/models/row/generations")
            text = (await asyncio.to_thread(fetched, host, "/metrics")).decode()
            stop.set()
            await asyncio.gather(*loading)
            document = json.loads(found)
            assert (document["phase"], document["recuts"]["kept"]) == ("steady", 0)
            assert document["advice"]
            assert document["drift"]["h1"] > 1.5
            drift = dict(re.findall(r'^onnxsplit_drift_ratio\{device="(\w+)".*\} (\S+)$', text, re.MULTILINE))
            assert set(drift) == {"h0", "h1", "h2"}
            assert float(drift["h1"]) > 1.5
            assert float(drift["h1"]) > max(float(drift["h0"]), float(drift["h2"]))

    asyncio.run(serve_and_slow_down())


def fetched(host: str, path: str) -> bytes:
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", path)
    try:
        return connection.getresponse().read()
    finally:
        connection.close()
