"""One copy of a stage's weights for all its replicas on a host.

ONNX Runtime packs weights into the layout its kernels read, and each session would hold a packed copy of its own.
Here a stage is optimised and packed once, written to a cache, and mapped from there by every replica: what they share
is the page cache, and a session opens in a fraction of the time. A copy fits one CPU model, one ONNX Runtime, one
optimisation level.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from onnxsplit.custom_ops import Library
from onnxsplit.errors import OnnxsplitError
from onnxsplit.plan import Stage
from onnxsplit.providers import load_runtime
from onnxsplit.session import open_session, quiet_environment

MODEL_FILE = "model.onnx"
_UNUSED_S = 30 * 24 * 3600  # copies that nobody used for so long are removed when another is made
_log = logging.getLogger("runtime.weights")


def shared_copy(folder: Path, stage: Stage, custom_ops: Sequence[Library] = ()) -> Path | None:
    """The packed copy of a stage, made if it is not there; to be opened with the level ``disabled``.

    None where it cannot be made (no room, an op that cannot be written): then every replica packs its own.

    Args:
        folder: the plan directory.
        stage: the stage.
        custom_ops: the libraries of custom ops that it needs: optimising may run their ops.
    """
    target = cache_folder() / _key(stage, custom_ops)
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(target.with_suffix(".lock")):
            if not (target / MODEL_FILE).is_file():
                _prune(target.parent)
                _make(folder / stage.file, target, stage.optimization_level, custom_ops)
        os.utime(target)
    except (OSError, subprocess.CalledProcessError) as error:
        _log.warning("stage %d packs weights of its own: %s", stage.index, error)
        return None
    return target / MODEL_FILE


def cache_folder() -> Path:
    """Where packed weights are kept: ``$XDG_CACHE_HOME/onnxsplit/weights``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxsplit" / "weights"


def _key(stage: Stage, custom_ops: Sequence[Library]) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line for name in ("model name", "flags", "Features") for line in lines if line.startswith(name)][:2]
    parts = [entry.sha256 for entry in stage.files] + [load_runtime().__version__, stage.optimization_level, *cpu]
    parts += [library.sha256 for library in custom_ops]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; the others wait for what it makes."""
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _make(model: Path, target: Path, level: str, custom_ops: Sequence[Library]) -> None:
    """In a process of its own: packing takes memory that would stay with the node."""
    draft = target.with_suffix(f".{os.getpid()}")
    draft.mkdir(mode=0o700)
    try:
        command = [sys.executable, "-P", "-m", "runtime.node.weights", str(model), str(draft / MODEL_FILE), level]
        command.append(msgspec.json.encode(custom_ops).decode())
        subprocess.run(command, check=True, env=quiet_environment(), stdin=subprocess.DEVNULL)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _prune(folder: Path) -> None:
    oldest = time.time() - _UNUSED_S
    for entry in folder.iterdir():
        with suppress(OSError):
            if entry.is_dir() and entry.stat().st_mtime < oldest:
                shutil.rmtree(entry)


def _main() -> int:
    model, target, level, given = sys.argv[1:]
    libraries = msgspec.json.decode(given, type=tuple[Library, ...])
    try:
        open_session(Path(model), threads=1, level=level, save_packed=Path(target), custom_ops=libraries)  # type: ignore[arg-type]
    except OnnxsplitError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
