"""A model whose coordinator fails is not ready, gives the reason, and is restarted automatically."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import weakref

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from onnxsplit.errors import InputError
from runtime import Pipeline
from runtime.errors import LaunchFailed
from runtime.gateway.errors import NotLoaded, status_of
from runtime.gateway.http import codec
from runtime.gateway.models import repository as repositories
from runtime.gateway.models.loader import Loader
from runtime.gateway.models.repository import Repository
from runtime.gateway.models.version import PlanPlace, find_versions, read_version
from runtime.gateway.protocol.documents import VersionState
from runtime.gateway.protocol.inference import InferRequest, SequencePlace
from runtime.gateway.queue import Limits
from runtime.gateway.sequences import SequenceOptions
from runtime.gateway.service import IncomingRequest, Service, Undecoded
from runtime.gateway.shared_memory import SharedMemoryRegions
from runtime.gateway.threads import Workers

X = {"x": np.ones((1, 32), np.float32)}


async def until(condition) -> None:
    """Wait until a condition holds, for at most a minute."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


async def infer(version):
    request = InferRequest("", X)
    batcher, checked = version.check(request, version.requested(request))
    outputs, _ = await batcher.run(request.inputs, checked, 0, None)
    return outputs["y"]


def break_coordinator(pipeline: Pipeline) -> None:
    """Make the next decision of its coordinator's thread raise an error."""

    def fails(_):
        raise ZeroDivisionError("a bug")

    pipeline._coordinator._machine.handle = fails


def test_a_model_whose_coordinator_failed_is_started_again(chain_plan, monkeypatch):
    monkeypatch.setattr(repositories, "_RESTART_WAIT_S", 0.05)
    refusals = [LaunchFailed("not yet"), None]

    def start(folder, abandoned):
        problem = refusals.pop() if refusals else None
        if problem is not None:
            raise problem
        return Pipeline.launch(folder, abandoned=abandoned)

    async def scene():
        models = Repository(find_versions([chain_plan]), Loader(start, Limits()))
        (version,) = models
        await models.load(version.model)
        watching = asyncio.ensure_future(models.watch())
        assert models.ready
        right = await infer(version)
        first = version.pipeline
        break_coordinator(first)
        await until(lambda: not models.ready)
        with pytest.raises(NotLoaded, match="ZeroDivisionError") as caught:
            await infer(version)
        assert status_of(caught.value).http == 503
        assert "ZeroDivisionError" in version.why_not()
        assert version in models.active
        await until(lambda: models.ready)
        assert version.pipeline is not first
        assert refusals == [], "it was tried again after it could not be started"
        assert np.array_equal(await infer(version), right)
        watching.cancel()
        await models.close(10)

    asyncio.run(scene())


def test_a_model_whose_event_loop_stands_still_is_not_ready(chain_plan, monkeypatch):
    async def scene():
        models = Repository(find_versions([chain_plan]), Loader(lambda folder, _: Pipeline.launch(folder), Limits()))
        (version,) = models
        await models.load(version.model)
        monkeypatch.setattr("runtime.coordinator.loop._TURN_S", -1.0)
        assert not models.ready
        assert "has not monitored its nodes" in version.why_not()
        with pytest.raises(NotLoaded, match="has not monitored"):
            await infer(version)
        monkeypatch.undo()
        assert models.ready
        await models.close(10)

    asyncio.run(scene())


def test_a_launch_that_is_no_longer_awaited_is_stopped(chain_plan, tmp_path):
    with pytest.raises(LaunchFailed, match="given up"):
        Pipeline.listen(chain_plan, bind=f"ipc://{tmp_path}/control", abandoned=lambda: True)


def test_an_unload_that_waits_does_not_keep_the_server_from_ending(chain_plan):
    async def scene():
        models = Repository(find_versions([chain_plan]), Loader(lambda folder, _: Pipeline.launch(folder), Limits()))
        (version,) = models
        await models.load(version.model)
        for node in version.pipeline.nodes:
            os.kill(node.pid, signal.SIGSTOP)
        asked = asyncio.ensure_future(infer(version))
        await asyncio.sleep(0)
        unloading = asyncio.ensure_future(models.unload(version.model))
        await until(lambda: version.state is VersionState.UNLOADING)
        async with asyncio.timeout(60):
            await models.close(0.1)
        await asyncio.gather(asked, unloading, return_exceptions=True)
        assert version.pipeline is None

    asyncio.run(scene())


def test_a_load_whose_client_goes_away_is_made_whole(chain_plan):
    async def scene():
        models = Repository(find_versions([chain_plan]), Loader(lambda folder, _: Pipeline.launch(folder), Limits()))
        (version,) = models
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await models.load(version.model)
        await until(lambda: models.ready)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await models.unload(version.model)
        await until(lambda: version.state is VersionState.UNAVAILABLE)
        assert version.pipeline is None
        await models.close(10)

    asyncio.run(scene())


def test_requests_that_were_recognised_go_to_the_pipeline_that_is_loaded_now(chain_plan):
    """The second request of a kind is not decoded. After a change of models it is, and nothing old is kept."""
    pieces, length = codec.ask(X)
    body = b"".join(pieces)
    decoded = []

    def parse(read):
        decoded.append(1)
        return codec.parse(body, length, read)

    async def scene():
        models = Repository(find_versions([chain_plan]), Loader(lambda folder, _: Pipeline.launch(folder), Limits()))
        (version,) = models
        service = Service(models, SharedMemoryRegions(), Workers(1))

        async def ask():
            message = IncomingRequest(body, ("chain", "", length, len(body)), lambda response: response.outputs, {})
            known = service.recall(message) or Undecoded(version.model, "", parse, length)
            return (await service.infer(message, known))["y"]

        await models.load(version.model)
        right = await ask()
        assert np.array_equal(await ask(), right)
        assert len(decoded) == 1
        first = weakref.ref(version.batcher)
        await models.unload(version.model)
        with pytest.raises(NotLoaded, match="it was unloaded"):
            await ask()
        await models.load(version.model)
        for _ in range(2):
            assert np.array_equal(await ask(), right)
        assert len(decoded) == 2
        assert version.counters.inferences == 2, "they were counted for the pipeline that is loaded now"
        gc.collect()
        assert first() is None
        await models.close(10)
        with pytest.raises(NotLoaded, match="is stopping"):
            await ask()

    asyncio.run(scene())


async def step(version, inputs, *, start: bool = False):
    """The answer to a request of a sequence whose state is the input of the chain, and its output."""
    request = InferRequest("", inputs, sequence=SequencePlace(1, start))
    batcher, _ = version.check(request, version.requested(request))
    turn = version.join(request.sequence)
    try:
        outputs, _ = await turn.run(batcher, request, (), 0, None)
        turn.keep()
        return outputs["y"]
    finally:
        turn.leave()


def test_sequences_outlast_a_coordinator_and_end_with_their_plan(chain_plan, monkeypatch):
    monkeypatch.setattr(repositories, "_RESTART_WAIT_S", 0.05)
    options = SequenceOptions(declared={"model": ("x=y",)})

    async def scene():
        start = lambda folder, _: Pipeline.launch(folder)  # noqa: E731
        models = Repository(find_versions([chain_plan]), Loader(start, Limits(), sequences=options))
        (version,) = models
        await models.load(version.model)
        once = await step(version, X, start=True)
        wanted = [await infer(version), None]
        request = InferRequest("", {"x": once})
        batcher, checked = version.check(request, version.requested(request))
        wanted[1] = (await batcher.run(request.inputs, checked, 0, None))[0]["y"]
        assert np.array_equal(once, wanted[0])

        watching = asyncio.ensure_future(models.watch())
        first = version.pipeline
        break_coordinator(first)
        await until(lambda: not models.ready)
        with pytest.raises(NotLoaded):
            await step(version, {})
        await until(lambda: models.ready)
        assert version.pipeline is not first
        assert np.array_equal(await step(version, {}), wanted[1])

        successor = read_version(PlanPlace(version.model, version.number, chain_plan))
        await models.update(version.model, [successor], [])
        assert options.room.taken == options.room.taken_bytes == 0
        with pytest.raises(InputError, match="sequence 1 is not running"):
            await step(successor, {})
        watching.cancel()
        await models.close(10)

    asyncio.run(scene())
