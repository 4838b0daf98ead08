"""One pipeline of a chaos run: launched, loaded round by round, drained and closed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from benchmarks.faults.odd.harm import HARM, Harm
from benchmarks.faults.odd.ledger import Ledger
from benchmarks.faults.odd.load import Caller, Callers
from benchmarks.faults.odd.nets import Net
from benchmarks.faults.odd.quiet import Memory, quiet, start_collector, state
from benchmarks.faults.odd.requests import warm
from runtime import Pipeline
from runtime.errors import PipelineClosed
from runtime.timings import Timings

THREADS = 6
TIMINGS = Timings(beat_s=0.25, silence_s=1.5, lost_s=10, circuit_failures=1_000_000, backoff_most_s=1)


@dataclass(frozen=True)
class Leg:
    """One pipeline of a run.

    Attributes:
        net: the model that it runs.
        requests: number of requests in all rounds together.
        rounds: the faults of each round, a key of ``HARM``.
        attempts: argument of ``Pipeline``, as are ``shared_memory``, ``replicas`` and ``inflight``.
        seed: seed of all random choices.
        kinds: the kinds of odd requests.
        patience_s: seconds after which a request counts as hanging.
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
        """A short description."""
        memory = "shared memory" if self.shared_memory else "no shared memory"
        return f"{self.net.name}, attempts {self.attempts}, {memory}, {self.replicas} a stage"

    def launch(self) -> Pipeline:
        """Start the pipeline."""
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

    def callers(self, pipeline: Pipeline, ledger: Ledger, *, requests: int, seed: int, **options: Any) -> Callers:
        """Start the callers that send the requests of a round."""
        return Callers(
            pipeline, self.net, ledger, requests=requests, threads=THREADS, kinds=self.kinds, seed=seed,
            patience_s=self.patience_s, **options,
        )  # fmt: skip


def run_leg(leg: Leg, ledger: Ledger, caller_bytes: list[int] | None = None) -> dict[str, Any]:
    """Launch, load round by round, drain and close; return the figures that are not in the ledger.

    Samples of this process's memory are added to ``caller_bytes``.
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
    close(pipeline, leg, ledger)
    if not broken:
        for name, now, then in (("threads", own.num_threads(), threads), ("descriptors", own.num_fds(), descriptors)):
            if now > then + 2:
                ledger.fault(f"{now} {name} after close, {then} before launch")
        if any(map(psutil.pid_exists, pids)):
            ledger.fault("nodes are alive after close")
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
    may = errors if leg.attempts == 1 else ()
    with Harm(pipeline, kinds, seed, ledger) as harm:
        leg.callers(pipeline, ledger, requests=requests, seed=seed, may=may, harms="kill" in kinds).join()
    return harm.counts


def _drain(pipeline: Pipeline, leg: Leg, ledger: Ledger) -> None:
    """Drain under load; later requests must be refused."""
    callers = leg.callers(pipeline, ledger, requests=20 * THREADS, seed=leg.seed + 7, may=(PipelineClosed,))
    time.sleep(0.02)  # some are under way
    try:
        pipeline.drain(leg.patience_s)
    except BaseException as error:
        ledger.fault(f"drain: {type(error).__name__}: {error}")
        ledger.broken.set()
    callers.join()
    for problem in () if ledger.broken.is_set() else quiet(pipeline, None, leg.patience_s):
        ledger.fault(f"after drain: {problem}")
        ledger.broken.set()


def close(pipeline: Pipeline, leg: Leg, ledger: Ledger) -> None:
    """Close; if that takes too long, kill the nodes and continue."""
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
