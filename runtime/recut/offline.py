"""Work of the offline half for a running pipeline, in processes of low priority, so that this one goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxsplit.errors import PlanError
from onnxsplit.plan_files import plan_id, read_plan_file
from onnxsplit.session import quiet_environment, without_interrupts
from runtime.background import make_as_nice_as_this, may_return
from runtime.errors import RecutFailed, RecutRefused
from runtime.recut.gain import StageTimes
from runtime.recut.plan_folder import PlanFolder

_LOOK_S = 0.05
_LOWEST_PRIORITY = 19
_LOW_PRIORITY = 10  # where it cannot be raised again; at the lowest, a process hardly runs on a busy host
_PATIENCE_S = 20.0  # at the lowest priority
_MOST_S = 1800.0
_LAST_LINES = 5


@dataclass(frozen=True)
class Replan:
    """A plan that was made anew.

    Attributes:
        folder: its directory; None where no plan is better than the present one.
        gain: the throughput of the new plan over that of the present one, as predicted for the present speeds.
        old_ns: the time between two requests with the present plan, as predicted for the present speeds.
        new_ns: the same with the new plan.
        old_stages: for each stage of the present plan, the device of each replica and the time of one run there at the
            speed that the device had when the plan was made.
        new_stages: the same for the new plan.
        seconds: the time that planning took.
        close: removes the directory.
    """

    folder: Path | None
    gain: float
    old_ns: int
    new_ns: int
    old_stages: StageTimes
    new_stages: StageTimes
    seconds: float
    close: Callable[[], None]


def replan(
    folder: Path,
    identity: str,
    *,
    speeds: Mapping[str, float],
    stage_times_ns: Sequence[int] | None,
    stopped: Callable[[], bool],
) -> Replan:
    """Plan the model of a plan anew; see :func:`onnxsplit.replan`.

    Args:
        folder: the plan directory.
        identity: the identity of the plan, as it runs.
        speeds: the speeds of devices, relative to when the plan was made.
        stage_times_ns: times of the plan's stages at full speed; None for those of the plan.
        stopped: tells that the plan is not wanted any more.

    Raises:
        RecutRefused: another plan is in the directory now.
        RecutFailed: no plan could be made; says why.
    """
    require_unchanged(folder, identity)
    job = {
        "plan": str(folder.resolve()),
        "speeds": dict(speeds),
        "stage_times_ns": None if stage_times_ns is None else list(stage_times_ns),
    }
    answer: dict[str, Any] = {}
    made = PlanFolder(lambda out: answer.update(_run("replan", {**job, "out": str(out)}, stopped)))
    return Replan(folder=made.plan, close=made.close, **answer)


def require_unchanged(folder: Path, identity: str) -> None:
    """Check that the directory of a plan that runs still holds it.

    Raises:
        RecutRefused: it holds another plan, or none.
    """
    try:
        found = plan_id(read_plan_file(folder))
    except PlanError as error:
        raise RecutRefused(f"the plan that runs is not in its directory any more: {error}") from error
    if found != identity:
        raise RecutRefused(
            f"another plan was put into {folder} since the one that runs was loaded; load it, or restart"
        )


def why_not_same(one: Path, other: Path, stopped: Callable[[], bool]) -> str | None:
    """How the models of two plans differ, in a few words; None if they are the same.

    Raises:
        RecutFailed: a plan cannot be read.
    """
    found: str | None = _run("compare", {"one": str(one.resolve()), "other": str(other.resolve())}, stopped)["why_not"]
    return found


class ComparedModels:
    """Compares the models of two plans meanwhile; a context manager that raises RecutFailed if they differ.

    Args:
        one: a plan directory.
        other: another plan directory.
        stopped: tells that the comparison is not wanted any more.
    """

    def __init__(self, one: Path, other: Path, stopped: Callable[[], bool]) -> None:
        self._folders, self._outside = (one, other), stopped
        self._ended = False
        self._compared: Future[str | None] = Future()
        self._thread = threading.Thread(target=self._compare, name="recut-comparison", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended = kind is not None
        self._thread.join()
        if kind is None and (differs := self._compared.result()) is not None:
            raise RecutFailed(f"{self._folders[1]} is a plan of another model: {differs}")

    def _compare(self) -> None:
        try:
            self._compared.set_result(why_not_same(*self._folders, lambda: self._ended or self._outside()))
        except BaseException as error:
            self._compared.set_exception(error)


def _run(what: str, job: Mapping[str, object], stopped: Callable[[], bool]) -> dict[str, Any]:
    """Do a job in a process of its own; returns what it has found."""
    command = [sys.executable, "-P", "-m", "onnxsplit.planning.job", json.dumps({"what": what, **job})]
    ours, its_own = os.pipe()  # it ends when this process does
    try:
        with without_interrupts():
            process = subprocess.Popen(
                command, stdin=ours, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=quiet_environment()
            )
        with process:
            try:
                with suppress(OSError):  # it has ended
                    os.setpriority(os.PRIO_PROCESS, process.pid, _LOWEST_PRIORITY if may_return() else _LOW_PRIORITY)
                said, log = _outputs(process, what, stopped)
            finally:
                process.kill()
    finally:
        os.close(ours)
        os.close(its_own)
    if process.returncode == 0:
        found: dict[str, Any] = json.loads(said)
        return found
    lines = log.decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
    raise RecutFailed(
        said.decode(errors="replace") or " ".join(lines) or f"the process for {what} was killed; try again"
    )


def _outputs(process: subprocess.Popen[bytes], what: str, stopped: Callable[[], bool]) -> tuple[bytes, bytes]:
    """Wait until a process ends; returns what it has written.

    Raises:
        RecutFailed: its work is not wanted any more, or takes too long.
    """
    begun, is_low = time.monotonic(), True
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=_LOOK_S)
        took = time.monotonic() - begun
        if stopped():
            raise RecutFailed("the pipeline is closing")
        if took > _MOST_S:
            raise RecutFailed(f"the process for {what} had not ended after {_MOST_S / 60:.0f} minutes, and was killed")
        if took > _PATIENCE_S and is_low:
            is_low = False
            make_as_nice_as_this(process.pid)
