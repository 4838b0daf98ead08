"""The worker process of a :class:`~onnxsplit.timed.TimedModel`, and the commands that it takes.

It reads one JSON command from each line of its standard input and answers each with one line. It ends when its standard
input ends, so it does not outlive its parent.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path

import msgspec
import msgspec.structs

from onnxsplit.custom_ops import Library
from onnxsplit.errors import InputError, ModelRefused, in_one_line
from onnxsplit.npz import load_npz, save_npz
from onnxsplit.plan import Level
from onnxsplit.session import Session, open_session
from onnxsplit.tensors import Array

UNDISTURBED = 0.05
"""The share of a run's time in which its threads may wait before that counts."""

_SPIN_NS = 1_000_000  # the last part of the wait for a common start

InPlace = tuple[tuple[str, str], ...]
"""Pairs of an output and an input of the same type and shape: the output is written where the input lies."""


class LoadModel(msgspec.Struct, tag="load", frozen=True):
    """Load a model, in the place of the one before; the attributes are those of a timed model."""

    model: str
    inputs: str
    threads: int
    level: Level
    provider: str
    spinning: bool
    data_folder: str | None
    custom_ops: tuple[Library, ...]
    in_place: InPlace


class FeedModel(msgspec.Struct, tag="feed", frozen=True):
    """Use the inputs of this ``.npz`` file."""

    inputs: str


class RunModel(msgspec.Struct, tag="run", frozen=True):
    """Run the model for some seconds and at least some times, from a time of the monotonic clock on; 0 is now."""

    seconds: float
    start_at_ns: int
    least: int


class SaveOutputs(msgspec.Struct, tag="save", frozen=True):
    """Write the outputs of the last run to this ``.npz`` file."""

    outputs: str


class UnloadModel(msgspec.Struct, tag="unload", frozen=True):
    """Drop the model and its tensors."""


class WorkerAnswer(msgspec.Struct, frozen=True):
    """What a command gave.

    Attributes:
        error: why it failed; None if it did not.
        refused: whether ONNX Runtime did not load the model.
        wall_ns: wall time of each run in nanoseconds.
        cpu_ns: processor time of each run over all threads, in nanoseconds.
        caller_ns: processor time of the calling thread in each run, in nanoseconds.
        waited: how often the process waited during the runs.
        delayed_ns: how long threads were ready during the runs and waited for a core, in nanoseconds.
        used_ns: processor time of the process since its last answer, in nanoseconds.
    """

    error: str | None = None
    refused: bool = False
    wall_ns: list[int] = []
    cpu_ns: list[int] = []
    caller_ns: list[int] = []
    waited: int = 0
    delayed_ns: int = 0
    used_ns: int = 0

    @property
    def waits(self) -> bool:
        """Whether the runs wait for something else than a core: in each of them, and for a share of their time.

        A long run also waits now and then for an instant, such as for a page of memory.
        """
        waited_ns = sum(self.wall_ns) - sum(self.cpu_ns) - self.delayed_ns
        return self.waited >= len(self.wall_ns) and waited_ns > UNDISTURBED * sum(self.wall_ns)


WorkerCommand = LoadModel | FeedModel | RunModel | SaveOutputs | UnloadModel


class _Worker:
    """The worker: it performs one command after another."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.inputs: dict[str, Array] = {}
        self.in_place: InPlace = ()
        self.outputs: dict[str, Array] = {}

    def perform(self, command: WorkerCommand) -> WorkerAnswer:
        match command:
            case LoadModel():
                self._drop()  # two at once would need twice the memory
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
            case FeedModel():
                self._feed(command.inputs)
            case RunModel():
                return self._run(command)
            case SaveOutputs():
                save_npz(Path(command.outputs), self.outputs)
            case UnloadModel():
                self._drop()
        return WorkerAnswer()

    def _drop(self) -> None:
        self.session, self.inputs, self.outputs = None, {}, {}

    def _feed(self, path: str) -> None:
        assert self.session is not None
        given = load_npz(Path(path))
        missing = [name for name, _ in self.session.inputs if name not in given]
        if missing:
            raise InputError(f"{path} lacks the inputs {', '.join(missing)}")
        self.inputs = {name: given[name] for name, _ in self.session.inputs}

    def _run(self, command: RunModel) -> WorkerAnswer:
        assert self.session is not None
        if command.start_at_ns:
            time.sleep(max(0, command.start_at_ns - time.monotonic_ns() - _SPIN_NS) / 1e9)
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
        return WorkerAnswer(wall_ns=wall_ns, cpu_ns=cpu_ns, caller_ns=caller_ns, waited=waited, delayed_ns=delayed_ns)


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
    worker, used_ns = _Worker(), 0
    for line in sys.stdin.buffer:
        try:
            answer = worker.perform(msgspec.json.decode(line, type=WorkerCommand))
        except Exception as error:  # such as no space or no memory left; the parent reports it in one line
            answer = WorkerAnswer(error=in_one_line(error), refused=isinstance(error, ModelRefused))
        before_ns, used_ns = used_ns, time.process_time_ns()
        answers.write(msgspec.json.encode(msgspec.structs.replace(answer, used_ns=used_ns - before_ns)) + b"\n")
        answers.flush()


if __name__ == "__main__":
    _main()
