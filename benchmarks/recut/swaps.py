"""Is every request answered once and rightly while the plan changes again and again and nodes are killed?

Callers of several kinds (threads, the tasks of an event loop, and `map` over batches that are sent in parts) send
requests that carry their numbers in their values, so an answer to another request would be wrong. The stages sleep.
Meanwhile `recut` alternates between two plans, and a random ready node of any plan, old or new, gets SIGKILL every two
seconds. With ``--quiet`` no node is killed, and the latencies in the 10 s around swaps are compared with the others.
With ``--decoder`` the requests are generations of a small decoder instead, and each text is compared with that of a
pipeline in which nothing happens. The exit status is 1 if a request was lost, answered twice or answered wrong.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from decoder_plans import cut, describe
from decoder_runs import FAMILIES
from sleeping import Devices, SleepingLauncher

from benchmarks import harness
from benchmarks.recut.ledger import Killer, Ledger, echo_plans, start
from benchmarks.recut.observed import History
from onnxsplit.plan_files import load_plan
from runtime import Pipeline
from runtime.errors import PipelineClosed, RecutFailed, RecutRefused
from runtime.timings import Timings

TAKES = "15 min"

CUTS = (4, 8), (2, 7)
PROMPTS = 32
TOKENS = 24
TIMINGS = Timings(circuit_failures=1_000_000, backoff_most_s=1)  # nodes are killed much more often than usual


class Alternating:
    """Changes a pipeline between plans at regular intervals; a context manager.

    Args:
        pipeline: the pipeline.
        plans: the plans; the first one runs.
        every_s: seconds from the beginning of one change to that of the next.

    Attributes:
        reasons: why plans were not changed, and how often.
    """

    def __init__(self, pipeline: Pipeline, plans: list[Path], every_s: float) -> None:
        self.reasons: Counter[str] = Counter()
        self._pipeline, self._plans, self._every_s = pipeline, plans, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._alternate)

    def __enter__(self) -> Alternating:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _alternate(self) -> None:
        wanted, due = 1, time.monotonic() + self._every_s
        while not self._ended.wait(max(0.0, due - time.monotonic())):
            due += self._every_s
            try:
                if self._pipeline.recut(self._plans[wanted]).result().kept:
                    wanted = (wanted + 1) % len(self._plans)
            except (RecutFailed, RecutRefused, PipelineClosed) as error:
                self.reasons[f"{type(error).__name__}: {str(error).splitlines()[0]}"[:160]] += 1


def measure(pipeline: Pipeline, plans: list[Path], given: argparse.Namespace, send: Any) -> dict[str, Any]:
    """Send all requests while the plan changes; returns the figures."""
    ledger = Ledger(given.requests)
    begun = time.monotonic()
    with ExitStack() as stack:
        history = stack.enter_context(History(pipeline))
        alternating = stack.enter_context(Alternating(pipeline, plans, given.every))
        killer = None if given.quiet else stack.enter_context(Killer(pipeline, given.kill_every, given.seed, ledger))
        for thread in send(ledger):
            thread.join()
        seconds = time.monotonic() - begun
    near, far = ledger.answers.around(history.swaps)
    kills = killer.kills if killer is not None else Counter[int]()
    row = {
        **ledger.counts,
        "changes": pipeline.recuts.results,
        "reasons": dict(alternating.reasons),
        "swaps": len(history.swaps),
        "kills": kills.total(),
        "plans that lost nodes": len(kills),
        "repeated attempts": pipeline.retries,
        "requests/s": given.requests / seconds,
        "longest s": max(near.longest_s, far.longest_s) if near.answered else far.longest_s,
    }
    if given.quiet:
        row |= {
            "p99 around swaps s": near.p99_s,
            "p99 elsewhere s": far.p99_s,
            "p99 around over elsewhere": near.p99_s / far.p99_s,
            "longest around over elsewhere": near.longest_s / far.longest_s,
        }
    return row


def requests(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Ordinary requests through stages that sleep."""
    (folder / "speeds").mkdir()
    plans = echo_plans(folder, *CUTS)
    devices = Devices(folder / "speeds", ["0", "1", "2"])
    launcher = SleepingLauncher(load_plan(plans[0]), devices, given.op_ms / 1e3)
    options: dict[str, Any] = {"micro_batch": 2, "attempts": given.attempts, "timings": TIMINGS}
    with Pipeline.launch(plans[0], launcher=launcher, **options) as pipeline:
        return measure(pipeline, plans, given, lambda ledger: start(pipeline, ledger, thread=4, event_loop=1, map=1))


def generations(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Generations of a small decoder, in one stage and in two."""
    model = FAMILIES["plain"].make()
    decoder = describe("plain", model, kind="append", rows="holes", chunk="rows")
    plans = [folder / "two.plan", folder / "one.plan"]
    for stages, plan in zip((2, 1), plans, strict=True):
        cut(model, decoder, plan, stages=stages)
    source = random.Random(given.seed)
    prompts = [[source.randrange(100) for _ in range(source.randint(1, 12))] for _ in range(PROMPTS)]
    options: dict[str, Any] = {"threads": 1, "max_rows": 4, "attempts": given.attempts, "timings": TIMINGS}
    with Pipeline.launch(plans[0], **options) as calm:
        expected = [list(calm.generate(prompt, max_tokens=TOKENS, stop_tokens=())) for prompt in prompts]

    with Pipeline.launch(plans[0], **options) as pipeline:

        def generate(ledger: Ledger) -> None:
            while (number := ledger.take()) is not None:
                begun, which = time.monotonic(), number % PROMPTS
                try:
                    tokens = list(pipeline.generate(prompts[which], max_tokens=TOKENS, stop_tokens=()))
                except Exception as error:
                    ledger.failed(error)
                else:
                    ledger.note(number, begun, is_right=tokens == expected[which])

        def send(ledger: Ledger) -> list[threading.Thread]:
            threads = [threading.Thread(target=generate, args=(ledger,)) for _ in range(8)]
            for thread in threads:
                thread.start()
            return threads

        return measure(pipeline, plans, given, send)


def main() -> None:
    """Print the figures; exit with 1 if a request was lost, answered twice or answered wrong."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two changes of the plan")
    parser.add_argument("--kill-every", type=float, default=2.0, help="seconds between two kills")
    parser.add_argument("--quiet", action="store_true", help="kill no node")
    parser.add_argument("--decoder", action="store_true", help="send generations of a small decoder")
    parser.add_argument("--op-ms", type=float, default=2.0, help="time that each of the 12 ops sleeps")
    parser.add_argument("--attempts", type=int, default=20, help="attempts of a request whose node was lost")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    support = str(harness.ROOT / "tests" / "support")
    os.environ["PYTHONPATH"] = os.pathsep.join([support, os.environ["PYTHONPATH"]])  # nodes import `sleeping`
    logging.getLogger("runtime").setLevel(logging.ERROR)  # each lost node is a warning
    report = harness.Report(given)
    with tempfile.TemporaryDirectory(prefix="swaps-") as scratch:
        row = (generations if given.decoder else requests)(Path(scratch), given)
    report.figures(row)
    sys.exit(any(row[name] for name in ("lost", "wrong", "twice")))


if __name__ == "__main__":
    main()
