"""Each odd kind of request by itself: what becomes of it, and what it leaves behind in a small pipeline.

    python benchmarks/faults/odd_alone.py [--net NAME ...] [--only KIND ...] [--without KIND ...] [--json]

A pipeline admits two requests. Each kind is asked eight times, one after the other; then places and threads must be as
before and a plain request be answered. Whatever breaks the pipeline gets a new process for the kinds after it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np
from environment import environment, environment_line

from benchmarks.faults import chaos
from benchmarks.faults.odd import nets
from benchmarks.faults.odd.load import Caller, Ledger, callers, joined, stray_errors
from benchmarks.faults.odd.quiet import quiet, state
from benchmarks.faults.odd.requests import KINDS, warm

TIMES = 8


def alone(net_name: str, kinds: list[str], patience_s: float) -> None:
    """In a process of its own: a line of JSON for each kind, until one breaks the pipeline."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        net = nets.build(Path(scratch), [net_name])[0]
        leg = chaos.Leg(net, 0, (), 1, True, 0, (), patience_s=patience_s, inflight=2)
        pipeline = leg.launch()
        source = np.random.default_rng(0)
        Caller(pipeline, net, Ledger(), source, patience_s=patience_s).run(iter(warm(net, source)))
        quiet(pipeline, None, patience_s)
        before, broke = state(pipeline), False
        for kind in kinds:
            ledger = Ledger()
            with stray_errors(ledger):
                if KINDS[kind](net, source) is None:
                    continue
                _ask(pipeline, net, ledger, kind, source, patience_s)
                left = quiet(pipeline, before, 2.0 if ledger.broken.is_set() else patience_s)
                if not ledger.broken.is_set():
                    _ask(pipeline, net, ledger, "", source, patience_s)
            broke = bool(left) or ledger.broken.is_set()
            found = {"outcomes": ledger.outcomes.get(kind, {}), "faults": ledger.faults, "left": left, "broke": broke}
            print(json.dumps({"net": net_name, "kind": kind, **found}), flush=True)
            if broke:
                break
        end = Ledger()
        if broke:
            end.broken.set()
        chaos._close(pipeline, leg, end)
    os._exit(0)


def _ask(pipeline: Any, net: Any, ledger: Ledger, kind: str, source: Any, patience_s: float) -> None:
    count = TIMES if kind else 4
    made, threads = callers(
        pipeline,
        net,
        ledger,
        requests=count,
        threads=1,
        kinds=[kind] if kind else [],
        seed=int(source.integers(1 << 30)),
        patience_s=patience_s,
        harms=True,
        odd=1.0,
    )
    joined(made, threads, ledger, patience_s)


def main() -> None:
    """Print a row for each kind; exit 1 when one did what it must not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", action="append", default=[])
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--without", action="append", default=[])
    parser.add_argument("--patience", type=float, default=10.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--in-this-process", metavar="KINDS", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.in_this_process is not None:
        alone(given.net[0], json.loads(given.in_this_process), given.patience)
    rows = [
        row
        for net in given.net or nets.NAMES
        for row in _rows(net, list(chaos.selected(given.only, given.without)), given.patience)
    ]
    if given.json:
        print(json.dumps({"kinds": rows, "environment": environment()}))
    else:
        print(environment_line())
        for row in rows:
            verdict = "BROKE IT" if row["broke"] else "fault" if row["faults"] else "ok"
            print(f"{row['net']:10} {row['kind']:42} {verdict:9} {row['outcomes']}")
            for text in (*row["faults"], *row["left"]):
                print(f"{'':20} {text}")
        bad = [row for row in rows if row["broke"] or row["faults"]]
        print(f"{len(rows)} rows, {len(bad)} with faults, {sum(row['broke'] for row in rows)} broke the pipeline")
    sys.exit(any(row["broke"] or row["faults"] for row in rows))


def _rows(net: str, kinds: list[str], patience_s: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while kinds:
        command = [sys.executable, __file__, "--net", net, "--patience", str(patience_s)]
        ran = subprocess.run(
            [*command, "--in-this-process", json.dumps(kinds)], stdout=subprocess.PIPE, text=True, check=False
        )
        found = [json.loads(line) for line in ran.stdout.splitlines()]
        rows += found
        if not found or not found[-1]["broke"]:
            break
        print(f"{net}: {found[-1]['kind']!r} broke the pipeline", file=sys.stderr, flush=True)
        kinds = kinds[kinds.index(found[-1]["kind"]) + 1 :]
    return rows


if __name__ == "__main__":
    main()
