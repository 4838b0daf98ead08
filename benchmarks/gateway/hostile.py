"""Does the gateway withstand hostile requests, and how much time and memory do they take?

Each row has the statuses of the answers, the time, the growth of the server's memory, and the violations. ``onnxsplit
serve`` runs in a separate process with --max-body 256M and --max-queue-bytes 64M. Two more servers, one after the
other, require a token and let clients register shared memory. The requests of ``attacks/*_cases.py`` are sent one after
another, some of them several at once; those that wait for a timeout of the server run concurrently. After each case an
ordinary request must be answered correctly; a server that fails is replaced, and the row says so. Another process
requests /v2/health/live every 20 ms. At the end the server must be ready or say why not, stay within its memory bound,
and exit with 0 on SIGTERM.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import harness
from benchmarks.faults.odd import nets
from benchmarks.gateway.attacks import connection_cases, grpc_cases, http2_cases, http_cases, region_cases
from benchmarks.gateway.attacks.target import Case, Row, Target, run_case

TAKES = "10 min"

LIVE_S = 0.1
TOKEN = "sesame-open-yourself-now"
LIMITS = ("--max-body", "256M", "--max-queue-bytes", "64M")
_SLACK_BYTES = 192 << 20  # growth of the server's memory that is allowed at the end


class Attack:
    """A server, the cases that are sent to it, and the results.

    Args:
        plans: the plans that are served.
        words: arguments of the command line.
        chain: the reference for the model ``chain``.
        bound_bytes: bytes by which the server's memory may grow.
        token: the token of ordinary requests.
    """

    def __init__(
        self, plans: Sequence[Path], words: Sequence[str], chain: Any, bound_bytes: int, token: str = ""
    ) -> None:
        self.rows: list[Row] = []
        self.ends: list[str] = []
        self.slowest_live_s = 0.0
        self.live_answers = 0
        self._start = lambda: Target(plans, words, chain, token)
        self._bound_bytes = bound_bytes
        self._target = self._started()

    def _started(self) -> Target:
        target = self._start()
        for _ in range(5):
            problem = target.works()
            assert not problem, problem
        self._rss = target.rss()
        return target

    def run(self, cases: Sequence[tuple[str, Case]]) -> None:
        """Run all cases; the slow ones run last, and concurrently."""
        for kind, case in cases:
            if not case.slow:
                self._one(kind, [case])
        slow = [(kind, case) for kind, case in cases if case.slow]
        if slow:
            self._one("", [case for _, case in slow], [kind for kind, _ in slow])
        self._end()

    def _one(self, kind: str, cases: Sequence[Case], kinds: Sequence[str] = ()) -> None:
        with ThreadPoolExecutor(len(cases)) as pool:
            rows = list(pool.map(lambda case: run_case(self._target, case, self._bound_bytes), cases))
        problem = self._target.works()
        for row, its in zip(rows, kinds or [kind], strict=True):
            row.name = f"{its}: {row.name}"
            self.rows.append(row)
        if problem:
            rows[-1].problems.append(f"an ordinary request is no longer answered: {problem}")
            rows[-1].problems.append(f"/v2/health/ready says {self._ready()}")
        for row in rows:
            print(f"{row.name[:70]:70} {row.said[:40]:40} {'; '.join(row.problems)}", file=sys.stderr, flush=True)
        if problem:
            self._end(expected=False)
            self._target = self._started()

    def _ready(self) -> str:
        try:
            status, said = self._target.ask("GET", "/v2/health/ready", timeout=10, **self._target.shown)
        except Exception as error:  # any error means that the server does not answer
            return f"{type(error).__name__}: {error}"
        return "200" if status == 200 else f"{status} {said.decode(errors='replace')[:200]}"

    def _end(self, *, expected: bool = True) -> None:
        target = self._target
        problems = []
        if expected:
            ready, end = self._ready(), time.monotonic() + 20
            while (grown := target.rss() - self._rss) > _SLACK_BYTES and time.monotonic() < end:
                time.sleep(0.5)
            if ready != "200":
                problems.append(f"not ready at the end: {ready}")
            if grown > _SLACK_BYTES:
                problems.append(f"holds {grown >> 20} MiB more at the end than at the start")
        self.slowest_live_s = max([self.slowest_live_s, *(took for _, took, _ in target.answers)])
        self.live_answers += len(target.answers)
        wrong = {status for _, _, status in target.answers} - {"200", "401"}
        if expected and wrong:
            problems.append(f"/v2/health/live also said {', '.join(sorted(wrong))}")
        ended = target.end()
        if ended:
            problems.append(ended)
        self.ends += problems


def chosen(cases: dict[str, list[Case]], only: Sequence[str]) -> list[tuple[str, Case]]:
    """Return the cases whose names contain one of ``only``, each with its protocol."""
    return [
        (kind, case)
        for kind, its in cases.items()
        for case in its
        if not only or any(text in f"{kind}: {case.name}" for text in only)
    ]


def main() -> None:
    """Print the table; exit with 1 if there was a violation."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--only", action="append", default=[], help="only cases whose names contain this")
    parser.add_argument("--bound-mib", type=int, default=768, help="MiB by which the server's memory may grow")
    parser.add_argument("--regions", default="", help="serve's option for memory named hostile-...")
    given = parser.parse_args()
    attacks = []
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        built = nets.build(Path(scratch), ["chain", "dag", "strings"])
        plans = [net.plan_folder for net in built]
        tokens = Path(scratch) / "tokens"
        tokens.write_text(TOKEN + "\n")
        tokens.chmod(0o600)
        prefix = tuple(given.regions.split())
        servers: list[tuple[tuple[str, ...], str, dict[str, list[Case]]]] = [
            (
                (),
                "",
                {
                    "HTTP": [*http_cases.plain(), *connection_cases.plain()],
                    "gRPC": [*grpc_cases.plain(), *http2_cases.plain()],
                },
            ),
            (prefix, "", {"memory HTTP": region_cases.http(), "memory gRPC": region_cases.over_grpc()}),
            (
                ("--token-file", str(tokens)),
                TOKEN,
                {"token HTTP": http_cases.guarded(TOKEN), "token gRPC": grpc_cases.guarded(TOKEN)},
            ),
        ]
        for words, token, cases in servers:
            selected = chosen(cases, given.only)
            if selected:
                attack = Attack(plans, [*LIMITS, *words], _chain(built[0]), given.bound_mib << 20, token)
                attack.run(selected)
                attacks.append(attack)
    if not attacks:
        parser.error(f"no case name contains any of: {', '.join(given.only)}")
    rows = [row for attack in attacks for row in attack.rows]
    result = {
        "cases": len(rows),
        "not as they must be": sum(bool(row.problems) for row in rows),
        "slowest /v2/health/live in ms": round(1e3 * max(attack.slowest_live_s for attack in attacks), 1),
        "answers of /v2/health/live": sum(attack.live_answers for attack in attacks),
        "at the end": [problem for attack in attacks for problem in attack.ends] or "as it must be",
    }
    slow = [row for row in rows if row.live_s > LIVE_S]
    report = harness.Report(given)
    report.note(f"{'request':72} {'status':34} {'s':>6} {'MiB':>6} {'live ms':>8}")
    for row in rows:
        report.row(asdict(row), _text(row))
    report.figures(result)
    sys.exit(bool(result["not as they must be"] or slow or any(attack.ends for attack in attacks)))


def _chain(net: nets.Net) -> Any:
    return lambda x: (net.answer({"x": x}, ["y"]) or {})["y"]


def _text(row: Row) -> str:
    figures = f"{row.seconds:6.2f} {row.grown_bytes / 2**20:6.0f} {1e3 * row.live_s:8.0f}"
    lines = [f"{row.name[:72]:72} {row.said[:34]:34} {figures}", *(f"{'':8}{problem}" for problem in row.problems)]
    if row.live_s > LIVE_S:
        lines.append(f"{'':8}/v2/health/live took {1e3 * row.live_s:.0f} ms")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
