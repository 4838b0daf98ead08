"""Is what plans say about cutting true: stages beside one session and replicas?

Each model is cut into each number of stages with defaults. Then all ways that the verdicts of its plans name are run in
turns: every plan as a pipeline with as many requests under way as it admits, the whole model in one session with one
thread and with all cores, and replicas of the whole model in a pipeline. Weights that are inputs, too, are constants.

A pair of ways is a claim if their measured rates differ by more than 10 % and the whole 95 % interval of the ratio is
on one side of 1. The column *right* says for how many of these pairs the plan orders the rates as measured. The column
*text* says whether the sentence is true: it must say that cutting is slower if the measured ratio to one session is
a claim, and must not if the opposite is one. *Pays* says the same of the plan's ``cut_pays`` and all ways.

*Busy* is the share of the cores that others used when the plan was made, *others* when the rates were measured: rates
of several processes or threads are only true on an idle machine. The last columns have the predicted or stated rate
over the measured one.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import example_models, harness
from onnxsplit.machine_load import cpu_times
from onnxsplit.model.in_memory import open_any, runnable
from onnxsplit.plan import Plan
from onnxsplit.plan_verdict import WayToRun
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import examine_for, write_plan
from onnxsplit.planning.subject import Subject
from onnxsplit.session import threads_per_node
from onnxsplit.timed import TimedModel
from runtime import Pipeline

TAKES = "12 min"

CLAIM = 1.1
"""The ratio of two rates above which a plan has to know which is the higher one."""

LEAST_TURNS = 3
"""How many requests a node of a pipeline serves at least in a slice, the first of which does not count."""

BUSY = 0.1
"""The share of the cores that others may use before measured rates are doubted."""

MODEL_S = 30.0
"""About how many seconds the slices of a model may take; a model gets at least two slices of each way."""

Way = tuple[str, int, int]
"""The kind of a way to run a model, its count, and the threads of each session."""
Rates = Mapping[Way, Sequence[float]]


@dataclass(frozen=True)
class Judged:
    """One verdict beside the measured rates.

    Attributes:
        figures: the figures of its row.
        right: how many pairs of ways the plan orders as measured.
        wrong: the other pairs, in words.
    """

    figures: dict[str, Any]
    right: int
    wrong: list[str]


def way_of(way: WayToRun) -> Way:
    """The key of a way that a verdict names."""
    return way.kind, way.count, way.threads


def words(way: Way) -> str:
    """Name a way."""
    kind, count, threads = way
    return f"session x{threads}" if kind == "session" else f"{count} {kind}"


def pipeline_rate(pipeline: Pipeline, inputs: Mapping[str, Any], seconds: float) -> float:
    """Measure the requests per second while the pipeline is full.

    The first request of each node fills the pipeline and does not count; neither do those that end while it empties.
    Whole turns of the nodes are counted, because replicas end their requests nearly at the same time.
    """
    nodes, ends = len(pipeline.nodes), list[float]()
    futures, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(ends) < LEAST_TURNS * nodes:
        futures.append(pipeline.submit(inputs))
        futures[-1].add_done_callback(lambda _: ends.append(time.perf_counter()))
    counted = sorted(ends[: len(ends) // nodes * nodes])
    for future in futures:
        future.result()
    return (len(counted) - nodes) / (counted[-1] - counted[nodes - 1])


def session_rate(timed: TimedModel, seconds: float) -> float:
    """Measure the runs per second of a session that is called directly."""
    wall_ns = timed.run(seconds, least=2).wall_ns
    return len(wall_ns) * 1e9 / sum(wall_ns)


def load_of_others() -> float:
    """The share of the cores that other processes use while this one waits for a moment."""
    before = cpu_times()
    time.sleep(0.5)
    return cpu_times().busy_share_since(before)


def plans_of(model: Path, dims: Mapping[str, int], stages: Sequence[int], folder: Path) -> dict[int, Plan]:
    """Cut a model with defaults into each number of stages; leave out those that it has too few ops for.

    ``whole.plan`` becomes the plan for replicas of the whole model.
    """
    plans, subjects = dict[int, Plan](), dict[int, Subject]()
    for count in stages:
        options, threads = CutOptions(stages=count), threads_per_node(count)
        if threads not in subjects:
            subjects[threads] = examine_for(model, options, dims=dims)
        if count > len(subjects[threads].atoms.ops):
            print(f"  {count} stages: the model has too few ops for them", file=sys.stderr)
            continue
        plans[count] = write_plan(subjects[threads], folder / f"{count}.plan", options).plan
    if any(way.kind == "replicas" for plan in plans.values() for way in ways_of(plan)):
        whole = CutOptions(parallel="data", devices=2, effort="quick")
        write_plan(subjects[min(subjects)], folder / "whole.plan", whole)
    return plans


def ways_of(plan: Plan) -> tuple[WayToRun, ...]:
    """The ways that the verdict of a plan names."""
    return plan.verdict.ways if plan.verdict is not None else ()


def measured(model: Path, plans: Mapping[int, Plan], folder: Path, slices: int, seconds: float) -> Rates:
    """Run all ways that the plans name, in turns; return the rates of the slices. Slow models get fewer slices."""
    said = {way_of(way): way.throughput_per_s for plan in plans.values() for way in ways_of(plan)}
    count, plan = next(iter(plans.items()))
    example, inputs = harness.example_path(folder / f"{count}.plan"), harness.example(folder / f"{count}.plan")
    level = plan.costs.whole_optimization_level
    turn_s = sum(max(seconds, LEAST_TURNS * way[1] / rate) for way, rate in said.items())
    slices = max(2, min(slices, int(MODEL_S / turn_s)))
    with ExitStack() as stack:
        file = stack.enter_context(runnable(open_any(model), as_in_stages=True))
        contenders: dict[Way, Callable[[], float]] = {}
        for way in sorted(said):
            kind, number, threads = way
            if kind == "session":
                timed = stack.enter_context(
                    TimedModel(file.path, example, threads=threads, level=level, data_folder=file.data_folder)
                )
                contenders[way] = partial(session_rate, timed, seconds)
            else:
                cut = folder / ("whole.plan" if kind == "replicas" else f"{number}.plan")
                replicas = {"replicas": number} if kind == "replicas" else {}
                pipeline = stack.enter_context(Pipeline.launch(cut, threads=threads, **replicas))
                contenders[way] = partial(pipeline_rate, pipeline, inputs, seconds)
        return harness.in_turns(contenders, slices)  # type: ignore[arg-type,return-value]


def claim(rates: Rates, one: Way, other: Way) -> harness.Ratio | None:
    """The ratio of two measured rates, the higher one first; None unless they are clearly more than 10 % apart."""
    found = harness.ratio(rates[one], rates[other])
    return found if found.median > CLAIM and found.low > 1 else None


def judge(name: str, stages: int, plan: Plan, rates: Rates) -> Judged:
    """Compare the verdict of a plan with the measured rates."""
    assert plan.verdict is not None
    said = {way_of(way): way.throughput_per_s for way in plan.verdict.ways}
    right, wrong = 0, []
    for pair in itertools.permutations(said, 2):
        if (apart := claim(rates, *pair)) is None:
            continue
        if said[pair[0]] > said[pair[1]]:
            right += 1
        else:
            wrong.append(f"{words(pair[0])} / {words(pair[1])}: {apart}, said {said[pair[0]] / said[pair[1]]:.3f}")
    first, alone = list(said)[:2]
    slower = "slower" in plan.verdict.text
    false = claim(rates, alone, first) is not None if not slower else claim(rates, first, alone) is not None
    rivals = [way_of(way) for way in plan.verdict.ways[1:] if way.fits]
    beaten = any(claim(rates, rival, first) is not None for rival in rivals)
    beats_all = all(claim(rates, first, rival) is not None for rival in rivals)
    off = {way: said[way] / statistics.median(rates[way]) for way in said}
    figures = {
        "model": name,
        "stages": stages,
        "right": f"{right}/{right + len(wrong)}",
        "text": "false" if false else "true",
        "pays": "false" if (beaten if plan.verdict.cut_pays else beats_all) else "true",
        "interval": plan.costs.interval,
        "busy": plan.costs.disturbed,
        "stages_off": off[first],
        "one_off": off[alone],
        "wide_off": next((off[way] for way in list(said)[2:] if way[0] == "session"), None),
        "replicas_off": next((off[way] for way in said if way[0] == "replicas"), None),
        "per_s": {words(way): round(statistics.median(rates[way]), 2) for way in said},
        "said_per_s": {words(way): round(rate, 2) for way, rate in said.items()},
        "verdict": plan.verdict.text,
        "wrong": wrong,
    }
    return Judged(figures, right, wrong)


def main() -> None:
    """Print a row for each plan, then the total and what was wrong."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*", metavar="NAME|MODEL.onnx")
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--slices", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="length of a slice of each way")
    parser.add_argument("--minutes", type=float, default=12.0, help="no model is begun later than this")
    given = parser.parse_args()
    report = harness.Report(
        given, model="22", stages="6", right="5", text="5", pays="5", interval="8.0%", busy="6.0%", others="6.0%",
        stages_off="10.2f", one_off="7.2f", wide_off="8.2f", replicas_off="12.2f",
    )  # fmt: skip

    def work(case: example_models.Named) -> list[Judged]:
        name, model, dims = case
        with tempfile.TemporaryDirectory(prefix="onnxsplit-") as temporary:
            folder = Path(temporary)
            plans = plans_of(model, dims, given.stages, folder)
            others = load_of_others()
            rates = measured(model, plans, folder, given.slices, given.seconds) if plans else {}
            judged = [judge(name, count, plan, rates) for count, plan in plans.items()]
            return [replace(one, figures=one.figures | {"others": others}) for one in judged]

    judged: list[Judged] = []
    attempts = harness.Attempts(given.minutes)
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as models:
        places = given.names, Path(models)
        for found in attempts(example_models.every(*places), example_models.forests(*places), work=work):
            for one in found:
                report.row(one.figures)
            judged += found
    right, wrong = sum(one.right for one in judged), sum(len(one.wrong) for one in judged)
    report.note(
        f"{attempts.summary()}\n{len(judged)} plans; the order of two ways is right in {right} of {right + wrong}"
    )
    if any(one.figures["others"] > BUSY for one in judged):
        report.note("Other processes used the cores: the measured rates are not those of an idle machine.")
    for column in ("text", "pays"):
        true = sum(one.figures[column] == "true" for one in judged)
        report.note(f"{column}: true in {true} of {len(judged)}")
    for one in judged:
        bad = [column for column in ("text", "pays") if one.figures[column] == "false"]
        if one.wrong or bad:
            report.note(f"\n{one.figures['model']}, {one.figures['stages']} stages: {one.figures['verdict']}")
            report.note("\n".join(f"  wrong: {line}" for line in [*one.wrong, *bad]))


if __name__ == "__main__":
    main()
