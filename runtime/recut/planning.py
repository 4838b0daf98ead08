"""Plans a pipeline's model anew, in a process of low priority, so that this one goes on undisturbed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsplit.errors import one_line
from onnxsplit.session import quiet_environment, without_interrupts
from runtime.errors import RecutFailed
from runtime.recut.gain import StageTimes
from runtime.recut.plan_folder import PlanFolder

if TYPE_CHECKING:
    from onnxsplit.planning.replan import StageTime

_LOOK_S = 0.05
_LOWEST_PRIORITY = 19
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


class PlanCancelled(RecutFailed):
    """Raised when planning was given up because the pipeline closes."""


def replan(
    folder: Path,
    *,
    speeds: Mapping[str, float],
    stage_times_ns: Sequence[int] | None,
    stopped: Callable[[], bool],
) -> Replan:
    """Plan the model of a plan anew; see :func:`onnxsplit.replan`. The plan is kept in a folder of the user's cache.

    Args:
        folder: the plan directory.
        speeds: the speeds of devices, relative to when the plan was made.
        stage_times_ns: times of the plan's stages at full speed; None for those of the plan.
        stopped: tells that the plan is not wanted any more.

    Raises:
        RecutFailed: no plan could be made; says why.
    """
    job = {
        "plan": str(folder.resolve()),
        "speeds": dict(speeds),
        "stage_times_ns": None if stage_times_ns is None else list(stage_times_ns),
    }
    answer: dict[str, Any] = {}
    made = PlanFolder(lambda out: answer.update(_run({**job, "out": str(out)}, stopped)))
    return Replan(folder=made.plan, close=made.close, **answer)


def _run(job: Mapping[str, object], stopped: Callable[[], bool]) -> dict[str, Any]:
    """Plan in a process of its own; returns what it says of the plan."""
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as answer, without_interrupts():
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "runtime.recut.planning", json.dumps(job)],
            stdin=subprocess.PIPE, stdout=answer, stderr=log, env=quiet_environment(),
        )  # fmt: skip
        try:
            with contextlib.suppress(OSError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, process.pid, _LOWEST_PRIORITY)
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_LOOK_S)
                    break
                if stopped():
                    raise PlanCancelled("the pipeline is closing")
        finally:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        answer.seek(0)
        log.seek(0)
        said = answer.read()
        if process.returncode == 0:
            found: dict[str, Any] = json.loads(said)
            return found
        lines = log.read().decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
        raise RecutFailed(
            f"no new plan was made: {said.decode(errors='replace') or ' '.join(lines) or 'it was killed'}"
        )


def main(arguments: Sequence[str]) -> int:
    """Plan as the job in the arguments says, and print what was found as JSON; the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads(arguments[0])
    import onnxsplit

    try:
        found = onnxsplit.replan(
            job["plan"],
            out=job["out"],
            speeds=job["speeds"],
            stage_times_ns=job["stage_times_ns"],
        )
    except (onnxsplit.OnnxsplitError, OSError) as error:
        shutil.rmtree(job["out"], ignore_errors=True)
        sys.stdout.write(one_line(error))
        return 1
    told = {
        "gain": found.gain,
        "old_ns": found.old_ns,
        "new_ns": found.new_ns,
        "old_stages": _at_full_speed(found.old_stages, found.speeds),
        "new_stages": _at_full_speed(found.new_stages, found.speeds),
        "seconds": sum(found.seconds.values()),
    }
    sys.stdout.write(json.dumps(told))
    return 0


def _at_full_speed(stages: Sequence[StageTime], speeds: Mapping[str, float]) -> list[list[tuple[str, int]]]:
    """For each stage, the device of each replica, and the time of one run there at full speed."""
    return [
        [(device, round(stage.time_ns * sum(speeds[each] for each in stage.devices))) for device in stage.devices]
        for stage in stages
    ]


def _end_with_parent() -> None:
    """End this process when standard input ends, because the process that has started it has ended."""
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
