"""Planning a plan anew: another cut of the same model, from the costs that the plan carries.

The model is rebuilt from the plan's stages. Nothing is run or measured, so this takes seconds. Both cuts are scored
with the same costs on the same devices:

    plan.json, costs.npz -> model and costs -> devices at other speeds -> search -> new stages, from the old files
                                                    |
                                           score of the old cut: gain = old / new
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from onnxsplit.errors import PlanError, shown
from onnxsplit.files import new_folder
from onnxsplit.numbers import MOST_GAIN_PERCENT, real_problem, speed_problem, whole_problem
from onnxsplit.plan import PLAN_FILE, Plan
from onnxsplit.plan_files import check_content, check_plan_folder, checked_json, parse_plan, plan_id, read_plan_file
from onnxsplit.plan_target import PlanTarget
from onnxsplit.planning.plan_builder import CandidateCut
from onnxsplit.planning.replanning import Replanning
from onnxsplit.progress import Say, silent

_MOST_NS = 2**53 - 1


@dataclass(frozen=True)
class StageTime:
    """A stage in one of the two cuts: the names of its devices, and its time between two requests in nanoseconds."""

    devices: tuple[str, ...]
    time_ns: int


@dataclass(frozen=True)
class Replanned:
    """The result of planning anew.

    Attributes:
        plan: the plan that was written; the old one if none was.
        parent: the identity of the old plan.
        folder: the folder of the new plan; None if nothing was written, because the gain is too small.
        speeds: the speed of each device relative to when the old plan was made, by name.
        gain: the old cut's value of the objective divided by that of the best cut found; 1 if none is better.
        old_ns: value of the old cut with these costs and speeds, in nanoseconds: the time between two requests, or for
            the objective ``latency`` the time of one.
        new_ns: the same for the best cut found.
        old_stages: the stages of the old cut.
        new_stages: the stages of the best cut found.
        seconds: time of each step: ``reading``, ``search`` and ``writing``.
    """

    plan: Plan
    parent: str
    folder: Path | None
    speeds: Mapping[str, float]
    gain: float
    old_ns: int
    new_ns: int
    old_stages: tuple[StageTime, ...]
    new_stages: tuple[StageTime, ...]
    seconds: Mapping[str, float]


def replan(
    plan: str | Path,
    *,
    out: str | Path,
    speeds: Mapping[str, float] | None = None,
    stage_times_ns: Sequence[int] | None = None,
    least_gain: float = 0.0,
    say: Say = silent,
) -> Replanned:
    """Cut the model of a plan again, for devices whose speed has changed. Neither the model nor a run is needed.

    Args:
        plan: the plan directory. It must carry its costs, and it stays as it is.
        out: the directory of the new plan. An existing plan is replaced as a whole.
        speeds: the speed of devices relative to when the plan was made, such as 0.5 for half as fast. A key is a
            device's name, or a host's name for all its devices; the number of a device if the plan has no cluster. A
            device's own speed comes before its host's. Devices that are not named are as fast as before.
        stage_times_ns: what a run of each stage of the plan takes on its device at the speed that the device had when
            the plan was made, in nanoseconds; None for what the plan says.
        least_gain: the gain in percent below which nothing is written. Nothing is written without a gain either.
        say: called with each step.

    Raises:
        PlanError: the plan is damaged, carries no costs, was cut at named tensors or for the objective ``memory``; an
            argument does not fit it; or ``out`` is something other than a plan.
        PartitionError: no cut keeps every limit, or a file cannot be written.
    """
    began = time.monotonic()
    folder, out = Path(plan), Path(out)
    text = read_plan_file(folder)
    before = parse_plan(text, where=folder)
    given = _device_speeds(_target(folder, before), speeds or {})
    _check_numbers(before, stage_times_ns, least_gain)
    _check_out(out, folder)
    with _compared(folder, before):
        say("reading the plan")
        work = Replanning(folder, before, given, stage_times_ns)
        read = time.monotonic()
        say("searching")
        old, new = work.old_cut(), work.new_cut()
        searched = time.monotonic()
    better = new.score.feasible and new.score.value < old.score.value
    gain = old.score.value / max(1, new.score.value) if better else 1.0
    writes = better and gain >= 1 + least_gain / 100
    if writes:
        say("writing the stages")
        after = _write(work, new, out, plan_id(text))
    best = new if better else old
    return Replanned(
        plan=after if writes else before,
        parent=plan_id(text),
        folder=out if writes else None,
        speeds=given,
        gain=gain,
        old_ns=old.score.value,
        new_ns=best.score.value,
        old_stages=_stage_times(work, old),
        new_stages=_stage_times(work, best),
        seconds={"reading": read - began, "search": searched - read, "writing": time.monotonic() - searched},
    )


def _write(work: Replanning, cut: CandidateCut, out: Path, parent: str) -> Plan:
    """Write the plan directory of a cut, as a whole or not at all."""
    with new_folder(out) as draft:
        plan = work.written(cut, draft, parent)
        (draft / PLAN_FILE).write_bytes(checked_json(plan))
    return plan


def _stage_times(work: Replanning, cut: CandidateCut) -> tuple[StageTime, ...]:
    return tuple(StageTime(*one) for one in work.times(cut))


@contextmanager
def _compared(folder: Path, plan: Plan) -> Iterator[None]:
    """Compare the files with the plan while the ``with`` block runs. Damage comes before other errors.

    Raises:
        PlanError: a file is missing or was changed.
    """
    with ThreadPoolExecutor(1) as beside:
        content = beside.submit(check_content, folder, plan)
        try:
            yield
        except Exception:
            content.result()
            raise
        content.result()


def _target(folder: Path, plan: Plan) -> PlanTarget:
    """What a plan was made for.

    Raises:
        PlanError: it cannot be planned anew; says why, and what to do.
    """
    if (problem := plan.why_fixed()) is not None:
        raise PlanError(f"{folder} {problem}")
    assert plan.target is not None
    return plan.target


def _device_speeds(made_for: PlanTarget, speeds: Mapping[str, float]) -> dict[str, float]:
    """The relative speed of every device by name.

    Raises:
        PlanError: a name or a number is not allowed.
    """
    names = [device.name for device in made_for.devices]
    hosts = dict.fromkeys(device.host for device in made_for.devices)
    for name, speed in speeds.items():
        if name not in names and name not in hosts:
            raise PlanError(
                f"speeds: {shown(name)} is neither a device nor a host of the plan. Devices: {', '.join(names)}; "
                f"hosts: {', '.join(hosts)}"
            )
        if problem := speed_problem(name, speed):
            raise PlanError(problem)
    return {device.name: float(speeds.get(device.name, speeds.get(device.host, 1.0))) for device in made_for.devices}


def _check_out(out: Path, folder: Path) -> None:
    check_plan_folder(out)
    new, old = out.resolve(), folder.resolve()
    if new == old or new in old.parents or old in new.parents:
        raise PlanError(
            f"the new plan cannot take the place of {folder}, which it is made from, nor hold it or lie in it; give "
            "another -o DIR"
        )


def _check_numbers(plan: Plan, stage_times_ns: Sequence[int] | None, least_gain: float) -> None:
    if stage_times_ns is not None and len(stage_times_ns) != len(plan.stages):
        raise PlanError(f"{len(stage_times_ns)} times were given for the {len(plan.stages)} stages of the plan")
    problems = [whole_problem("the time of a stage in ns", time_ns, 1, _MOST_NS) for time_ns in stage_times_ns or ()]
    problems.append(real_problem("--least-gain", least_gain, MOST_GAIN_PERCENT, zero=True))
    if any(problems):
        raise PlanError("; ".join(problem for problem in problems if problem))
