"""Changes the plan of a loaded model, and describes its plans."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from onnxsplit.errors import InputError, shown
from onnxsplit.plan import PLAN_FILE
from runtime.gateway.errors import NotLoaded
from runtime.gateway.models.version import Version
from runtime.gateway.protocol.recuts import (
    GenerationDocument,
    Generations,
    RecutDocument,
    RecutRequest,
    RecutSecondsDocument,
)
from runtime.pipeline import Pipeline


async def recut(version: Version, request: RecutRequest) -> RecutDocument:
    """Change the plan of a version, and say what became of it.

    Raises:
        NotLoaded: The version is not loaded.
        InputError: There is no such plan, or no such device.
        RecutRefused, RecutFailed: As for :meth:`runtime.Pipeline.recut`.
    """
    pipeline = _pipeline(version)
    folder = None if request.plan is None else _beside(version, request.plan)
    begin = asyncio.get_running_loop().run_in_executor
    future = await begin(None, lambda: pipeline.recut(folder, devices=request.devices or None))
    result = await asyncio.shield(asyncio.wrap_future(future))
    seconds = result.seconds
    return RecutDocument(
        old=result.old,
        new=result.new,
        kept=result.kept,
        predicted_gain=result.predicted_gain,
        measured_gain=result.measured_gain,
        seconds=RecutSecondsDocument(seconds.planning, seconds.loading, seconds.warming, seconds.draining),
        why=result.why,
    )


def generations(version: Version) -> Generations:
    """The plans of a version that have nodes now.

    Raises:
        NotLoaded: The version is not loaded.
    """
    pipeline = _pipeline(version)
    recuts = pipeline.recuts
    return Generations(
        name=version.model,
        version=version.number,
        phase=recuts.phase,
        generations=[
            GenerationDocument(
                generation=running.number,
                plan=running.plan_id,
                takes_requests=running is pipeline.entrance.current,
                stages=len(running.plan.stages),
                nodes=len(nodes),
                ready=sum(node.state == "ready" for node in nodes),
                in_flight=running.coordinator.in_flight,
            )
            for running in pipeline.entrance.plans
            for nodes in (running.coordinator.nodes(),)
        ],
        recuts=dict(recuts.results),
        last=recuts.last,
        advice=recuts.advice,
        drift=dict(recuts.drift),
    )


def _pipeline(version: Version) -> Pipeline:
    if version.pipeline is None or version.batcher is None:
        raise NotLoaded(f"model {version.model!r} version {version.number} is not loaded: {version.reason}")
    return version.pipeline


def _beside(version: Version, name: str) -> Path:
    """The plan directory of this name beside that of a version; no name leads anywhere else.

    Raises:
        InputError: There is no such plan.
    """
    parent = Path(version.folder).resolve().parent
    folder = parent / name
    if "/" in name or "\0" in name or name in (".", "..") or Path(os.path.realpath(folder)).parent != parent:
        raise InputError(f"plan {shown(name)} must be the name of a directory beside the present plan, without a path")
    try:
        found = (folder / PLAN_FILE).is_file()
    except OSError:  # the name is longer than file systems take
        found = False
    if not found:
        raise InputError(f"there is no plan {shown(name)} beside the plan of model {version.model!r} on the server")
    return folder
