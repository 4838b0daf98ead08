"""A repository of models is watched: plans are loaded, replaced and unloaded as their folders change."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from pathlib import Path

import build
import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from served import Served
from waiting import wait_until

from onnxsplit import LaunchFailed
from onnxsplit.planning.planner import partition
from runtime.gateway.models.loader import Loader
from runtime.gateway.models.polling import Poller
from runtime.gateway.models.repository import Repository
from runtime.gateway.models.version import find_versions
from runtime.gateway.protocol.documents import VersionState
from runtime.gateway.queue import Limits
from runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> dict[int, Path]:
    """Plans of chains of different lengths, by their lengths: each gives other answers."""
    folder = tmp_path_factory.mktemp("plans")
    made = {}
    for length in (2, 3, 4):
        model = build.save(build.chain(length), folder, f"chain{length}.onnx")
        partition(model, stages=1, out=folder / f"{length}.plan", costs="analytic")
        made[length] = folder / f"{length}.plan"
    return made


def asked() -> bytes:
    tensor = {"name": "x", "shape": [1, 32], "datatype": "FP32", "data": [0.5] * 32}
    return json.dumps({"inputs": [tensor]}).encode()


def put(plan: Path, target: Path) -> None:
    """Put a copy of a plan into its place at once, as partition does."""
    target.parent.mkdir(parents=True, exist_ok=True)
    copy = target.with_name(f".{target.name}.tmp")
    shutil.copytree(plan, copy)
    if target.exists():
        shutil.rmtree(target)
    copy.rename(target)


def answer(server: Served, model: str) -> list[float] | None:
    status, _, body = server.ask(f"/v2/models/{model}/infer", asked())
    return json.loads(body)["outputs"][0]["data"] if status == 200 else None


def test_models_come_change_and_go_while_clients_are_answered(plans, tmp_path, python_environment):
    repository = tmp_path / "models"
    repository.mkdir()
    with Served(repository, "--poll", "0.2", environment=python_environment) as server:
        assert server.ask("/v2/health/live")[0] == 200
        put(plans[2], repository / "alpha.plan")
        first = wait_until(lambda: answer(server, "alpha"), "the new model answers")
        put(plans[3], repository / "beta" / "1")
        before = wait_until(lambda: answer(server, "beta"), "the model with versions answers")
        failed, stopped = [], threading.Event()

        def ask_on() -> None:
            while not stopped.is_set():
                status = server.ask("/v2/models/beta/infer", asked())[0]
                if status != 200:
                    failed.append(status)

        thread = threading.Thread(target=ask_on)
        thread.start()
        put(plans[4], repository / "beta" / "2")
        after = wait_until(lambda: (found := answer(server, "beta")) != before and found, "the new version answers")
        stopped.set()
        thread.join()
        assert failed == [], "the old version answered until the new one was ready"
        wait_until(lambda: server.json("/v2/models/beta")["versions"] == ["2"], "the old version is unloaded")
        shutil.rmtree(repository / "beta" / "2")
        wait_until(lambda: answer(server, "beta") == before, "the version before is loaded again")
        put(plans[4], repository / "alpha.plan")
        wait_until(lambda: answer(server, "alpha") == after, "the plan was replaced")
        assert first != after
        shutil.rmtree(repository / "alpha.plan")
        wait_until(lambda: server.ask("/v2/models/alpha")[0] == 404, "the model is gone")
        assert answer(server, "beta") == before


@pytest.fixture
def no_pause(monkeypatch):
    """A plan that did not start is tried again at the next look."""
    monkeypatch.setattr("runtime.gateway.models.polling._FIRST_PAUSE_S", 0.0)


class Scene:
    """A repository in this process, without its own watching."""

    def __init__(self, folder: Path, start=lambda folder, _: Pipeline.launch(folder, threads=1)) -> None:
        self.models = Repository(find_versions([folder]), Loader(start, Limits()))
        self.poller = Poller(self.models, [folder])

    def states(self) -> dict[str, str]:
        return {f"{v.model}/{v.number}": v.state.value for v in self.models}

    async def value(self) -> float:
        version = self.models.loaded("model")
        return float(np.sum((await asyncio.wrap_future(version.pipeline.submit(np.ones((1, 32), np.float32))))["y"]))


def test_a_plan_that_is_still_being_copied_is_tried_again_and_the_old_one_goes_on(plans, tmp_path, caplog):
    put(plans[2], tmp_path / "model" / "1")

    async def main():
        scene = Scene(tmp_path / "model")
        await scene.models.load("model")
        before = await scene.value()
        half = tmp_path / "model" / "2"
        half.mkdir()
        shutil.copy(plans[3] / "plan.json", half)
        for _ in range(3):
            await scene.poller.look()
        assert scene.states() == {"model/1": "READY"}
        assert await scene.value() == before
        assert sum("plan not taken over" in record.getMessage() for record in caplog.records) == 1
        shutil.copytree(plans[3], half, dirs_exist_ok=True)
        await scene.poller.look()
        assert scene.states() == {"model/1": "UNAVAILABLE", "model/2": "READY"}
        (tmp_path / "model" / "1" / "plan.json").write_bytes((plans[4] / "plan.json").read_bytes())
        await scene.poller.look()
        assert scene.states() == {"model/1": "UNAVAILABLE", "model/2": "READY"}, "a damaged old version hurts nobody"
        await scene.models.close(0.0)

    asyncio.run(main())


def test_a_successor_that_does_not_start_leaves_its_predecessor_in_place(plans, tmp_path, caplog, no_pause):
    put(plans[2], tmp_path / "model")
    allowed = [True]

    def start(folder, abandoned):
        if not allowed[0]:
            raise LaunchFailed("no memory")
        return Pipeline.launch(folder, threads=1, abandoned=abandoned)

    async def main():
        scene = Scene(tmp_path / "model", start)
        await scene.models.load("model")
        before = await scene.value()
        allowed[0] = False
        put(plans[3], tmp_path / "model")
        for _ in range(3):
            await scene.poller.look()
        assert await scene.value() == before
        assert sum("no memory" in record.getMessage() for record in caplog.records) == 1
        allowed[0] = True
        await scene.poller.look()
        assert await scene.value() != before, "it is tried again"
        await scene.models.close(0.0)

    asyncio.run(main())


def test_a_model_that_was_unloaded_by_hand_stays_unloaded_until_it_is_loaded(plans, tmp_path):
    put(plans[2], tmp_path / "model" / "1")

    async def main():
        scene = Scene(tmp_path / "model")
        await scene.models.load("model")
        await scene.models.unload("model")
        put(plans[3], tmp_path / "model" / "2")
        await scene.poller.look()
        assert scene.states() == {"model/1": "UNAVAILABLE", "model/2": "UNAVAILABLE"}
        await scene.models.load("model")
        assert scene.states() == {"model/1": "UNAVAILABLE", "model/2": "READY"}
        await scene.models.close(0.0)

    asyncio.run(main())


def test_a_plan_that_is_missing_for_a_moment_is_not_unloaded(plans, tmp_path):
    put(plans[2], tmp_path / "models" / "a")
    put(plans[3], tmp_path / "models" / "b")

    async def main():
        scene = Scene(tmp_path / "models")
        for name in ("a", "b"):
            await scene.models.load(name)
        (tmp_path / "models" / "a").rename(tmp_path / "models" / ".a")
        await scene.poller.look()
        assert scene.states() == {"a/1": "READY", "b/1": "READY"}
        (tmp_path / "models" / ".a").rename(tmp_path / "models" / "a")
        await scene.poller.look()
        (tmp_path / "models" / "a").rename(tmp_path / "models" / ".a")
        await scene.poller.look()
        await scene.poller.look()
        assert scene.states() == {"b/1": "READY"}
        assert all(version.state is VersionState.READY for version in scene.models)
        await scene.models.close(0.0)

    asyncio.run(main())


def test_folders_without_a_plan_change_nothing(plans, tmp_path, caplog):
    put(plans[2], tmp_path / "models" / "a.plan")

    async def main():
        scene = Scene(tmp_path / "models")
        await scene.models.load("a")
        (tmp_path / "models" / "20241130").mkdir()
        (tmp_path / "models" / "00").mkdir()
        for _ in range(3):
            await scene.poller.look()
        assert scene.states() == {"a/1": "READY"}
        (tmp_path / "models" / "plan.json").write_text("{")
        for _ in range(3):
            await scene.poller.look()
        assert scene.states() == {"a/1": "READY"}
        assert sum("damaged" in record.getMessage() for record in caplog.records) == 1
        await scene.models.close(0.0)

    asyncio.run(main())


def test_a_new_model_that_did_not_start_is_loaded_once_it_can(plans, tmp_path, no_pause):
    put(plans[2], tmp_path / "models" / "a")
    broken = [True]

    def start(folder, abandoned):
        if folder.name == "b" and broken[0]:
            raise LaunchFailed("no memory")
        return Pipeline.launch(folder, threads=1, abandoned=abandoned)

    async def main():
        scene = Scene(tmp_path / "models", start)
        await scene.models.load("a")
        put(plans[3], tmp_path / "models" / "b")
        await scene.poller.look()
        assert scene.states() == {"a/1": "READY", "b/1": "UNAVAILABLE"}
        assert scene.models.ready, "what arrives does not make the server unready"
        broken[0] = False
        await scene.poller.look()
        assert scene.states() == {"a/1": "READY", "b/1": "READY"}
        await scene.models.close(0.0)

    asyncio.run(main())


def test_models_that_come_and_go_leave_no_gap(plans, tmp_path):
    put(plans[2], tmp_path / "models" / "model" / "1")
    put(plans[3], tmp_path / "models" / "model" / "2")
    seen = []

    async def main():
        def start(folder, abandoned):
            seen.append((folder.name, scene.models.loaded("model").number if seen else None, scene.models.ready))
            return Pipeline.launch(folder, threads=1, abandoned=abandoned)

        scene = Scene(tmp_path / "models", start)
        await scene.models.load("model")
        shutil.rmtree(tmp_path / "models" / "model" / "2")
        await scene.poller.look()
        await scene.poller.look()
        assert scene.states() == {"model/1": "READY"}
        put(plans[4], tmp_path / "models" / "model" / "3")
        await scene.poller.look()
        await scene.models.close(0.0)

    asyncio.run(main())
    assert seen == [("2", None, False), ("1", "2", True), ("3", "1", True)]


def test_models_do_not_wait_for_each_other(plans, tmp_path):
    put(plans[2], tmp_path / "models" / "a")
    put(plans[3], tmp_path / "models" / "b")
    going_on = threading.Event()

    def start(folder, abandoned):
        if folder.name == "b":
            going_on.wait()
        return Pipeline.launch(folder, threads=1, abandoned=abandoned)

    async def main():
        scene = Scene(tmp_path / "models", start)
        loading = asyncio.ensure_future(scene.models.load("b"))
        await asyncio.sleep(0)
        await scene.models.load("a")
        await scene.models.unload("a")
        assert scene.states() == {"a/1": "UNAVAILABLE", "b/1": "LOADING"}
        going_on.set()
        await loading
        await scene.models.close(0.0)

    asyncio.run(main())


def test_a_link_is_a_model_of_its_own_name(plans, tmp_path):
    link = tmp_path / "models" / "prod.plan"
    link.parent.mkdir()
    link.symlink_to(plans[2])

    async def main():
        scene = Scene(tmp_path / "models")
        await scene.models.load("prod")
        new = tmp_path / "models" / ".new"
        new.symlink_to(plans[3])
        before = scene.models.find("prod")
        new.rename(link)
        await scene.poller.look()
        assert scene.states() == {"prod/1": "READY"}
        assert scene.models.find("prod") is not before
        await scene.models.close(0.0)

    asyncio.run(main())
