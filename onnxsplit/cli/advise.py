"""The command ``onnxsplit advise``."""

from __future__ import annotations

import functools
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec.structs

from onnxsplit.cli.help import RESULTS, option, path_option
from onnxsplit.cli.model_options import MODEL, examine_options
from onnxsplit.cli.output import Output, make_command, percent
from onnxsplit.cli.values import NODES, NumberParam, SecondsParam, SizeParam
from onnxsplit.effort import EFFORT_NAMES, EffortName

if TYPE_CHECKING:
    from onnxsplit.planning.advice import Advisor
    from onnxsplit.planning.candidates import Choice, Wishes
    from onnxsplit.views.advice import Advice
    from runtime.advise import Contender, LoadResult

_WISHES, _DEVICES = "What is asked for", "Devices"
_wish_option = functools.partial(option, section=_WISHES)
_device_option = functools.partial(option, section=_DEVICES)
_MOST_PER_S = 1e6
_LAUNCH_S = 2.0  # about the time in which a pipeline starts
_LOOK_S = 0.5  # for other processes on this host
_BUSY = 0.15  # the share of the cores that others may use before the machine is called busy
_FEW = 300  # requests of which a p99 is a rough one
_MOST_RUN: dict[EffortName, int] = {"quick": 3, "normal": 5, "thorough": 10}
_LOADS: dict[EffortName, dict[str, Any]] = {
    "quick": {"turns": 2, "closed_s": 1.0, "open_s": 2.0, "steps": 6},
    "normal": {"turns": 3, "closed_s": 1.5, "open_s": 4.0, "steps": 10},
    "thorough": {"turns": 5, "closed_s": 3.0, "open_s": 10.0, "steps": 12},
}


def _providers(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip())) or ("auto",)


@make_command
@MODEL
@_wish_option(
    "--rate",
    type=NumberParam(0, _MOST_PER_S, min_open=True),
    metavar="R",
    help="Requests per second to serve. Without it: as many as possible.",
)
@_wish_option(
    "--p99",
    type=SecondsParam(unit=True),
    metavar="TIME",
    help="Time in which 99 of 100 requests are answered, as 50ms.",
)
@_wish_option("--max-memory", type=SizeParam(), metavar="SIZE", help="Most memory on a device, as 512M or 2.5G.")
@_device_option(
    "--devices", type=NODES, metavar="N", help="Most nodes on this host. Without it: its GPUs, else its cores."
)
@path_option(
    "--cluster",
    metavar="FILE",
    section=_DEVICES,
    help="Cluster file whose devices are used instead; onnxsplit cluster init writes one. What needs other hosts is "
    "predicted and not run.",
)
@_device_option(
    "--provider",
    "providers",
    default="auto",
    metavar="NAME,NAME",
    callback=_providers,
    help="Execution providers to try: cpu, cuda[:N], openvino, webgpu or auto.",
)
@examine_options
@option(
    "--effort",
    type=click.Choice(EFFORT_NAMES),
    default="normal",
    section="The search",
    help="How much time cutting and running may take. quick: 3 candidates are run, normal: 5, thorough: 10.",
)
@path_option("--html", metavar="FILE", section=RESULTS, help="Also write a page with a picture of all candidates.")
@path_option("--keep", metavar="DIR", section=RESULTS, help="Keep the plan that was picked in this folder.")
def command(
    output: Output,
    *,
    model: Path,
    rate: float | None,
    p99: float | None,
    max_memory: int | None,
    devices: int | None,
    cluster: Path | None,
    providers: tuple[str, ...],
    effort: EffortName,
    html: Path | None,
    keep: Path | None,
    **examined: Any,
) -> None:
    """Find the way to run MODEL that serves requests best: one session, replicas, stages, or batches of requests.

    Candidates are predicted; the best few are run under load.
    """
    from onnxsplit.files import check_outputs
    from onnxsplit.plan_files import check_plan_folder
    from onnxsplit.planning.advice import AdviceOptions, Advisor
    from onnxsplit.planning.candidates import Wishes

    check_outputs(html)
    if keep is not None:
        check_plan_folder(keep, "--keep")
    if devices is not None and cluster is not None:
        raise click.UsageError("--cluster names the devices; leave out --devices")
    wishes = Wishes(rate_per_s=rate, p99_ns=None if p99 is None else round(p99 * 1e9), max_memory_bytes=max_memory)
    options = AdviceOptions(devices=devices, cluster=cluster, providers=providers, effort=effort, examined=examined)
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        advisor = Advisor(model, Path(folder), wishes, options, output.say)
        choices, notes, disturbed = _run_best(output, advisor, wishes, effort, examined)
        advice = _advice(output, advisor, choices, wishes, model, keep, notes, disturbed, examined)
    if html is not None:
        from onnxsplit.views.advice import write_page

        write_page(advice, html)
    output.done()
    _show(output, advice)
    if html is not None:
        output.line(f"Wrote {html}.")
    output.result({"advice": advice, "html": html, "plan": keep})


def _run_best(
    output: Output, advisor: Advisor, wishes: Wishes, effort: EffortName, examined: Mapping[str, Any]
) -> tuple[list[Choice], list[str], float]:
    """All candidates, the best few of them measured; with what a user has to know, and how busy the host is."""
    from onnxsplit.planning.candidates import DEFAULT_SHARE, to_run
    from runtime.advise import LoadPlan, load_in_turns

    choices = advisor.choices()
    running = to_run(choices, wishes, _MOST_RUN[effort])
    if not running:
        return choices, [], 0.0
    replaced = {id(one): advisor.after_cut(one) for one in running}
    running = list({one.candidate: one for one in replaced.values()}.values())
    choices = [replaced.get(id(one), one) for one in choices]
    load = LoadPlan(rate_per_s=wishes.rate_per_s, p99_ns=wishes.p99_ns, share=DEFAULT_SHARE, **_LOADS[effort])
    contenders = [contender_of(one, advisor) for one in running]
    output.done()
    seconds = sum(load.most_s(one) + _LAUNCH_S for one in contenders)
    output.aside(
        f"{len(choices)} candidates by the model; the best {len(contenders)} are run in turns, which takes at most "
        f"about {seconds:.0f} s."
    )
    disturbed = _busy_share()
    inputs = advisor.inputs()
    with _terminated_as_interrupted():
        results = load_in_turns(
            contenders, inputs, load, custom_ops=examined["custom_ops"], say=_with_time_left(output, seconds)
        )
    found = {one.candidate: result for one, result in zip(running, results, strict=True)}
    notes = _notes(running, results, disturbed)
    return [_measured(one, found.get(one.candidate)) for one in choices], notes, disturbed


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end a load as Ctrl-C does: between two steps of its event loop, and not inside a pipeline's code."""
    before = signal.getsignal(signal.SIGTERM)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    terminated = False

    def interrupt(*_: object) -> None:
        nonlocal terminated
        terminated = True
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if terminated:
            before(signal.SIGTERM, None)


def _with_time_left(output: Output, seconds: float) -> Any:
    end = time.monotonic() + seconds
    return lambda text: output.say(f"{text} (about {max(1.0, end - time.monotonic()):.0f} s left)")


def _busy_share() -> float:
    """The share of this host's cores that others use now."""
    from onnxsplit.machine_load import cpu_times

    before, own_s = cpu_times(), -time.process_time()
    time.sleep(_LOOK_S)
    return cpu_times().busy_share_since(before, own_s + time.process_time())


def contender_of(choice: Choice, advisor: Advisor) -> Contender:
    """What is run for a choice."""
    from runtime.advise import Contender

    candidate, predicted = choice.candidate, choice.predicted
    assert predicted is not None
    return Contender(
        name=candidate.name,
        folder=advisor.plan_folder(candidate),
        replicas=() if candidate.kind == "session" else candidate.replicas,
        threads=candidate.threads,
        max_batch=candidate.max_batch,
        total_bytes=choice.total_bytes,
        alone_ns=round(1e9 / predicted.limit_per_s) * min(candidate.replicas),
    )


def _measured(choice: Choice, result: LoadResult | None) -> Choice:
    """A choice with what was measured of it."""
    from onnxsplit.planning.candidates import Figures

    if result is None:
        return choice
    if result.problem:
        return msgspec.structs.replace(choice, left_out=f"it could not be run: {result.problem}")
    figures = Figures(
        limit_per_s=result.limit_per_s, rate_per_s=result.rate_per_s, p50_ns=result.p50_ns, p99_ns=result.p99_ns
    )
    return msgspec.structs.replace(choice, measured=figures, node_bytes=result.node_bytes)


def _notes(running: Sequence[Choice], results: Sequence[LoadResult], disturbed: float) -> list[str]:
    """What makes the figures doubtful."""
    notes = []
    if disturbed > _BUSY:
        notes.append(
            f"Other processes used {percent(disturbed)} of this host's cores before the runs; on an idle host the "
            "figures are higher, and the pick may be another."
        )
    few = [one.candidate.name for one, result in zip(running, results, strict=True) if 0 < result.requests < _FEW]
    if few:
        notes.append(f"p99 is of fewer than {_FEW} requests, so it is rough: {'; '.join(few)}. Add --effort thorough.")
    notes.append(
        "Requests came from this process at random times, without a network; HTTP or gRPC add their own time to each."
    )
    return notes


def _advice(
    output: Output,
    advisor: Advisor,
    choices: Sequence[Choice],
    wishes: Wishes,
    model: Path,
    keep: Path | None,
    notes: Sequence[str],
    disturbed: float,
    examined: Mapping[str, Any],
) -> Advice:
    """The result, and the plan that is kept."""
    from onnxsplit.planning.candidates import front, keeps_wishes, pick, rate_of
    from onnxsplit.planning.planner import default_plan_folder
    from onnxsplit.views.advice import Advice, AdviceRow
    from onnxsplit.views.advice.words import commands, keep_whole, reason, wishes_text

    picked, best = pick(choices, wishes), front(choices, wishes)
    lines: list[str] = []
    if picked is not None:
        if keep is not None:
            output.say(f"writing {keep}")
            advisor.keep(picked.candidate, keep)
        lines = commands(
            picked.candidate,
            advisor.options_of(picked.candidate),
            model=model,
            plan=keep or default_plan_folder(model),
            kept=keep is not None,
            examined=_words(examined),
            far=bool(picked.not_run),
        )
    rows = [
        AdviceRow(
            name=one.candidate.name,
            choice=one,
            rate_per_s=rate_of(one, wishes),
            on_front=any(one is other for other in best),
            picked=one is picked,
            keeps=keeps_wishes(one, wishes),
        )
        for one in choices
    ]
    rows.sort(key=lambda row: (not row.picked, row.choice.measured is None, bool(row.choice.left_out), -row.rate_per_s))
    return Advice(
        model=str(model),
        wishes=wishes,
        asked=wishes_text(wishes),
        rows=tuple(rows),
        reason=reason(picked, choices, wishes) if picked is not None else "No candidate can be run; see the table.",
        keeps=picked is not None and keeps_wishes(picked, wishes),
        whole=keep_whole(picked.candidate) if picked is not None and picked.candidate.kind == "session" else None,
        commands=tuple(lines),
        notes=tuple(notes),
        disturbed=disturbed,
    )


def _words(examined: Mapping[str, Any]) -> list[str]:
    """The options about the model as words for ``partition``."""
    words = [word for name, size in (examined["dims"] or {}).items() for word in ("--dim", f"{name}={size}")]
    for name, flag in (("inputs", "--inputs"), ("costs", "--costs")):
        words += [flag, str(examined[name])] if examined[name] else []
    words += ["--outputs", ",".join(examined["outputs"])] if examined["outputs"] else []
    for name, flag in (
        ("drop_outputs", "--drop-output"),
        ("keep_inputs", "--keep-input"),
        ("custom_ops", "--custom-ops"),
    ):
        words += [word for value in examined[name] for word in (flag, value)]
    return words + (["--decoder", str(examined["decoder"])] if examined["decoder"] != "auto" else [])


def _show(output: Output, advice: Advice) -> None:
    """Print the candidates that can be chosen, then those that cannot, the pick and its commands."""
    output.line(advice.asked)
    output.line()
    rows = []
    for row in advice.rows:
        figures, predicted, measured = row.choice.figures, row.choice.predicted, row.choice.measured
        if row.choice.left_out or figures is None:
            continue
        rows.append(
            (
                f"{'>' if row.picked else '*' if row.on_front else ' '} {row.name}",
                _number(predicted.limit_per_s if predicted is not None else None),
                _number(measured.limit_per_s if measured is not None else None),
                _number(figures.rate_per_s),
                _number(figures.p50_ns, 1e6),
                _number(figures.p99_ns, 1e6),
                _number(row.choice.memory_bytes, 1 << 20),
                "yes" if row.keeps else "no",
            )
        )
    output.table(
        ("  way x threads", "model/s", "run/s", "at/s", "p50 ms", "p99 ms", "MiB", "fits"),
        rows,
        may_go=("model/s", "p50 ms", "MiB", "at/s", "fits", "p99 ms", "run/s"),
    )
    output.line()
    output.line(
        "Highest rates by the model and by the run; p50 and p99 at the rate beside them; memory of a device. > is "
        "the pick; * is beaten by none in both rate and p99."
    )
    for row in advice.rows:
        if row.choice.left_out or row.choice.not_run:
            output.line(f"{row.name}: {row.choice.left_out or row.choice.not_run}.")
    for text in (*advice.notes, advice.reason):
        output.line(text)
    if advice.whole is not None:
        output.line(advice.whole)
    for number, line in enumerate(advice.commands):
        output.line(f"{'      ' if number else 'Next: '}{line}")


def _number(value: float | None, unit: float = 1.0) -> str:
    """A number in a unit with three digits at least; ``-`` for none."""
    if value is None:
        return "-"
    return f"{value / unit:,.0f}" if value / unit >= 100 else f"{value / unit:.3g}"
