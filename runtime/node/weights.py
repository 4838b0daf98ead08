"""One packed copy of a stage's weights, shared by all its replicas on a host.

ONNX Runtime packs weights into the layout that its kernels read, and each session would hold a packed copy of its own.
Here a stage is optimised and packed once and written to a cache, and every replica maps it from there. The replicas
then share the pages of one file, and a session opens in a fraction of the time. A copy is valid for one CPU model, one
version of ONNX Runtime and one optimisation level.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from onnxsplit.custom_ops import Library
from onnxsplit.errors import OnnxsplitError
from onnxsplit.file_cache import LockedCache, cache_folder
from onnxsplit.plan import Stage
from onnxsplit.providers import load_runtime
from onnxsplit.session import open_session, quiet_environment

MODEL_FILE = "model.onnx"
"""The name of the model in a copy; its weights are in files beside it."""

_UNUSED_S = 30 * 24 * 3600  # copies unused for this long are removed when another is made
_log = logging.getLogger("runtime.weights")


def shared_copy(folder: Path, stage: Stage, custom_ops: Sequence[Library] = ()) -> Path | None:
    """The packed copy of a stage, which is made if it is missing. Open it with the level ``disabled``.

    Args:
        folder: the plan directory.
        stage: the stage.
        custom_ops: the libraries of custom ops that the stage needs, since optimising may run their ops.

    Returns:
        The model file; None when the copy cannot be made, because the disk is full or an op cannot be written.
        Every replica then packs its own weights.
    """

    def make(draft: Path) -> None:
        cache.evict(unused_s=_UNUSED_S)
        _pack(folder / stage.file, draft / MODEL_FILE, stage.optimization_level, custom_ops)

    try:
        with LockedCache(cache_folder("weights")) as cache:
            return cache.obtain(_key(stage, custom_ops), make) / MODEL_FILE
    except (OSError, subprocess.CalledProcessError) as error:
        _log.warning("stage %d packs weights of its own: %s", stage.index, error)
        return None


def _key(stage: Stage, custom_ops: Sequence[Library]) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line for name in ("model name", "flags", "Features") for line in lines if line.startswith(name)][:2]
    parts = [entry.sha256 for entry in stage.files] + [load_runtime().__version__, stage.optimization_level, *cpu]
    parts += [library.sha256 for library in custom_ops]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _pack(model: Path, target: Path, level: str, custom_ops: Sequence[Library]) -> None:
    """Pack in a separate process, because the node would keep the memory that packing takes."""
    command = [sys.executable, "-P", "-m", "runtime.node.weights", str(model), str(target), level]
    command.append(msgspec.json.encode(custom_ops).decode())
    subprocess.run(command, check=True, env=quiet_environment(), stdin=subprocess.DEVNULL)


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
