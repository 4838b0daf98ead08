"""Profiles of a model: the request to the profiling process (:mod:`onnxsplit.cost.profiler`), and its answer."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import msgspec.structs

from onnxsplit.custom_ops import Library
from onnxsplit.errors import ModelError
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.in_memory import ModelFile, runnable
from onnxsplit.npz import save_npz
from onnxsplit.plan import Level
from onnxsplit.session import quiet_environment
from onnxsplit.tensors import Array
from onnxsplit.timed_worker import InPlace


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
        alternatives: if given, nothing else is measured: of each group of ``.npz`` files with inputs, the shapes are
            observed with the first on which the model runs.
        scratch: an empty folder for the profiler's files. The parent removes it, even if it kills the profiler.
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
    alternatives: tuple[tuple[str, ...], ...] = ()
    scratch: str | None = None


class Seen(msgspec.Struct, frozen=True):
    """The shapes of all tensors in a run on the first of some inputs on which the model runs.

    Attributes:
        number: the number of these inputs; None if the model ran on none.
        sizes: the shapes by tensor.
        error: why the model did not run on the last inputs that were tried; empty if it ran.
    """

    number: int | None = None
    sizes: dict[str, tuple[int, ...]] = {}
    error: str = ""


class Profile(msgspec.Struct, frozen=True):
    """The answer of the profiling process.

    Attributes:
        op_ns: time of each op of the graph in nanoseconds, the lower quartile over the runs.
        sizes: shapes by tensor; at the level ``disabled`` only.
        types: types by tensor, for the untyped tensors that are tensors for ONNX Runtime.
        seen: the shapes for each group of alternatives.
        opaque: True if less than half of the time is in kernels of ops: a provider has compiled many ops into one.
        error: why there is no profile; None when there is one.
    """

    op_ns: list[int] = []
    sizes: dict[str, tuple[int, ...]] = {}
    types: dict[str, str] = {}
    seen: list[Seen] = []
    opaque: bool = False
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
    return _asked(
        source,
        ProfileRequest(
            str(source.path), str(inputs), threads, level, provider, seconds, untyped, _folder(source),
            tuple(custom_ops), in_place,
        ),
    )  # fmt: skip


def _folder(source: ModelFile) -> str | None:
    return None if source.data_folder is None else str(source.data_folder)


def _asked(source: ModelFile, request: ProfileRequest) -> Profile:
    """Run the profiling process."""
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "onnxsplit.cost.profiler"],
            input=msgspec.json.encode(msgspec.structs.replace(request, scratch=scratch)),
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
    (seen,) = shapes_of_runs(graph, [[inputs]], custom_ops=custom_ops)
    if seen.number is None:
        raise ModelError(f"profiling {graph.source.path}: {seen.error}")
    return seen.sizes


def shapes_of_runs(
    graph: OpGraph, groups: Sequence[Sequence[Mapping[str, Array]]], *, custom_ops: Sequence[Library] = ()
) -> list[Seen]:
    """The shapes of all tensors in unoptimised runs on the CPU; the model is loaded once.

    Args:
        graph: the model.
        groups: groups of inputs; of each group the first counts on which the model runs.
        custom_ops: libraries of custom ops that the session loads.

    Raises:
        ModelError: the model does not load, or the process died.
    """
    with (
        runnable(graph.source, as_in_stages=True) as source,
        tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder,
    ):
        files = []
        for number, group in enumerate(groups):
            files.append(tuple(str(Path(folder) / f"{number}-{place}.npz") for place in range(len(group))))
            for file, inputs in zip(files[-1], group, strict=True):
                save_npz(Path(file), inputs)
        request = ProfileRequest(
            str(source.path), "", 1, "disabled", "cpu", 0.0, (), _folder(source), tuple(custom_ops), (), tuple(files)
        )
        return _asked(source, request).seen
