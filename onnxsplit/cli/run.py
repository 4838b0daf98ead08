"""``onnxsplit run``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from onnxsplit.cli.output import PLAN, Output, make_command, milliseconds, option
from onnxsplit.cli.running import keywords, running_options, write_trace


@make_command
@PLAN
@option(
    "--inputs",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Inputs by name. Without it: the plan's example.",
)
@option("--outputs", type=click.Path(path_type=Path), metavar="FILE.npz", help="Where to write the outputs.")
@option("--outputs-only", multiple=True, metavar="NAME", help="Only this output or cut tensor. Repeatable.")
@running_options
@option("--repeat", type=click.IntRange(min=1), default=1, help="Send the request this many times.")
@option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds a request may take.")
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
    """Start the nodes of the plan in DIR, run one set of inputs through them, write the outputs, stop the nodes."""
    from onnxsplit.plan import example_file, load_plan
    from onnxsplit.tensors import load_npz, save_npz
    from runtime import Pipeline

    options = keywords(output, running)
    given = load_npz(inputs or example_file(plan, load_plan(plan, check_files=False)))
    output.say("starting nodes")
    begun = time.monotonic()
    with Pipeline.launch(plan, **options) as pipeline:
        started_s = time.monotonic() - begun
        output.say("running")
        begun = time.monotonic()
        wanted = outputs_only or None
        futures = [pipeline.submit(given, outputs=wanted, timeout=timeout) for _ in range(repeat)]
        results = [future.result() for future in futures]
        ran_s = time.monotonic() - begun
        stats = pipeline.stats()
    output.done()
    write_trace(output, pipeline, running["trace"])
    found = results[-1]
    output.table(("output", "type", "shape"), [(name, str(a.dtype), str(list(a.shape))) for name, a in found.items()])
    output.line()
    output.table(
        ("stage", "requests", "waited", "ran"),
        [
            (f"{s.stage}.{s.replica}", f"{s.requests}", milliseconds(s.wait_ns), milliseconds(s.run_ns))
            for s in stats
            if s.requests
        ],
    )
    output.line(f"\n{len(stats)} nodes ready in {started_s:.2f} s, {repeat} request(s) in {ran_s:.3f} s.")
    if outputs is not None:
        save_npz(outputs, found)
        output.line(f"Wrote {outputs}. Next: onnxsplit bench {plan}")
    else:
        output.line("Nothing was written; name a file with --outputs FILE.npz")
    output.result(
        {
            "outputs": {name: {"dtype": str(a.dtype), "shape": a.shape} for name, a in found.items()},
            "file": outputs,
            "start_s": started_s,
            "run_s": ran_s,
            "nodes": stats,
        }
    )
