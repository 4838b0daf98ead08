"""The command ``onnxsplit load``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxsplit.cli.help import add_options
from onnxsplit.cli.load_options import LOAD_OPTIONS, check_fitting
from onnxsplit.cli.output import Output, make_command, milliseconds
from onnxsplit.cli.running import keywords, parameter_names, running_options, tracing_options, write_trace

if TYPE_CHECKING:
    from runtime.load.driver import Driver
    from runtime.load.endpoint import Asked, Endpoint
    from runtime.load.patterns import Pattern
    from runtime.load.sweep import LoadRow
    from runtime.load.windows import Measuring

_SEARCHED = 100  # about as many loads a search chooses from, where no step is given


@make_command
@click.argument("target", metavar="URL|DIR")
@add_options(LOAD_OPTIONS)
@running_options
@tracing_options
def command(output: Output, *, target: str, csv: Path | None, **options: Any) -> None:
    """Send load to a server, or to the plan in DIR, and measure how it answers.

    A URL is http://HOST:PORT or grpc://HOST:PORT for the Open Inference Protocol, or http://HOST:PORT/v1 for OpenAI's
    API. Latencies are counted from when each request was due. Ctrl-C shows what was measured so far.
    """
    from onnxsplit.cli.load_table import show, write_csv
    from onnxsplit.errors import InputError
    from onnxsplit.files import check_outputs

    check_outputs(csv)
    own = parameter_names(LOAD_OPTIONS)
    running = {name: value for name, value in options.items() if name not in own}
    check_fitting(click.get_current_context(), target, running)
    strengths, make = _loads(options)
    rules = _rules(options)
    with _endpoint(output, target, _asked(options), running) as endpoint:
        sweep = _Sweep(output, endpoint, make, rules, options["latency_threshold"])
        sweep.run(strengths)
    output.done()
    rows, batch = sweep.rows, options["batch_size"] or 1
    show(output, rows)
    if sweep.threshold_ns is not None:
        output.line(f"\n{sweep.verdict()}")
    if csv is not None:
        write_csv(csv, rows, batch)
        output.line(f"\nWrote {csv}")
    output.result(
        {
            "load": {
                "target": endpoint.name,
                "batch_size": batch,
                "rows": rows,
                "threshold_ns": sweep.threshold_ns,
                "percentile": rules.percentile,
                "highest": sweep.highest,
                "interrupted": sweep.interrupted,
            }
        }
    )
    if sweep.interrupted:
        raise KeyboardInterrupt
    if not any(row.point.answered_per_s for row in rows):
        failures = {kind: message for row in rows for kind, message in row.point.messages.items()}
        why = "; ".join(f"{kind}: {message}" if message else kind for kind, message in failures.items())
        raise InputError(f"{endpoint.name} answered no request" + (f" ({why:.600})" if why else " in time"))


class _Sweep:
    """Loads that are sent one after the other.

    Attributes:
        rows: their results.
        threshold_ns: the latency that is searched for; None for no search.
        highest: the strongest load that kept it.
        interrupted: whether Ctrl-C ended the sweep.
    """

    def __init__(
        self,
        output: Output,
        endpoint: Endpoint,
        make: Callable[[float], Pattern],
        rules: Measuring,
        threshold_ms: float | None,
    ) -> None:
        self._output, self._endpoint, self._make, self._rules = output, endpoint, make, rules
        self.threshold_ns = None if threshold_ms is None else round(threshold_ms * 1e6)
        self.rows: list[LoadRow] = []
        self.highest: float | None = None
        self.interrupted = False

    def run(self, strengths: list[float]) -> None:
        """Send the loads of all strengths, until one is not answered at all, or search among them."""
        from runtime.load.sweep import keeps_latency, search

        try:
            if self.threshold_ns is not None:
                most_ns = self.threshold_ns
                self.highest = search(strengths, lambda s: keeps_latency(self._measured(s, "searching").point, most_ns))
                self.rows.sort(key=lambda row: row.point.rate_per_s or row.point.concurrency or 0)
                return
            for number, strength in enumerate(strengths, 1):
                row = self._measured(strength, f"load {number} of {len(strengths)}")
                if not row.point.latency.count:
                    return
        except KeyboardInterrupt:
            self.interrupted = True

    def verdict(self) -> str:
        """What a search has found."""
        judged = f"p{self._rules.percentile:g}"
        limit = milliseconds(self.threshold_ns or 0)
        if self.highest is None:
            return f"No load of this range keeps its {judged} at or below {limit} without failures."
        unit = "requests a second" if self.rows[0].point.concurrency is None else "requests in flight"
        return f"The strongest load with a {judged} of at most {limit}: {self.highest:g} {unit}."

    def _measured(self, strength: float, words: str) -> LoadRow:
        from runtime.load.patterns import ClosedLoop
        from runtime.load.sweep import run_load

        pattern = self._make(strength)
        unit = "in flight" if isinstance(pattern, ClosedLoop) else "a second"

        def progress(driver: Driver) -> None:
            self._output.say(
                f"{words}, {strength:g} {unit}: window {driver.complete} of at most {self._rules.most_windows}"
            )

        self._output.say(f"{words}, {strength:g} {unit}: warming up")
        row = run_load(self._endpoint, pattern, self._rules, progress)
        self.rows.append(row)
        if row.point.interrupted:
            raise KeyboardInterrupt
        return row


def _loads(options: Mapping[str, Any]) -> tuple[list[float], Callable[[float], Pattern]]:
    """The strengths of the loads, and what makes a load of a strength."""
    from runtime.load.patterns import ClosedLoop, OpenLoop
    from runtime.load.sweep import levels

    rate, concurrency = options["rate"], options["concurrency"]
    if rate is not None and concurrency is not None:
        raise click.UsageError("--rate and --concurrency are two kinds of load; give one of them")
    start, end, step = rate or concurrency or (1.0, 1.0, None)
    if step is None and options["latency_threshold"] is not None and start < end:
        step = max(start, end - start) / _SEARCHED if rate is not None else max(1, (end - start) // _SEARCHED)
    strengths = levels(start, end, step)
    if rate is None:
        return strengths, lambda strength: ClosedLoop(concurrency=round(strength))
    poisson, seed = options["request_distribution"] == "poisson", options["seed"]
    return strengths, lambda strength: OpenLoop(per_s=strength, poisson=poisson, seed=seed)


def _rules(options: Mapping[str, Any]) -> Measuring:
    from runtime.load.windows import Measuring

    percentile = options["percentile"]
    if percentile is None and options["latency_threshold"] is not None:
        percentile = 99.0
    return Measuring(
        warmup_s=options["warmup"],
        window_s=options["measurement_interval"] / 1e3,
        most_windows=options["max_trials"],
        stability=options["stability_percentage"] / 100,
        percentile=percentile,
        requests=options["request_count"],
    )


def _asked(options: Mapping[str, Any]) -> Asked:
    from runtime.load.endpoint import Asked

    return Asked(
        model=options["model"],
        data=options["input_data"],
        shapes=options["shapes"],
        batch=options["batch_size"],
        headers=options["headers"],
        chat=options["endpoint"] == "chat",
        prompt_words=options["prompt_words"],
        text_options={"max_tokens": options["max_tokens"], **options["extra_inputs"]},
    )


@contextmanager
def _endpoint(output: Output, target: str, asked: Asked, running: Mapping[str, Any]) -> Iterator[Endpoint]:
    """The server of a URL, or the plan of a folder, whose nodes run meanwhile."""
    from runtime.load.endpoint import is_url, plan_endpoint, server_endpoint

    if is_url(target):
        yield server_endpoint(target, asked)
        return
    output.say("starting nodes")
    closed = lambda pipeline: write_trace(output, pipeline, running["trace"])  # noqa: E731
    with plan_endpoint(Path(target), asked, closed=closed, **keywords(output, running)) as endpoint:
        yield endpoint
