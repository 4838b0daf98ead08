"""Profiles of a model: the request to the profiling process (:mod:`onnxsplit.cost.profiler`), and its answer."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from onnxsplit.custom_ops import Library
from onnxsplit.errors import ModelError
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.in_memory import ModelFile, runnable
from onnxsplit.npz import save_npz
from onnxsplit.plan import Level
from onnxsplit.session import quiet_environment
from onnxsplit.tensors import Array
from onnxsplit.timed import InPlace


class ProfileRequest(msgspec.Struct, frozen=True):
    """The request to the profiling process.

    Attributes:
        model: path of the model file.
        inputs: path of an ``.npz`` with the model's inputs.
        threads: threads of the session.
        level: optimisation level; shapes of tensors are recorded at ``disabled`` only.
        provider: execution provider.
        seconds: how long to run; 0 for a single run.
        untyped: tensors whose types are wanted.
        data_folder: the folder of the model's external data; beside the file when None.
        custom_ops: libraries of custom ops that the session loads.
        in_place: pairs of an output and the input in whose memory it is written.
    """

    model: str
    inputs: str
    threads: int
    level: Level
    provider: str
    seconds: float
    untyped: tuple[str, ...] = ()
    data_folder: str | None = None
    custom_ops: tuple[Library, ...] = ()
    in_place: InPlace = ()


class Profile(msgspec.Struct, frozen=True):
    """The answer of the profiling process.

    Attributes:
        op_ns: time of each op of the graph in nanoseconds, the median over the runs.
        sizes: shapes by tensor; at the level ``disabled`` only.
        types: types by tensor, for the untyped tensors that are tensors for ONNX Runtime.
        error: why there is no profile; None when there is one.
    """

    op_ns: list[int] = []
    sizes: dict[str, tuple[int, ...]] = {}
    types: dict[str, str] = {}
    error: str | None = None


def run_profile(
    source: ModelFile,
    inputs: Path,
    *,
    threads: int,
    level: Level,
    provider: str,
    seconds: float,
    untyped: tuple[str, ...] = (),
    custom_ops: Sequence[Library] = (),
    in_place: InPlace = (),
) -> Profile:
    """Profile a model in a process of its own.

    Args:
        source: the model file.
        inputs: an ``.npz`` with its inputs.
        threads: threads of the session.
        level: optimisation level.
        provider: execution provider.
        seconds: how long to run; 0 for a single run.
        untyped: tensors whose types are wanted.
        custom_ops: libraries of custom ops that the session loads.
        in_place: pairs of an output and the input in whose memory it is written.

    Raises:
        ModelError: the model does not run on these inputs, or the process died.
    """
    folder = None if source.data_folder is None else str(source.data_folder)
    request = ProfileRequest(
        str(source.path), str(inputs), threads, level, provider, seconds, untyped, folder, tuple(custom_ops), in_place
    )
    done = subprocess.run(
        [sys.executable, "-P", "-m", "onnxsplit.cost.profiler"],
        input=msgspec.json.encode(request),
        capture_output=True,
        env=quiet_environment(),
        check=False,
    )
    try:
        profile = msgspec.json.decode(done.stdout, type=Profile)
    except msgspec.DecodeError as error:
        tail = done.stderr[-500:].decode(errors="replace").strip()
        raise ModelError(f"profiling {source.path}: the process ended with {done.returncode}: {tail}") from error
    if profile.error is not None:
        raise ModelError(f"profiling {source.path}: {profile.error}")
    return profile


def shapes_of_run(
    graph: OpGraph, inputs: Mapping[str, Array], *, custom_ops: Sequence[Library] = ()
) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in one unoptimised run on the CPU, by name.

    Raises:
        ModelError: the model does not run on these inputs.
    """
    with runnable(graph.source) as source, tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        file = Path(folder) / "inputs.npz"
        save_npz(file, inputs)
        return run_profile(
            source,
            file,
            threads=1,
            level="disabled",
            provider="cpu",
            seconds=0.0,
            custom_ops=custom_ops,
        ).sizes
