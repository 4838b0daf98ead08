"""Timed runs of a model file in a worker process.

A :class:`TimedModel` loads one file with an explicit number of threads and optimisation level, and runs it on command.
Several workers can run over the same time span; that is how stages that will share a host are measured. The worker is
this module itself. It reads one JSON command from each line of its standard input and answers each with one line. It
ends when its standard input ends, so it does not outlive its parent.

A worker measures wall time and its own processor time. Processor time does not count the time in which other processes
had the core, so it is the cost of a run in one thread even on a busy machine. Of a run in several threads the calling
thread does an equal part, and its processor time stands for the wall time while others have the cores.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import msgspec.structs

from onnxsplit.custom_ops import Library
from onnxsplit.errors import CustomOpsError, InputError, ModelError, ModelRefused, in_one_line
from onnxsplit.npz import load_npz, save_npz
from onnxsplit.plan import Level
from onnxsplit.providers import threads_on_cores
from onnxsplit.session import Session, open_session, quiet_environment
from onnxsplit.tensors import Array

_TYPICAL_S = 1.0  # total time of the runs whose median is taken
_UNDISTURBED = 0.05  # the share of a run's time in which its threads may wait before that counts
_START_DELAY_NS = 20_000_000  # time between the command to start together and the start


InPlace = tuple[tuple[str, str], ...]
"""Pairs of an output and an input of the same type and shape: the output is written where the input lies."""


class _Load(msgspec.Struct, tag="load", frozen=True):
    model: str
    inputs: str
    threads: int
    level: Level
    provider: str
    spinning: bool
    data_folder: str | None
    custom_ops: tuple[Library, ...]
    in_place: InPlace


class _Feed(msgspec.Struct, tag="feed", frozen=True):
    inputs: str


class _Run(msgspec.Struct, tag="run", frozen=True):
    seconds: float
    start_at_ns: int
    least: int


class _Save(msgspec.Struct, tag="save", frozen=True):
    outputs: str


class _Answer(msgspec.Struct, frozen=True):
    error: str | None = None
    refused: bool = False
    wall_ns: list[int] = []
    cpu_ns: list[int] = []
    caller_ns: list[int] = []
    waited: int = 0
    delayed_ns: int = 0

    @property
    def waits(self) -> bool:
        """Whether the runs wait for something else than a core: in each of them, and for a share of their time.

        A long run also waits now and then for an instant, such as for a page of memory.
        """
        waited_ns = sum(self.wall_ns) - sum(self.cpu_ns) - self.delayed_ns
        return self.waited >= len(self.wall_ns) and waited_ns > _UNDISTURBED * sum(self.wall_ns)


_Command = _Load | _Feed | _Run | _Save


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
    """

    wall_ns: Sequence[int]
    cpu_ns: Sequence[int]
    by_cpu: bool
    shared_ns: Sequence[int] = ()

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
        self._load = _Load(
            str(model), str(inputs), threads, level, provider, spinning, folder, tuple(custom_ops), in_place
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None

    def __enter__(self) -> TimedModel:
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "onnxsplit.timed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=quiet_environment(),
        )
        try:
            self._ask(self._load)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._stderr):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()
            self._process = None

    def reload(self, level: Level) -> None:
        """Load the model again at another optimisation level."""
        self._ask(msgspec.structs.replace(self._load, level=level))

    def feed(self, inputs: Path) -> None:
        """Use other inputs for the following runs."""
        self._ask(_Feed(str(inputs)))

    def run(self, seconds: float, *, least: int = 1) -> Runs:
        """Run for about ``seconds`` and at least ``least`` times."""
        return self._runs(self._ask(_Run(seconds, 0, least)))

    def _runs(self, answer: _Answer) -> Runs:
        threads = threads_on_cores(self._load.provider, self._load.threads)
        by_cpu = threads == 1 and not answer.waits
        if threads <= 1 or answer.delayed_ns <= _UNDISTURBED * sum(answer.wall_ns):
            return Runs(answer.wall_ns, answer.cpu_ns, by_cpu)
        pairs = zip(answer.caller_ns, answer.cpu_ns, strict=True)
        return Runs(answer.wall_ns, answer.cpu_ns, by_cpu, [max(own, total // threads) for own, total in pairs])

    def save_outputs(self, path: Path) -> None:
        """Write the outputs of the last run to an ``.npz`` file."""
        self._ask(_Save(str(path)))

    def _ask(self, command: _Command) -> _Answer:
        self._send(command)
        return self._receive()

    def _send(self, command: _Command) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # receiving the answer reports how the worker died
            self._process.stdin.write(msgspec.json.encode(command) + b"\n")
            self._process.stdin.flush()

    def _receive(self) -> _Answer:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line and self._load.custom_ops:
            files = ", ".join(library.path for library in self._load.custom_ops)
            raise CustomOpsError(f"running {self._load.model} with the custom op libraries {files}: {self._death()}")
        if not line:
            raise ModelError(f"running {self._load.model}: {self._death()}")
        answer = msgspec.json.decode(line, type=_Answer)
        if answer.error is not None:
            raise (ModelRefused if answer.refused else ModelError)(f"running {self._load.model}: {answer.error}")
        return answer

    def _death(self) -> str:
        assert self._process is not None
        assert self._stderr is not None
        code = self._process.wait()
        self._stderr.seek(0)
        tail = self._stderr.read()[-500:].decode(errors="replace").strip()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the process {how}" + (f": {tail}" if tail else "")


def run_together(models: Sequence[TimedModel], seconds: float, *, least: int = 2) -> list[Runs]:
    """Run all models over the same time span; return the runs of each."""
    start = time.monotonic_ns() + _START_DELAY_NS
    for model in models:
        model._send(_Run(seconds, start, least))
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


class _Worker:
    """The worker: it performs one command after another."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.inputs: dict[str, Array] = {}
        self.in_place: InPlace = ()
        self.outputs: dict[str, Array] = {}

    def perform(self, command: _Command) -> _Answer:
        match command:
            case _Load():
                self.session = None  # two at once would need twice the memory
                self.in_place = command.in_place
                folder = None if command.data_folder is None else Path(command.data_folder)
                self.session = open_session(
                    Path(command.model) if folder is None else Path(command.model).read_bytes(),
                    threads=command.threads,
                    level=command.level,
                    provider=command.provider,
                    spinning=command.spinning,
                    external_data_folder=folder,
                    custom_ops=command.custom_ops,
                )
                self._feed(command.inputs)
            case _Feed():
                self._feed(command.inputs)
            case _Run():
                return self._run(command)
            case _Save():
                save_npz(Path(command.outputs), self.outputs)
        return _Answer()

    def _feed(self, path: str) -> None:
        assert self.session is not None
        given = load_npz(Path(path))
        missing = [name for name, _ in self.session.inputs if name not in given]
        if missing:
            raise InputError(f"{path} lacks the inputs {', '.join(missing)}")
        self.inputs = {name: given[name] for name, _ in self.session.inputs}

    def _run(self, command: _Run) -> _Answer:
        assert self.session is not None
        if command.start_at_ns:
            while time.monotonic_ns() < command.start_at_ns:
                pass
        into = {output: self.inputs[name] for output, name in self.in_place}
        wall_ns: list[int] = []
        cpu_ns: list[int] = []
        caller_ns: list[int] = []
        delayed_ns = _delayed_ns()
        waits = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        end = time.monotonic_ns() + int(command.seconds * 1e9)
        while len(wall_ns) < command.least or time.monotonic_ns() < end:
            begin, cpu, own = time.perf_counter_ns(), time.process_time_ns(), time.thread_time_ns()
            self.outputs = dict(self.session.run_into(self.inputs, into) if into else self.session.run(self.inputs))
            caller_ns.append(time.thread_time_ns() - own)
            cpu_ns.append(time.process_time_ns() - cpu)
            wall_ns.append(time.perf_counter_ns() - begin)
        waited = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - waits
        delayed_ns = _delayed_ns() - delayed_ns
        return _Answer(wall_ns=wall_ns, cpu_ns=cpu_ns, caller_ns=caller_ns, waited=waited, delayed_ns=delayed_ns)


def _delayed_ns() -> int:
    """How long this process's threads were ready to run and waited for a core; 0 where the system does not tell."""
    try:
        return sum(int(file.read_text().split()[1]) for file in Path("/proc/self/task").glob("*/schedstat"))
    except (OSError, ValueError, IndexError):
        return 0


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # other output must not mix with the answers
    worker = _Worker()
    for line in sys.stdin.buffer:
        try:
            answer = worker.perform(msgspec.json.decode(line, type=_Command))
        except Exception as error:  # such as no space or no memory left; the parent reports it in one line
            answer = _Answer(error=in_one_line(error), refused=isinstance(error, ModelRefused))
        answers.write(msgspec.json.encode(answer) + b"\n")
        answers.flush()


if __name__ == "__main__":
    _main()
