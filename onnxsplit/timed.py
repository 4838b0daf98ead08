"""Timed runs of a model file in a worker process.

A :class:`TimedModel` loads one file with an explicit number of threads and optimisation level, and runs it on command.
Several workers can run over the same time span; that is how stages that will share a host are measured.

A worker measures wall time and its own processor time. Processor time does not count the time in which other processes
had the core, so it is the cost of a run in one thread even on a busy machine. Of a run in several threads the calling
thread does an equal part, and its processor time stands for the wall time while others have the cores.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec
import msgspec.structs

from onnxsplit.custom_ops import Library
from onnxsplit.errors import CustomOpsError, ModelError, ModelRefused
from onnxsplit.plan import Level
from onnxsplit.providers import threads_on_cores
from onnxsplit.session import quiet_environment
from onnxsplit.timed_worker import (
    UNDISTURBED,
    FeedModel,
    InPlace,
    LoadModel,
    RunModel,
    SaveOutputs,
    UnloadModel,
    WorkerAnswer,
    WorkerCommand,
)

_TYPICAL_S = 1.0  # total time of the runs whose median is taken
_START_DELAY_NS = 5_000_000  # time between the command to start together and the start


@dataclass(frozen=True)
class Runs:
    """Times of runs of a model, in the order of the runs.

    Attributes:
        wall_ns: wall time of each run in nanoseconds.
        cpu_ns: processor time of the worker in each run, over all its threads, in nanoseconds.
        by_cpu: True when processor time is what a run costs: a session with one thread on the CPU that did not wait.
        shared_ns: if several threads on the CPU share a run while other processes keep them from the cores, the time of
            each run without these: the processor time of the calling thread, and at least an equal share of all
            threads'; else empty.
        used_ns: processor time of the worker for these runs and around them, in nanoseconds.
    """

    wall_ns: Sequence[int]
    cpu_ns: Sequence[int]
    by_cpu: bool
    shared_ns: Sequence[int] = ()
    used_ns: int = 0

    @property
    def costs_ns(self) -> Sequence[int]:
        """What each run costs, in nanoseconds: processor time where that is the cost, else wall time."""
        return self.cpu_ns if self.by_cpu else self.wall_ns

    @property
    def cost_ns(self) -> int:
        """The cost of an undisturbed run in nanoseconds: the lower quartile of processor times.

        Of wall times it is the shortest in twenty, because other processes only add to them.
        """
        if self.by_cpu:
            return low_quartile(self.cpu_ns)
        shortest = sorted(self.wall_ns)[(len(self.wall_ns) - 1) // 20]
        return min(shortest, low_quartile(self.shared_ns)) if self.shared_ns else shortest


class TimedModel:
    """A model file in a worker process; a context manager.

    Args:
        model: the model file.
        inputs: an ``.npz`` with the model's inputs; further tensors in it are ignored.
        threads: threads of the session.
        level: graph optimisation level.
        provider: execution provider.
        spinning: True lets idle threads spin, for a session that has the host to itself.
        data_folder: the folder of the model's external data; beside the file when None.
        custom_ops: libraries of custom ops that the session loads.
        in_place: pairs of an output and the input in whose memory it is written.

    Raises:
        ModelRefused: on entry, ONNX Runtime does not load the model.
        ModelError: the model does not run, an input is missing, or the worker died.
        CustomOpsError: the worker died with libraries of custom ops loaded.
    """

    def __init__(
        self,
        model: Path,
        inputs: Path,
        *,
        threads: int,
        level: Level = "all",
        provider: str = "cpu",
        spinning: bool = False,
        data_folder: Path | None = None,
        custom_ops: Sequence[Library] = (),
        in_place: InPlace = (),
    ) -> None:
        folder = None if data_folder is None else str(data_folder)
        self._load = LoadModel(
            str(model), str(inputs), threads, level, provider, spinning, folder, tuple(custom_ops), in_place
        )
        self._worker: _WorkerProcess | None = None

    def __enter__(self) -> TimedModel:
        idle = _idle_workers.get()
        self._worker = idle.pop() if idle else _WorkerProcess()
        try:
            self._ask(self._load)
        except BaseException:
            self._end(reusable=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(reusable=kind is None and self._load.provider == "cpu" and not self._load.custom_ops)

    def _end(self, *, reusable: bool) -> None:
        if self._worker is None:
            return
        idle = _idle_workers.get()
        if idle is not None and reusable:
            try:
                self._ask(UnloadModel())
            except (ModelError, CustomOpsError):
                self._worker.end()
            else:
                idle.append(self._worker)
        else:
            self._worker.end()
        self._worker = None

    def reload(self, level: Level) -> None:
        """Load the model again at another optimisation level."""
        self._ask(msgspec.structs.replace(self._load, level=level))

    def feed(self, inputs: Path) -> None:
        """Use other inputs for the following runs."""
        self._ask(FeedModel(str(inputs)))

    def run(self, seconds: float, *, least: int = 1) -> Runs:
        """Run for about ``seconds`` and at least ``least`` times."""
        return self._runs(self._ask(RunModel(seconds, 0, least)))

    def _runs(self, answer: WorkerAnswer) -> Runs:
        threads = threads_on_cores(self._load.provider, self._load.threads)
        by_cpu = threads == 1 and not answer.waits
        shared_ns: list[int] = []
        if threads > 1 and answer.delayed_ns > UNDISTURBED * sum(answer.wall_ns):
            pairs = zip(answer.caller_ns, answer.cpu_ns, strict=True)
            shared_ns = [max(own, total // threads) for own, total in pairs]
        return Runs(answer.wall_ns, answer.cpu_ns, by_cpu, shared_ns, answer.used_ns)

    def save_outputs(self, path: Path) -> None:
        """Write the outputs of the last run to an ``.npz`` file."""
        self._ask(SaveOutputs(str(path)))

    def _ask(self, command: WorkerCommand) -> WorkerAnswer:
        self._send(command)
        return self._receive()

    def _send(self, command: WorkerCommand) -> None:
        assert self._worker is not None
        self._worker.send(command)

    def _receive(self) -> WorkerAnswer:
        worker, running = self._worker, f"running {self._load.model}"
        assert worker is not None
        answer = worker.receive()
        if answer is None and self._load.custom_ops:
            files = ", ".join(library.path for library in self._load.custom_ops)
            raise CustomOpsError(f"{running} with the custom op libraries {files}: {worker.death()}")
        if answer is None:
            raise ModelError(f"{running}: {worker.death()}")
        if answer.error is not None:
            raise (ModelRefused if answer.refused else ModelError)(f"{running}: {answer.error}")
        return answer


class _WorkerProcess:
    """A process that runs one model after another."""

    def __init__(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "onnxsplit.timed_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=quiet_environment(),
        )

    def send(self, command: WorkerCommand) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # receiving the answer reports how the worker died
            self._process.stdin.write(msgspec.json.encode(command) + b"\n")
            self._process.stdin.flush()

    def receive(self) -> WorkerAnswer | None:
        """The answer to the first command that has none; None if the process died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return msgspec.json.decode(line, type=WorkerAnswer) if line else None

    def death(self) -> str:
        """How the process died, and the end of what it said."""
        code = self._process.wait()
        self._stderr.seek(0)
        tail = self._stderr.read()[-500:].decode(errors="replace").strip()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the process {how}" + (f": {tail}" if tail else "")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


_idle_workers: ContextVar[list[_WorkerProcess] | None] = ContextVar("idle workers", default=None)


@contextmanager
def reused_workers() -> Iterator[None]:
    """Let the models that are timed in this block use the same processes one after the other.

    A process with libraries of custom ops, or with another provider than the CPU, takes no second model.
    """
    if _idle_workers.get() is not None:
        yield
        return
    idle: list[_WorkerProcess] = []
    token = _idle_workers.set(idle)
    try:
        yield
    finally:
        _idle_workers.reset(token)
        for worker in idle:
            worker.end()


def run_together(models: Sequence[TimedModel], seconds: float, *, least: int = 2) -> list[Runs]:
    """Run all models over the same time span; return the runs of each."""
    start = time.monotonic_ns() + _START_DELAY_NS
    for model in models:
        model._send(RunModel(seconds, start, least))
    return [model._runs(model._receive()) for model in models]


def typical_ns(model: Path, inputs: Path, *, threads: int, provider: str, custom_ops: Sequence[Library] = ()) -> int:
    """Typical cost of one run of a whole model on this host, over one second after a warm-up, in nanoseconds.

    Raises:
        ModelError: the model does not run, or its provider cannot be used.
    """
    with TimedModel(model, inputs, threads=threads, level="all", provider=provider, custom_ops=custom_ops) as timed:
        timed.run(_TYPICAL_S / 4)
        return timed.run(_TYPICAL_S, least=3).cost_ns


def low_quartile(times: Sequence[int]) -> int:
    """The lower quartile of times: of n sorted times the one at position (n - 1) // 4."""
    return sorted(times)[(len(times) - 1) // 4]
