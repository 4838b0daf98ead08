"""Work for a running pipeline in a process of its own: ``python -P -m onnxsplit.planning.job JSON``.

The process ends when its standard input ends, because the process that has started it has ended. It prints what it has
found as JSON. If it fails, it prints why, and its exit code is 1.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxsplit.errors import OnnxsplitError, one_line

if TYPE_CHECKING:
    from onnxsplit.planning.replan import StageTime


def main(arguments: Sequence[str]) -> int:
    """Do the work that the arguments describe; returns the exit code.

    At the lowest priority, the imports of the work take long on a busy host, so they come after the watch.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads(arguments[0])
    try:
        found = _JOBS[job.pop("what")](**job)
    except (OnnxsplitError, OSError) as error:
        sys.stdout.write(one_line(error))
        return 1
    sys.stdout.write(json.dumps(found))
    return 0


def _replan(plan: str, out: str, speeds: Mapping[str, float], stage_times_ns: Sequence[int] | None) -> dict[str, Any]:
    from onnxsplit.planning.replan import replan

    try:
        found = replan(plan, out=out, speeds=speeds, stage_times_ns=stage_times_ns)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return {
        "gain": found.gain,
        "old_ns": found.old_ns,
        "new_ns": found.new_ns,
        "old_stages": _at_full_speed(found.old_stages, found.speeds),
        "new_stages": _at_full_speed(found.new_stages, found.speeds),
        "seconds": sum(found.seconds.values()),
    }


def _at_full_speed(stages: Sequence[StageTime], speeds: Mapping[str, float]) -> list[list[tuple[str, int]]]:
    """For each stage, the device of each replica, and the time of one run there at full speed."""
    return [
        [(device, round(stage.time_ns * sum(speeds[each] for each in stage.devices))) for device in stage.devices]
        for stage in stages
    ]


def _compare(one: str, other: str) -> dict[str, Any]:
    from onnxsplit.stages.same_model import why_not_same

    return {"why_not": why_not_same(one, other)}


_JOBS: Mapping[str, Callable[..., dict[str, Any]]] = {"replan": _replan, "compare": _compare}


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
