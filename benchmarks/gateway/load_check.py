"""Does ``onnxsplit load`` measure the same as tritonclient's own loop, and as the server counts?

A net of some milliseconds runs in one stage of one thread behind the gateway. As many requests are kept in flight by
threads that each call ``infer`` of tritonclient, and by ``load``, over HTTP and gRPC.

turns    one after the other, in turns of a few seconds; ratios are of neighbouring turns. Within each turn the server's
         counter of answers is read twice, which gives its own rate.
at-once  both at the same time, each in a process of its own, so that a busy machine disturbs both alike. The server
         answers in order, so both must see the same rate and the same latencies.
cost     processor time that one request takes in the process of the generator, against a net that does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np
from onnx import helper
from served import Served

from benchmarks import harness
from benchmarks.example_models import products, saved
from onnxsplit.planning.planner import partition
from runtime.load.endpoint import Asked, server_endpoint
from runtime.load.grpc import GrpcTarget
from runtime.load.http import HttpTarget
from runtime.load.loop import measure
from runtime.load.patterns import ClosedLoop, OpenLoop
from runtime.load.target import LoadTarget
from runtime.load.windows import Measuring

TAKES = "8 min"

WARMUP_S = 0.5
PARTS = ("turns", "at-once", "cost")
PERCENTILES = (50, 90, 95, 99)


@dataclass
class Turn:
    """What one turn has measured: answers per second, percentiles in ms, and the server's own rate if it was read."""

    per_s: float
    percentiles_ms: list[float]
    server_per_s: float | None


def answers(server: Served, model: str) -> int:
    """Return how many requests the server has answered."""
    return server.json(f"/v2/models/{model}/stats")["model_stats"][0]["inference_stats"]["success"]["count"]


def counted(server: Served, model: str, seconds: float, work: Callable[[], object]) -> tuple[object, float]:
    """Do some work, and return its result with the server's rate between the warm-up and the end."""
    rates: list[float] = []

    def watch() -> None:
        time.sleep(WARMUP_S)
        begun, before = time.perf_counter(), answers(server, model)
        time.sleep(seconds)
        ended, after = time.perf_counter(), answers(server, model)
        rates.append((after - before) / (ended - begun))

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = work()
    watcher.join()
    return result, rates[0]


def timed_calls(
    make: Callable[[], Callable[[], object]], threads: int, end: float
) -> tuple[float, list[tuple[float, float]]]:
    """Call ``infer`` in threads until a time; return when that began, and when each request began and ended."""
    times: list[tuple[float, float]] = []
    begun = time.perf_counter()

    def go_on() -> None:
        call = make()
        own = []
        while (at := time.perf_counter()) < end:
            call()
            own.append((at, time.perf_counter()))
        times.extend(own)

    callers = [threading.Thread(target=go_on) for _ in range(threads)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return begun, times


def tritonclient_loop(
    make: Callable[[], Callable[[], object]], threads: int, seconds: float
) -> tuple[float, list[float]]:
    """Return the answers per second of threads that call ``infer``, after the warm-up, and their times in seconds."""
    begun, times = timed_calls(make, threads, time.perf_counter() + WARMUP_S + seconds)
    first, last = begun + WARMUP_S, begun + WARMUP_S + seconds
    came = sum(first <= ended < last for _, ended in times)
    return came / seconds, [ended - at for at, ended in times if at >= first]


def over_http(server: Served, model: str, x: np.ndarray) -> Callable[[], Callable[[], object]]:
    """Return what makes a caller over HTTP, as tritonclient's examples do."""
    from tritonclient import http

    def make() -> Callable[[], object]:
        client = http.InferenceServerClient(server.host)
        tensor = http.InferInput("x", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x)
        return lambda: client.infer(model, [tensor])

    return make


def over_grpc(server: Served, model: str, x: np.ndarray) -> Callable[[], Callable[[], object]]:
    """Return what makes a caller over gRPC."""
    from tritonclient import grpc

    def make() -> Callable[[], object]:
        client = grpc.InferenceServerClient(server.grpc)
        tensor = grpc.InferInput("x", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x)
        return lambda: client.infer(model, [tensor])

    return make


def compared(report: harness.Report, server: Served, model: str, x: np.ndarray, given: argparse.Namespace) -> None:
    """Compare both loops over HTTP and gRPC."""
    seconds = given.seconds
    rules = Measuring(warmup_s=WARMUP_S, window_s=seconds / 3, most_windows=3, stability=1e-9)
    targets: dict[str, tuple[Callable[[], Callable[[], object]], LoadTarget]] = {
        "HTTP": (over_http(server, model, x), HttpTarget(server.http, model, [{"x": x}], {})),
        "gRPC": (over_grpc(server, model, x), GrpcTarget(server.grpc, model, [{"x": x}], secure=False, headers={})),
    }
    for way, (make, target) in targets.items():
        for concurrency in given.concurrency:

            def theirs(make: Callable = make, concurrency: int = concurrency) -> Turn:
                work = lambda: tritonclient_loop(make, concurrency, seconds)  # noqa: E731
                (per_s, times), server_per_s = counted(server, model, seconds, work)
                return Turn(per_s, list(np.percentile(times, PERCENTILES) * 1e3), server_per_s)

            def ours(target: LoadTarget = target, concurrency: int = concurrency) -> Turn:
                work = lambda: measure(target, ClosedLoop(concurrency=concurrency), rules)  # noqa: E731
                point, server_per_s = counted(server, model, seconds, work)
                found = point.latency
                percentiles = [found.p50_ns / 1e6, found.p90_ns / 1e6, found.p95_ns / 1e6, found.p99_ns / 1e6]
                assert not point.failed, point
                return Turn(point.answered_per_s, percentiles, server_per_s)

            turns = harness.in_turns({"tritonclient": theirs, "load": ours}, given.turns)
            show(report, way, concurrency, turns["tritonclient"], turns["load"])


def over_server(turns: list[Turn]) -> float | None:
    """Return the rate of the median turn divided by the server's own; None where that was not read."""
    ratios = [turn.per_s / turn.server_per_s for turn in turns if turn.server_per_s is not None]
    return median(ratios) if ratios else None


def show(report: harness.Report, way: str, concurrency: int, theirs: list[Turn], ours: list[Turn]) -> None:
    """Print one row: the rates, and what ``load`` measures divided by what the others do."""
    figures = {
        "way": way,
        "in_flight": concurrency,
        "tritonclient_per_s": median(turn.per_s for turn in theirs),
        "load_per_s": median(turn.per_s for turn in ours),
        "rate_ratio": harness.ratio([t.per_s for t in ours], [t.per_s for t in theirs]).median,
        "over_server": over_server(ours),
        "their_over_server": over_server(theirs),
    }
    for place, percent in enumerate(PERCENTILES):
        pairs = [t.percentiles_ms[place] for t in ours], [t.percentiles_ms[place] for t in theirs]
        figures[f"p{percent}_ratio"] = harness.ratio(*pairs).median
    report.row(figures)


def at_once(report: harness.Report, server: Served, model: str, x: np.ndarray, given: argparse.Namespace) -> None:
    """Compare both loops while both run."""
    report.note("\nBoth at the same time\n")
    for way, make in (("HTTP", over_http(server, model, x)), ("gRPC", over_grpc(server, model, x))):
        url = server.http if way == "HTTP" else f"grpc://{server.grpc}"
        for concurrency in given.concurrency:
            pairs = [_together(url, model, make, x, concurrency, given.seconds) for _ in range(given.turns)]
            show(report, way, concurrency, [theirs for theirs, _ in pairs], [ours for _, ours in pairs])


def _together(
    url: str, model: str, make: Callable[[], Callable[[], object]], x: np.ndarray, concurrency: int, seconds: float
) -> tuple[Turn, Turn]:
    """Run both loops; return what each saw of the requests that began in the same time."""
    shape = "x:" + ",".join(map(str, x.shape))
    child = subprocess.Popen(
        [sys.executable, __file__, "--child", url, model, shape, str(concurrency), str(seconds)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    begun = float(child.stdout.readline())
    _, times = timed_calls(make, concurrency, begun + 2 * WARMUP_S + seconds)
    told = json.loads(child.stdout.readline())
    assert child.wait() == 0
    first, last = begun + WARMUP_S, begun + WARMUP_S + seconds
    seen = [ended - at for at, ended in times if first <= at < last]
    per_s = sum(first <= ended < last for _, ended in times) / seconds
    theirs = Turn(per_s, list(np.percentile(seen, PERCENTILES) * 1e3), None)
    return theirs, Turn(told["per_s"], told["percentiles_ms"], None)


def child(url: str, model: str, shape: str, concurrency: str, seconds: str) -> None:
    """Send the load of :func:`_together`; print when it begins, and then what it has measured."""
    name, _, sizes = shape.partition(":")
    endpoint = server_endpoint(url, Asked(model=model, shapes={name: tuple(map(int, sizes.split(",")))}))
    rules = Measuring(warmup_s=WARMUP_S, window_s=float(seconds) / 3, most_windows=3, stability=1e-9)
    print(time.perf_counter(), flush=True)
    point = measure(endpoint.target, ClosedLoop(concurrency=int(concurrency)), rules)
    assert not point.failed, point
    found = point.latency
    percentiles = [ns / 1e6 for ns in (found.p50_ns, found.p90_ns, found.p95_ns, found.p99_ns)]
    print(json.dumps({"per_s": point.answered_per_s, "percentiles_ms": percentiles}))


def cost(report: harness.Report, server: Served, model: str, seconds: float) -> None:
    """Print the processor time that one request takes in the generator, and how late it is at a thousand a second."""
    x = np.zeros((1, 16), np.float32)
    report.note("\nProcessor time of the generator, against a net that does nothing\n")
    targets: dict[str, LoadTarget] = {
        "HTTP": HttpTarget(server.http, model, [{"x": x}], {}),
        "gRPC": GrpcTarget(server.grpc, model, [{"x": x}], secure=False, headers={}),
    }
    for way, target in targets.items():
        for per_s in (200, 1000):
            rules = Measuring(warmup_s=WARMUP_S, window_s=seconds / 3, most_windows=3, stability=1e-9)
            point = measure(target, OpenLoop(per_s=per_s), rules)
            row = {
                "way": way,
                "asked_per_s": per_s,
                "answered_per_s": point.answered_per_s,
                "cpu_us_a_request": point.client_cores / max(1e-9, point.answered_per_s) * 1e6,
                "lag_p50_us": point.lag.p50_ns / 1e3,
                "lag_p99_us": point.lag.p99_ns / 1e3,
                "remarks": " ".join(point.remarks),
            }
            report.row(
                row,
                f"{way:5} {per_s:5} /s asked, {point.answered_per_s:7.1f} answered: {row['cpu_us_a_request']:6.0f} us "
                f"a request, sent late by {row['lag_p50_us']:.0f} us (p50), {row['lag_p99_us']:.0f} us (p99) "
                f"{row['remarks']}",
            )


def main() -> None:
    """Print the chosen tables."""
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("what", nargs="*", choices=[*PARTS, []], default=[], metavar="PART", help="default: all")
    parser.add_argument("--turns", type=int, default=10, help="turns of each loop")
    parser.add_argument("--seconds", type=float, default=3, help="length of a turn after its warm-up")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4], help="requests in flight")
    given = parser.parse_args()
    report = harness.Report(
        given, way="5", in_flight="9d", tritonclient_per_s="18.1f", load_per_s="10.1f", rate_ratio="10.4f",
        over_server="11.4f", their_over_server="17.4f", **{f"p{percent}_ratio": "9.4f" for percent in PERCENTILES},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        partition(products(folder / "net.onnx", 1024, 16), stages=1, out=folder / "net.plan")
        nothing = saved(folder / "nothing.onnx", [helper.make_node("Identity", ["x"], ["y"])], ("x", "y"), [1, 16], [])
        partition(nothing, stages=1, out=folder / "nothing.plan")
        x = harness.example(folder / "net.plan")["x"]
        words = (folder / "net.plan", folder / "nothing.plan", "--threads", "1")
        with Served(*words, environment=dict(os.environ)) as server:
            for what in given.what or PARTS:
                if what == "cost":
                    cost(report, server, "nothing", given.seconds)
                else:
                    (compared if what == "turns" else at_once)(report, server, "net", x, given)


if __name__ == "__main__":
    main()
