"""After odd requests and faults of nodes, are all answers right and all resources returned?

Each net of ``odd/nets.py`` runs in two pipelines: one repeats requests when a node dies, the other does not; one has
shared memory, the other does not. Each pipeline has rounds: without faults, with nodes killed and stopped, with stages
scaled. Several callers send the requests that ``odd/requests.py`` lists. Every answer is compared with that of plain
ONNX Runtime on the inputs at the time of ``submit``. Every future must end once within a minute, and an error must be
one that its request allows. After each round, when no request is in flight, places, threads, descriptors and memory
must be as before. At the end each pipeline is drained under load and closed. faults/odd_alone.py sends each kind of odd
request separately.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import harness
from benchmarks.faults.odd import nets
from benchmarks.faults.odd.harm import HARM
from benchmarks.faults.odd.ledger import Ledger, stray_errors
from benchmarks.faults.odd.leg import Leg, run_leg
from benchmarks.faults.odd.nets import Net
from benchmarks.faults.odd.quiet import grown
from benchmarks.faults.odd.requests import selected

TAKES = "10 min"

_BREAKS = 5  # number of broken pipelines after which the run ends


def legs(
    built: list[Net], *, requests: int, rounds: int, seed: int, kinds: tuple[str, ...], patience_s: float
) -> list[Leg]:
    """Return the two pipelines of each net."""
    names = tuple(list(HARM)[number % len(HARM)] for number in range(rounds))
    count = 2 * len(built)
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
        for position, net in enumerate(built)
        for second in (0, 1)
    ]


def summary(ledger: Ledger, pipelines: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Return the figures of a run."""
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


def _text(result: dict[str, Any]) -> str:
    names = ("seed", "requests", "outcomes", "wrong", "hanging or lost", "twice", "raw errors")
    lines = [f"{name:18} {result[name]}" for name in names]
    lines += ["", f"{'kind of request':45} outcomes"]
    for kind, counts in result["kinds"].items():
        lines.append(f"{kind:45} {', '.join(f'{name} {count}' for name, count in counts.items())}")
    lines.append("")
    lines += [", ".join(f"{name} {value}" for name, value in one.items()) for one in result["pipelines"]]
    lines += ["", f"{sum(result['faults'].values())} faults"]
    return "\n".join([*lines, *(f"{count:6} {fault}" for fault, count in result["faults"].items())])


def main() -> None:
    """Print the figures; exit with 1 if there was a fault."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each pipeline")
    parser.add_argument("--net", action="append", default=[], help="only this net; may be repeated")
    parser.add_argument("--only", action="append", default=[], help="only odd kinds whose names contain this")
    parser.add_argument("--without", action="append", default=[], help="no odd kinds whose names contain this")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds after which a request counts as hanging")
    given = parser.parse_args()
    kinds = selected(given.only, given.without)
    report = harness.Report(given)
    ledger, pipelines, sizes = Ledger(), [], list[int]()
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch, stray_errors(ledger):
        built = nets.build(Path(scratch), given.net, measured=True)
        for leg in legs(
            built,
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
    report.row(result, _text(result))
    sys.stdout.flush()
    os._exit(1 if ledger.faults else 0)  # a broken pipeline may have left threads that never end


if __name__ == "__main__":
    main()
