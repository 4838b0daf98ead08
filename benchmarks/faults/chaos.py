"""Odd requests among the load, and harm to the nodes: is every answer right, and is all as before when it is over?

    python benchmarks/faults/chaos.py [--requests 20000] [--seed 0] [--rounds 3] [--net NAME ...] [--only KIND ...]
                                   [--without KIND ...] [--odd 0.6] [--patience 60] [--json]
    python benchmarks/faults/odd_alone.py                 each odd kind by itself, and what it leaves behind

Each net (``odd/nets.py``) runs in two pipelines: one tries requests again when a node dies, the other does not; one
has shared memory, the other has not. Each pipeline has rounds: without harm, with nodes killed and stopped, with stages
scaled. Several callers ask what ``odd/requests.py`` lists. Every answer is compared with plain ONNX Runtime on what the
inputs were at ``submit``; every future must end once within a minute; an error must be one of ours, and one that fits.
After each round, when all is quiet, places, threads, descriptors and memory must be as before.
At the end each pipeline is drained under load and closed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np
import psutil
from environment import environment, environment_line

from benchmarks.faults.odd import nets
from benchmarks.faults.odd.load import HARM, Caller, Harm, Ledger, callers, joined, stray_errors
from benchmarks.faults.odd.nets import Net
from benchmarks.faults.odd.quiet import Memory, grown, quiet, start_collector, state
from benchmarks.faults.odd.requests import KINDS, warm
from runtime import Pipeline
from runtime.errors import PipelineClosed
from runtime.timings import Timings

THREADS = 6
TIMINGS = Timings(beat_s=0.25, silence_s=1.5, lost_s=10, circuit_failures=1_000_000, backoff_most_s=1)
_BREAKS = 5  # pipelines that may break before the run is given up


@dataclass(frozen=True)
class Leg:
    """One pipeline of a run.

    Attributes:
        net: that it runs.
        requests: in all rounds together.
        rounds: the harm of each, as ``HARM`` names it.
        attempts: as ``Pipeline`` has it; so are ``shared_memory``, ``replicas`` and ``inflight``.
        seed: of all that is left to chance.
        kinds: of odd requests.
        patience_s: what takes longer hangs.
    """

    net: Net
    requests: int
    rounds: tuple[str, ...]
    attempts: int
    shared_memory: bool
    seed: int
    kinds: tuple[str, ...]
    patience_s: float = 60.0
    replicas: int = 1
    inflight: int = 8

    @property
    def name(self) -> str:
        """What it is, in short."""
        memory = "shared memory" if self.shared_memory else "no shared memory"
        return f"{self.net.name}, attempts {self.attempts}, {memory}, {self.replicas} a stage"

    def launch(self) -> Pipeline:
        """Start it."""
        return Pipeline.launch(
            self.net.plan_folder,
            attempts=self.attempts,
            shared_memory=self.shared_memory,
            replicas=self.replicas,
            inflight=self.inflight,
            micro_batch=self.net.micro_batch,
            threads=1,
            timings=TIMINGS,
        )


def run_leg(leg: Leg, ledger: Ledger, caller_bytes: list[int] | None = None) -> dict[str, Any]:
    """Launch, load round by round, drain and close; what was found besides what is in the ledger.

    The sizes of this process meanwhile are added to ``caller_bytes``.
    """
    ledger.next_pipeline()
    start_collector()
    own = psutil.Process()
    threads, descriptors, begun = own.num_threads(), own.num_fds(), time.monotonic()
    pipeline = leg.launch()
    pids = {node.pid for node in pipeline.nodes if node.pid}
    harmed: Counter[str] = Counter()
    with Memory(pipeline) as memory:
        source = np.random.default_rng(leg.seed)
        Caller(pipeline, leg.net, ledger, source, patience_s=leg.patience_s).run(iter(warm(leg.net, source)))
        for problem in quiet(pipeline, None, leg.patience_s):
            ledger.fault(f"after the first requests: {problem}")
        before = state(pipeline)
        for number, name in enumerate(leg.rounds):
            if not ledger.broken.is_set():
                share = leg.requests // len(leg.rounds) + (number < leg.requests % len(leg.rounds))
                harmed += _round(pipeline, leg, ledger, name, number, share)
            for problem in () if ledger.broken.is_set() else quiet(pipeline, before, leg.patience_s):
                ledger.fault(f"after a round ({name}): {problem}")
                ledger.broken.set()
        if not ledger.broken.is_set():
            _drain(pipeline, leg, ledger)
    broken = ledger.broken.is_set()
    if caller_bytes is not None:
        caller_bytes += memory.caller
    for problem in () if broken else memory.problems():
        ledger.fault(problem)
    pids |= {node.pid for node in pipeline.nodes if node.pid}
    _close(pipeline, leg, ledger)
    if not broken:
        for name, now, then in (("threads", own.num_threads(), threads), ("descriptors", own.num_fds(), descriptors)):
            if now > then + 2:
                ledger.fault(f"{now} {name} after close, {then} before launch")
        if any(map(psutil.pid_exists, pids)):
            ledger.fault("nodes are there after close")
    return {
        "pipeline": leg.name,
        "seconds": round(time.monotonic() - begun, 1),
        "harm": dict(harmed),
        "retries": pipeline.retries,
        "memory_mib_first_last": memory.growth_mib(),
        "broke": broken,
    }


def _round(pipeline: Pipeline, leg: Leg, ledger: Ledger, name: str, number: int, requests: int) -> Counter[str]:
    kinds, errors = HARM[name]
    seed = leg.seed * 1000 + number
    with Harm(pipeline, kinds, seed, ledger) as harm:
        made, threads = callers(
            pipeline,
            leg.net,
            ledger,
            requests=requests,
            threads=THREADS,
            kinds=leg.kinds,
            seed=seed,
            patience_s=leg.patience_s,
            may=errors if leg.attempts == 1 else (),
            harms="kill" in kinds,
        )
        joined(made, threads, ledger, leg.patience_s)
    return harm.counts


def _drain(pipeline: Pipeline, leg: Leg, ledger: Ledger) -> None:
    """Drain under load; what comes after that is refused."""
    made, threads = callers(
        pipeline,
        leg.net,
        ledger,
        requests=20 * THREADS,
        threads=THREADS,
        kinds=leg.kinds,
        seed=leg.seed + 7,
        patience_s=leg.patience_s,
        may=(PipelineClosed,),
    )
    time.sleep(0.02)  # some are under way
    try:
        pipeline.drain(leg.patience_s)
    except BaseException as error:
        ledger.fault(f"drain: {type(error).__name__}: {error}")
        ledger.broken.set()
    joined(made, threads, ledger, leg.patience_s)
    for problem in () if ledger.broken.is_set() else quiet(pipeline, None, leg.patience_s):
        ledger.fault(f"after drain: {problem}")
        ledger.broken.set()


def _close(pipeline: Pipeline, leg: Leg, ledger: Ledger) -> None:
    """Close; if that takes too long, kill the nodes and go on without."""
    pids = [node.pid for node in pipeline.nodes if node.pid]
    closing = threading.Thread(target=pipeline.close, name="closing", daemon=True)
    closing.start()
    closing.join(min(leg.patience_s, 15.0) if ledger.broken.is_set() else leg.patience_s)
    if closing.is_alive():
        ledger.fault("close has not returned" + (" after the pipeline broke" if ledger.broken.is_set() else ""))
        ledger.broken.set()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def legs(
    found: list[Net], *, requests: int, rounds: int, seed: int, kinds: tuple[str, ...], patience_s: float
) -> list[Leg]:
    """Two pipelines for each net."""
    names = tuple(list(HARM)[number % len(HARM)] for number in range(rounds))
    count = 2 * len(found)
    return [
        Leg(
            net=net,
            requests=requests // count + (2 * position + second < requests % count),
            rounds=names,
            attempts=1 if second else 3,
            shared_memory=bool((position + second) % 2),
            replicas=1 + second,
            seed=seed * 100 + 2 * position + second,
            kinds=kinds,
            patience_s=patience_s,
        )
        for position, net in enumerate(found)
        for second in (0, 1)
    ]


def summary(ledger: Ledger, pipelines: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """What a run found."""
    totals: Counter[str] = Counter()
    for counts in ledger.outcomes.values():
        totals += counts
    return {
        "seed": seed,
        "requests": sum(totals.values()),
        "outcomes": dict(totals.most_common()),
        "wrong": totals["wrong"],
        "hanging or lost": totals["hanging"],
        "twice": ledger.faults["a future ended twice"],
        "raw errors": totals["raw error"],
        "pipelines": pipelines,
        "kinds": {kind: dict(counts) for kind, counts in sorted(ledger.outcomes.items())},
        "faults": dict(ledger.faults.most_common()),
    }


def selected(only: list[str], without: list[str]) -> tuple[str, ...]:
    """The kinds whose names hold one of ``only``, and none of ``without``."""
    return tuple(
        name
        for name in KINDS
        if (not only or any(text in name for text in only)) and not any(text in name for text in without)
    )


def main() -> None:
    """Print what was found; exit 1 when there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="of each pipeline")
    parser.add_argument("--net", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--only", action="append", default=[], help="odd kinds whose names hold this")
    parser.add_argument("--without", action="append", default=[], help="no odd kinds whose names hold this")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds; what takes longer hangs")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    kinds = selected(given.only, given.without)
    ledger, pipelines, sizes = Ledger(), [], list[int]()
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch, stray_errors(ledger):
        found = nets.build(Path(scratch), given.net, measured=True)
        for leg in legs(
            found,
            requests=given.requests,
            rounds=given.rounds,
            seed=given.seed,
            kinds=kinds,
            patience_s=given.patience,
        ):
            pipelines.append(run_leg(leg, ledger, sizes))
            print(json.dumps(pipelines[-1]), file=sys.stderr, flush=True)
            if sum(one["broke"] for one in pipelines) >= _BREAKS:
                break
    for problem in grown("caller over all pipelines", sizes):
        ledger.fault(problem)
    result = summary(ledger, pipelines, given.seed)
    if given.json:
        print(json.dumps({**result, "environment": environment()}))
    else:
        _print(result)
    sys.stdout.flush()
    os._exit(1 if ledger.faults else 0)  # a pipeline that broke may have left threads that never end


def _print(result: dict[str, Any]) -> None:
    print(environment_line())
    for name in ("seed", "requests", "outcomes", "wrong", "hanging or lost", "twice", "raw errors"):
        print(f"{name:18} {result[name]}")
    print(f"\n{'kind of request':45} outcomes")
    for kind, counts in result["kinds"].items():
        print(f"{kind:45} {', '.join(f'{name} {count}' for name, count in counts.items())}")
    print()
    for pipeline in result["pipelines"]:
        print(", ".join(f"{name} {value}" for name, value in pipeline.items()))
    print(f"\n{sum(result['faults'].values())} faults")
    for fault, count in result["faults"].items():
        print(f"{count:6} {fault}")


if __name__ == "__main__":
    main()
