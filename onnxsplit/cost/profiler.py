"""The profiling process: it reads a request from standard input and writes a profile to standard output."""

from __future__ import annotations

import bisect
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import onnx

from onnxsplit.cost.named_ops import named_op, renamed
from onnxsplit.cost.profile import Profile, ProfileRequest, Seen
from onnxsplit.effort import SLOW_S
from onnxsplit.errors import ModelError, in_one_line
from onnxsplit.model.external_data import point_from_one_folder
from onnxsplit.model.graph import OpGraph, build_graph
from onnxsplit.model.in_file import leave_weights_in_file
from onnxsplit.model.protobuf import graph_tensors
from onnxsplit.model.source import open_model
from onnxsplit.npz import load_npz
from onnxsplit.session import Session, open_session
from onnxsplit.timed import low_quartile

_KERNEL = "_kernel_time"
_MOST_RUNS = 200  # a longer profile would not show more
_INSERTED = re.compile(r"(_nchwc|_token_\d+|_\d+)$")


class _Arguments(msgspec.Struct):
    output_type_shape: list[dict[str, tuple[int, ...]]] = []


class _Event(msgspec.Struct):
    """The fields of an event of ONNX Runtime's profile that are needed; times in microseconds."""

    name: str
    ts: int
    dur: int = 0
    cat: str = ""
    args: _Arguments = msgspec.field(default_factory=_Arguments)


def profile(request: ProfileRequest) -> Profile:
    """Run the model under ONNX Runtime's profiler and attribute its events to ops.

    Raises:
        ModelError: the model does not load, or does not run on the inputs.
    """
    data_folder = None if request.data_folder is None else Path(request.data_folder)
    source = open_model(request.model, data_folder=data_folder, hashed=False)
    if data_folder is None and request.provider == "cpu":
        leave_weights_in_file(source.path, source.proto.graph.initializer)
    graph = build_graph(source)
    if request.alternatives:
        return Profile(seen=_seen(graph, request))
    given = load_npz(Path(request.inputs))
    with tempfile.TemporaryDirectory(dir=request.scratch) as folder:
        session = _session(graph, request, Path(folder))
        inputs = {name: given[name] for name, _ in session.inputs}
        into = {output: inputs[name] for output, name in request.in_place}
        began, count = time.monotonic(), 0
        while count < _enough(request.seconds, time.monotonic() - began, count):
            if into:
                session.run_into(inputs, into)
            else:
                session.run(inputs)
            count += 1
        events = _events(session)
    del session  # two at once would need twice the memory
    runs = _by_run(events)
    warm = runs[1:] or runs
    times = [_attributed(graph, run) for run in warm]
    return Profile(
        op_ns=[low_quartile(column) for column in zip(*times, strict=True)],
        sizes=_sizes(graph, runs[0]) if request.level == "disabled" else {},
        types=_types(graph, request) if request.untyped else {},
        opaque=_opaque(graph, warm[0]),
    )


def _enough(seconds: float, passed_s: float, count: int) -> int:
    """How many runs are enough, after some: one of a slow model, two of another, and all that fit into the time."""
    if not count or not seconds:
        return 1
    if passed_s < seconds:
        return _MOST_RUNS
    return 1 if passed_s / count > SLOW_S else 2


def _session(graph: OpGraph, request: ProfileRequest, folder: Path) -> Session:
    """A session that writes a profile into the folder."""
    model = renamed(graph)
    data_folder = point_from_one_folder(graph.source.place, graph_tensors(model.graph))
    return open_session(
        model.SerializeToString(),
        threads=request.threads,
        level=request.level,
        provider=request.provider,
        external_data_folder=data_folder,
        profile_prefix=folder / "profile",
        custom_ops=request.custom_ops,
    )


def _events(session: Session) -> list[_Event]:
    return msgspec.json.decode(session.end_profiling().read_bytes(), type=list[_Event])


def _seen(graph: OpGraph, request: ProfileRequest) -> list[Seen]:
    """The shapes in a run on the first inputs of each group on which the model runs.

    A run that fails leaves events that cannot be told from those of others, so a new session follows it.
    """
    seen = [Seen() for _ in request.alternatives]
    left = [(group, place) for group, files in enumerate(request.alternatives) for place in range(len(files))]
    while left:
        with tempfile.TemporaryDirectory(dir=request.scratch) as folder:
            session = _session(graph, request, Path(folder))
            ran: list[tuple[int, int]] = []
            while left:
                group, place = left.pop(0)
                if seen[group].number is not None or group in {done for done, _ in ran}:
                    continue
                given = load_npz(Path(request.alternatives[group][place]))
                try:
                    session.run({name: given[name] for name, _ in session.inputs})
                except ModelError as error:
                    seen[group] = Seen(error=in_one_line(error))
                    break
                ran.append((group, place))
            for (group, place), run in zip(ran, _by_run(_events(session)), strict=False):
                seen[group] = Seen(place, _sizes(graph, run))
            del session
    return seen


def _types(graph: OpGraph, request: ProfileRequest) -> dict[str, str]:
    """Types of tensors as ONNX Runtime infers them: the tensors become outputs of a session; nothing is run."""
    model = renamed(graph)
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in request.untyped if name not in outputs)
    data_folder = point_from_one_folder(graph.source.place, graph_tensors(model.graph))
    session = open_session(
        model.SerializeToString(),
        threads=1,
        level="disabled",
        provider=request.provider,
        external_data_folder=data_folder,
        custom_ops=request.custom_ops,
    )
    return {name: kind for name, kind in session.outputs if kind is not None and name in request.untyped}


def _by_run(events: list[_Event]) -> list[list[_Event]]:
    """The kernel events of each run in order of time.

    Events of ops inside a body are left out: they lie within the event of the op that holds the body.
    """
    ends = sorted(event.ts + event.dur for event in events if event.name == "model_run")
    runs: list[list[_Event]] = [[] for _ in ends]
    kernels = [event for event in events if event.cat == "Node" and event.name.endswith(_KERNEL)]
    covered = 0
    for event in sorted(kernels, key=lambda event: (event.ts, -event.dur)):
        if event.ts + event.dur <= covered and event.ts < covered:
            continue
        covered = event.ts + event.dur
        run = bisect.bisect_left(ends, covered)
        if run < len(runs):
            runs[run].append(event)
    return runs


def _attributed(graph: OpGraph, events: Iterable[_Event]) -> list[int]:
    """Time of every op in one run, in nanoseconds. Ops that the optimiser inserted count for the next known kernel."""
    times = [0] * len(graph.ops)
    unknown, last = 0, 0
    for event in events:
        op = _op_of(graph, event.name.removesuffix(_KERNEL))
        if op is None:
            unknown += event.dur * 1000
        else:
            times[op] += event.dur * 1000 + unknown
            unknown, last = 0, op
    times[last] += unknown
    return times


def _opaque(graph: OpGraph, events: Iterable[_Event]) -> bool:
    """Whether less than half of the time of a run is in kernels whose op is known."""
    known = [(event.dur, _op_of(graph, event.name.removesuffix(_KERNEL)) is not None) for event in events]
    return sum(time for time, is_known in known if is_known) * 2 < sum(time for time, _ in known)


def _op_of(graph: OpGraph, name: str) -> int | None:
    """The op of a kernel by its name, or by the tensor that it writes; None when it is not known."""
    op = named_op(name)
    if op is not None:
        return op
    while name not in graph.producer:
        shorter = _INSERTED.sub("", name, count=1)
        if shorter == name:
            return None
        name = shorter
    return graph.producer[name]


def _sizes(graph: OpGraph, events: Iterable[_Event]) -> dict[str, tuple[int, ...]]:
    """The shapes that one run showed. The types beside them are not used: they are the kernels', not the model's."""
    sizes: dict[str, tuple[int, ...]] = {}
    for event in events:
        op = named_op(event.name)
        if op is None:
            continue
        outputs = graph.ops[op].outputs
        if len(outputs) == len(event.args.output_type_shape):
            for name, value in zip(outputs, event.args.output_type_shape, strict=True):
                for shape in value.values():
                    sizes[name] = shape
    return sizes


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # other output must not mix with the answer
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=ProfileRequest)
    try:
        answer = profile(request)
    except Exception as error:  # such as no space or no memory left; the parent reports it in one line
        answer = Profile(error=in_one_line(error))
    answers.write(msgspec.json.encode(answer))
    answers.flush()


if __name__ == "__main__":
    _main()
