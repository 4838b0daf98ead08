"""What does each kind of odd request, sent separately, do to a small pipeline, and what does it leave behind?

A pipeline admits two requests. Each kind is sent eight times, one after the other; then places and threads must be as
before, and an ordinary request must be answered. After a kind that breaks the pipeline, the next kinds get a new
process.
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

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np

from benchmarks import harness
from benchmarks.faults.odd import nets
from benchmarks.faults.odd.ledger import Ledger, stray_errors
from benchmarks.faults.odd.leg import Leg, close
from benchmarks.faults.odd.load import Caller, Callers
from benchmarks.faults.odd.quiet import quiet, state
from benchmarks.faults.odd.requests import KINDS, selected, warm

TAKES = "10 min"

TIMES = 8


def alone(net_name: str, kinds: list[str], patience_s: float) -> None:
    """Send the kinds in this process and print a line of JSON for each, until one breaks the pipeline."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        net = nets.build(Path(scratch), [net_name])[0]
        leg = Leg(net, 0, (), 1, True, 0, (), patience_s=patience_s, inflight=2)
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
            row = {"net": net_name, "kind": kind, "outcomes": ledger.outcomes.get(kind, {})}
            print(json.dumps({**row, "faults": ledger.faults, "left": left, "broke": broke}), flush=True)
            if broke:
                break
        end = Ledger()
        if broke:
            end.broken.set()
        close(pipeline, leg, end)
    os._exit(0)


def _ask(pipeline: Any, net: Any, ledger: Ledger, kind: str, source: Any, patience_s: float) -> None:
    Callers(
        pipeline, net, ledger, requests=TIMES if kind else 4, threads=1, kinds=[kind] if kind else [],
        seed=int(source.integers(1 << 30)), patience_s=patience_s, harms=True, odd=1.0,
    ).join()  # fmt: skip


def main() -> None:
    """Print a row for each kind; exit with 1 if there was a violation."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--net", action="append", default=[], help="only this net; may be repeated")
    parser.add_argument("--only", action="append", default=[], help="only kinds whose names contain this")
    parser.add_argument("--without", action="append", default=[], help="no kinds whose names contain this")
    parser.add_argument("--patience", type=float, default=10.0, help="seconds after which a request counts as hanging")
    parser.add_argument("--in-this-process", metavar="KINDS", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.in_this_process is not None:
        alone(given.net[0], json.loads(given.in_this_process), given.patience)
    rows = [
        row
        for net in given.net or nets.NAMES
        for row in _rows(net, list(selected(given.only, given.without)), given.patience)
    ]
    report = harness.Report(given)
    for row in rows:
        verdict = "BROKE IT" if row["broke"] else "fault" if row["faults"] else "ok"
        head = f"{row['net']:10} {row['kind']:42} {verdict:9} {row['outcomes']}"
        report.row(row, "\n".join([head, *(f"{'':20} {text}" for text in (*row["faults"], *row["left"]))]))
    bad = [row for row in rows if row["broke"] or row["faults"]]
    report.note(f"{len(rows)} rows, {len(bad)} with faults, {sum(row['broke'] for row in rows)} broke the pipeline")
    sys.exit(any(row["broke"] or row["faults"] for row in rows))


def _rows(net: str, kinds: list[str], patience_s: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while kinds:
        command = [sys.executable, __file__, "--net", net, "--patience", str(patience_s)]
        ran = subprocess.run(
            [*command, "--in-this-process", json.dumps(kinds)], stdout=subprocess.PIPE, text=True, check=False
        )
        tried = [json.loads(line) for line in ran.stdout.splitlines()]
        rows += tried
        if not tried or not tried[-1]["broke"]:
            break
        print(f"{net}: {tried[-1]['kind']!r} broke the pipeline", file=sys.stderr, flush=True)
        kinds = kinds[kinds.index(tried[-1]["kind"]) + 1 :]
    return rows


if __name__ == "__main__":
    main()
