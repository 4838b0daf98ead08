"""The code that all benchmarks share: command line, measuring in turns, and output.

A benchmark is a file in a folder beside this one. Its docstring begins with the question that it answers, in one
line. ``TAKES`` says about how long it takes on two cores; `python benchmarks` lists every file that has it.

    sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

    from benchmarks import harness

    TAKES = "5 min"

With the line that sets the path, a benchmark can be started as a file. Importing this module also lets the processes
that a benchmark starts import this checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))

from onnxsplit.npz import load_npz
from onnxsplit.plan_files import example_file, load_plan
from onnxsplit.session import host_cores
from runtime import Pipeline

Case = TypeVar("Case", bound=tuple[Any, ...])
Result = TypeVar("Result")

_CGROUP_1, _PERIOD_US = Path("/sys/fs/cgroup/cpu"), 20_000

# The command line


def parser(doc: str | None, takes: str) -> argparse.ArgumentParser:
    """Make a command line with ``--json``, whose help has the benchmark's question and duration.

    It also makes SIGTERM raise SystemExit, so that the processes of the benchmark are ended.

    Args:
        doc: the docstring of the benchmark.
        takes: its ``TAKES``.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    question, _, details = (doc or "").strip().partition("\n")
    made = argparse.ArgumentParser(
        description=f"{question}\n\nTakes about {takes} on two cores.",
        epilog=details.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--json", action="store_true", help="print a line of JSON for each row, after one for the machine"
    )
    return made


# Output


def environment() -> dict[str, str]:
    """Return the processor, its cores, and the versions of the main packages."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    versions = {"processor": model, "cores": str(host_cores()), "python": platform.python_version()}
    for package in ("onnxsplit", "onnxruntime", "onnx", "pyzmq", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def environment_line() -> str:
    """Return the environment in one line."""
    return ", ".join(f"{name} {value}" for name, value in environment().items())


def command() -> str:
    """Return the command that repeats this benchmark from the root of the checkout."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
    return shlex.join(["python", str(name), *sys.argv[1:]])


class Report:
    """Prints each row when it is measured: as a table, or with ``--json`` a line of JSON for each row.

    The machine and the command are printed first.

    Args:
        given: the parsed command line.
        columns: the format of each column by the name of its figure, as in ``per_s="8.1f"``. The number in a format
            is the least width of the column. Without columns, each row brings its own text.
    """

    def __init__(self, given: argparse.Namespace, **columns: str) -> None:
        self._json, self._columns = given.json, columns
        self._headed = False
        if self._json:
            print(json.dumps({"environment": environment(), "command": command()}), flush=True)
        else:
            print(f"{environment_line()}\n{command()}\n", flush=True)

    def row(self, figures: Mapping[str, Any], text: str | None = None) -> None:
        """Print one row: as ``text`` if that is given, else as a line of the table."""
        if self._json:
            print(json.dumps(figures), flush=True)
            return
        if text is None:
            self._head()
            text = self._line(_cell(figures.get(name), form) for name, form in self._columns.items())
        print(text, flush=True)

    def figures(self, figures: Mapping[str, Any]) -> None:
        """Print the only result of a benchmark, one figure per line."""
        width = max(map(len, figures))
        self.row(figures, "\n".join(f"{name:{width}} {_shown(value)}" for name, value in figures.items()))

    def note(self, text: str) -> None:
        """Print a remark, unless the output is JSON."""
        print(text, file=sys.stderr if self._json else sys.stdout, flush=True)

    def _head(self) -> None:
        if not self._headed:
            self._headed = True
            print(self._line(name.replace("_", " ").rjust(_width(form)) for name, form in self._columns.items()))
            print(self._line("-" * max(3, len(name), _width(form)) for name, form in self._columns.items()))

    @staticmethod
    def _line(cells: Iterator[str]) -> str:
        return f"| {' | '.join(cells)} |"


def _width(form: str) -> int:
    digits = re.match(r"[<>^]?(\d*)", form)
    return int(digits[1]) if digits is not None and digits[1] else 0


def _cell(value: Any, form: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return format(value, form)
    return str("-" if value is None else value).ljust(_width(form))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(one)}" for name, one in value.items()) or "none"
    return str(value)


# Unattended work


class Attempts:
    """Does work for one case after another, unattended. A case that fails is reported, and the next one follows.

    Progress goes to standard error.

    Args:
        minutes: no case is begun later than this.

    Attributes:
        failed: the names of cases that failed, with the reasons.
        left: the name of the case at which the time was up; None if there was time for all.
    """

    def __init__(self, minutes: float) -> None:
        self.failed: list[str] = []
        self.left: str | None = None
        self._begun, self._end = time.monotonic(), time.monotonic() + 60 * minutes
        self._done = 0

    def __call__(self, *sources: Iterator[Case], work: Callable[[Case], Result]) -> Iterator[Result]:
        """Yield the result of each case; a case is a tuple that begins with its name."""
        for source in sources:
            while self.left is None:
                try:
                    case = next(source)
                except StopIteration:
                    break
                except Exception as error:  # the rest of this source is lost, the next one is not
                    self._failure("a model could not be made", error)
                    break
                if time.monotonic() > self._end:
                    self.left = case[0]
                    break
                self._say(case[0])
                try:
                    yield work(case)
                    self._done += 1
                except Exception as error:
                    self._failure(case[0], error)

    def summary(self) -> str:
        """Return how many cases were done, and which were not."""
        parts = [f"{self._done} done in {(time.monotonic() - self._begun) / 60:.1f} minutes"]
        parts += [f"failed: {line}" for line in self.failed]
        parts += [] if self.left is None else [f"the time was up before {self.left} and those after it"]
        return "; ".join(parts)

    def _failure(self, name: str, error: Exception) -> None:
        self.failed.append(f"{name} ({type(error).__name__}: {error})")
        self._say(f"{self.failed[-1]} failed")

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begun:4.0f} s] {text}", file=sys.stderr, flush=True)


# Measuring


def example_path(plan: Path) -> Path:
    """Return the file of a plan folder's example inputs."""
    return example_file(plan, load_plan(plan))


def example(plan: Path) -> dict[str, Any]:
    """Return the example inputs of a plan folder."""
    return load_npz(example_path(plan))


def rate(pipeline: Pipeline, inputs: Mapping[str, Any], seconds: float) -> float:
    """Measure the requests per second with as many in flight as the pipeline admits."""
    futures, begun = [], time.perf_counter()
    while time.perf_counter() < begun + seconds or len(futures) < 3 * pipeline.inflight:
        futures.append(pipeline.submit(inputs))
    for future in futures:
        future.result()
    return len(futures) / (time.perf_counter() - begun)


def latency_ms(pipeline: Pipeline, inputs: Mapping[str, Any], seconds: float) -> float:
    """Measure the median time of a request in milliseconds, with one request at a time."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        begun = time.perf_counter()
        pipeline.run(inputs)
        times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times)


def in_turns(contenders: Mapping[str, Callable[[], Result]], slices: int) -> dict[str, list[Result]]:
    """Measure each contender slice by slice, in turns.

    A first slice warms up and is not counted. Every other slice runs in reverse order, so that no contender always
    follows the same one.
    """
    results: dict[str, list[Result]] = {name: [] for name in contenders}
    for number in range(slices + 1):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            result = contenders[name]()
            if number:
                results[name].append(result)
    return results


@dataclass(frozen=True)
class Ratio:
    """The median of ratios, and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def ratio(values: Sequence[float], others: Sequence[float]) -> Ratio:
    """Divide values by others slice by slice; the interval is by bootstrap."""
    ratios = [value / other for value, other in zip(values, others, strict=True)]
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(2000))
    return Ratio(statistics.median(ratios), medians[50], medians[1950])


def right(outputs: Mapping[str, Any], wanted: Mapping[str, Any], tolerance: float = 1e-4) -> bool:
    """Return whether all outputs differ from the reference by at most a share of its largest value."""
    import numpy as np

    return all(np.abs(outputs[name] - array).max() <= tolerance * np.abs(array).max() for name, array in wanted.items())


# Processes


class CpuGroup:
    """A group of processes that the kernel limits together (cgroup v1 or v2). Made by :func:`cpu_group`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def limit(self, share: float) -> None:
        """Limit the processes to a share of one core, which they have together."""
        quota = round(share * _PERIOD_US)
        if _CGROUP_1.is_dir():
            (self._folder / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (self._folder / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (self._folder / "cpu.max").write_text(f"{quota} {_PERIOD_US}")

    def add(self, pid: int) -> None:
        """Put a process into the group. Those that it starts from now on are in it too."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    @property
    def pids(self) -> list[int]:
        """The processes of the group."""
        return [int(line) for line in (self._folder / "cgroup.procs").read_text().split()]


@contextmanager
def cpu_group(name: str, share: float) -> Iterator[CpuGroup]:
    """Make a group of processes that are limited to a share of one core; needs root. Its last processes leave it."""
    parent = _CGROUP_1 if _CGROUP_1.is_dir() else Path("/sys/fs/cgroup")
    folder = parent / f"onnxsplit-{os.getpid()}-{name}"
    folder.mkdir()
    group = CpuGroup(folder)
    try:
        group.limit(share)
        yield group
    finally:
        for member in group.pids:
            (parent / "cgroup.procs").write_text(str(member))
        folder.rmdir()


@contextmanager
def held(pid: int, share: float) -> Iterator[None]:
    """Limit a process to a share of one core, as :func:`cpu_group` does."""
    with cpu_group(str(pid), share) as group:
        group.add(pid)
        yield


def ended(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Close the standard input of a process that then ends, and reap it; kill it if it takes too long."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
