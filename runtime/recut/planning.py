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

from onnxsplit.errors import one_line
from onnxsplit.file_cache import LockedCache, cache_folder
from onnxsplit.session import quiet_environment, without_interrupts
from runtime.errors import RecutFailed

_LOOK_S = 0.05
_LOWEST_PRIORITY = 19
_LAST_LINES = 5


@dataclass(frozen=True)
class Replan:
    """A plan that was made anew.

    Attributes:
        folder: its directory; None where no plan is better than the present one.
        gain: the throughput of the new plan over that of the present one, as predicted for the present speeds.
        seconds: the time that planning took.
        close: removes the directory.
    """

    folder: Path | None
    gain: float
    seconds: float
    close: Callable[[], None]


class PlanCancelled(RecutFailed):
    """Raised when planning was given up because the pipeline closes."""


def replan(
    folder: Path,
    *,
    speeds: Mapping[str, float],
    stage_times_ns: Sequence[int] | None,
    least_gain: float,
    stopped: Callable[[], bool],
) -> Replan:
    """Plan the model of a plan anew; see :func:`onnxsplit.replan`. The plan is kept in a folder of the user's cache.

    Args:
        folder: the plan directory.
        speeds: the speeds of devices, relative to when the plan was made.
        stage_times_ns: times of the plan's stages at full speed; None for those of the plan.
        least_gain: the least gain in per cent for which a plan is written.
        stopped: tells that the plan is not wanted any more.

    Raises:
        RecutFailed: no plan could be made; says why.
    """
    cache = LockedCache(cache_folder("recuts"))
    job = {
        "plan": str(folder.resolve()),
        "speeds": dict(speeds),
        "stage_times_ns": None if stage_times_ns is None else list(stage_times_ns),
        "least_gain": least_gain,
    }
    answer: dict[str, float | bool] = {}

    def make(draft: Path) -> None:
        answer.update(_run({**job, "out": str(draft / "new.plan")}, stopped))

    key = f"{os.getpid()}-{next(tempfile._get_candidate_names())}"  # type: ignore[attr-defined]
    try:
        entry = cache.obtain(key, make)
        cache.evict(unused_s=0.0, keep=key)  # what killed processes have left
    except OSError as error:
        cache.close()
        raise RecutFailed(
            f"the new plan cannot be kept in {cache.folder}: {error}. Free some space, or set XDG_CACHE_HOME to "
            "another folder"
        ) from error
    except BaseException:
        cache.close()
        _forget(cache.folder, key)
        raise

    def close() -> None:
        with contextlib.suppress(OSError):
            cache.discard(entry)
        cache.close()
        _forget(cache.folder, key)

    plan = entry / "new.plan"
    return Replan(plan if plan.is_dir() else None, float(answer["gain"]), float(answer["seconds"]), close)


def _forget(folder: Path, key: str) -> None:
    """Remove the files that are left of an entry."""
    for suffix in (".lock", ".making"):
        (folder / f"{key}{suffix}").unlink(missing_ok=True)


def _run(job: Mapping[str, object], stopped: Callable[[], bool]) -> dict[str, float]:
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
            found: dict[str, float] = json.loads(said)
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
            least_gain=job["least_gain"],
        )
    except (onnxsplit.OnnxsplitError, OSError) as error:
        shutil.rmtree(job["out"], ignore_errors=True)
        sys.stdout.write(one_line(error))
        return 1
    sys.stdout.write(json.dumps({"gain": found.gain, "seconds": found.seconds}))
    return 0


def _end_with_parent() -> None:
    """End this process when standard input ends, because the process that has started it has ended."""
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
