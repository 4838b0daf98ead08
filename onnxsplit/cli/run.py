"""The command ``onnxsplit run``."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxsplit.cli.help import REQUESTS, option, path_option
from onnxsplit.cli.model_options import PLAN, custom_ops_words
from onnxsplit.cli.output import Output, make_command, milliseconds
from onnxsplit.cli.running import keywords, running_options, tracing_options, write_trace
from onnxsplit.cli.values import NumberParam
from onnxsplit.numbers import MOST_SECONDS

if TYPE_CHECKING:
    from onnxsplit.tensors import Array
    from runtime.coordinator.status import NodeStats

_TENSORS = "Inputs and outputs"


@make_command
@PLAN
@path_option(
    "--inputs",
    metavar="FILE.npz",
    section=_TENSORS,
    help="File with the inputs by name. Without it: the plan's example inputs.",
)
@path_option("--outputs", metavar="FILE.npz", section=_TENSORS, help="File to write the outputs to.")
@option(
    "--outputs-only",
    multiple=True,
    metavar="NAME",
    section=_TENSORS,
    help="Return only this output or cut tensor. Repeatable.",
)
@running_options
@tracing_options
@option(
    "--repeat",
    type=click.IntRange(1, 1_000_000_000),
    default=1,
    metavar="N",
    section=REQUESTS,
    help="Number of times to send the request.",
)
@option(
    "--timeout",
    type=NumberParam(0, MOST_SECONDS, min_open=True),
    metavar="SECONDS",
    section=REQUESTS,
    help="Most time that one request may take.",
)
def command(
    output: Output,
    *,
    plan: Path,
    inputs: Path | None,
    outputs: Path | None,
    outputs_only: tuple[str, ...],
    repeat: int,
    timeout: float | None,
    **running: Any,
) -> None:
    """Start the nodes of the plan in DIR, run them on one set of inputs, write the outputs, and stop the nodes.

    SIGTERM ends a long --repeat: the requests that were sent are answered, and no more are sent.
    """
    from onnxsplit.files import check_outputs
    from onnxsplit.npz import load_npz, save_npz
    from onnxsplit.plan_files import example_file, load_plan
    from runtime import Pipeline

    check_outputs(outputs)
    options = keywords(output, running)
    file = inputs or example_file(plan, load_plan(plan, check_files=False))
    given = load_npz(file)
    output.say("starting nodes")
    started = time.monotonic()
    with Pipeline.launch(plan, **options) as pipeline:
        started_s = time.monotonic() - started
        output.say("running")
        started = time.monotonic()
        wanted = outputs_only or None
        sent, results = _repeat(lambda: pipeline.submit(given, outputs=wanted, timeout=timeout), repeat)
        ran_s = time.monotonic() - started
        stats = pipeline.stats()
    output.done()
    write_trace(output, pipeline, running["trace"])
    _show(output, results, stats)
    output.line(f"\n{len(stats)} nodes ready in {started_s:.2f} s, {sent} request(s) in {ran_s:.3f} s.")
    if inputs is None:
        output.line(f"The inputs were the plan's example inputs ({file}); give others with --inputs FILE.npz")
    if outputs is not None:
        save_npz(outputs, results)
        output.line(f"Wrote {outputs}. Next: onnxsplit bench {plan}{custom_ops_words(running['custom_ops'])}")
    else:
        output.line("The outputs were not written; name a file with --outputs FILE.npz")
    output.result(
        {
            "outputs": {name: {"dtype": str(a.dtype), "shape": a.shape} for name, a in results.items()},
            "inputs": file,
            "file": outputs,
            "start_s": started_s,
            "run_s": ran_s,
            "requests": sent,
            "nodes": stats,
        }
    )


def _show(output: Output, results: Mapping[str, Array], stats: Sequence[NodeStats]) -> None:
    """Print the outputs of the last request, and what each node did."""
    output.table(
        ("output", "type", "shape"),
        [(name, str(a.dtype), str(list(a.shape))) for name, a in results.items()],
        may_go=("type", "shape"),
    )
    output.line()
    output.table(
        ("stage", "requests", "waited", "ran"),
        [
            (f"{s.stage}.{s.replica}", f"{s.requests}", milliseconds(s.wait_ns), milliseconds(s.run_ns))
            for s in stats
            if s.requests
        ],
        may_go=("waited", "requests", "ran"),
    )


def _repeat(submit: Callable[[], Future[dict[str, Array]]], times: int) -> tuple[int, dict[str, Array]]:
    """Send a request this many times, or until SIGTERM; returns the number sent, and the last answer."""
    ending: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: ending.append(number))
    try:
        pending: deque[Future[dict[str, Array]]] = deque()
        sent, last = 0, {}
        while sent < times and (not ending or not sent):
            pending.append(submit())
            sent += 1
            while pending and pending[0].done():  # answers are not kept: there may be many
                last = pending.popleft().result()
        for future in pending:
            last = future.result()
    finally:
        signal.signal(signal.SIGTERM, before)
    return sent, last
