"""Choosing the graph optimisation level: the fastest one whose answers are not wrong."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from onnxsplit.custom_ops import Library
from onnxsplit.distance import distance, is_discrete
from onnxsplit.effort import SLOW_S, TimeBudget
from onnxsplit.errors import ModelRefused
from onnxsplit.npz import load_npz
from onnxsplit.plan import Level
from onnxsplit.tensors import Array
from onnxsplit.timed import TimedModel
from onnxsplit.timed_worker import InPlace

CANDIDATE_LEVELS: tuple[Level, ...] = ("all", "extended", "basic")
"""The optimisation levels to try; the first is usually the best."""

LOWEST_LEVEL: Level = "basic"
"""The level that others are compared with: it keeps the model's ops, and so its answers."""

MOST_MOVED = 0.5
"""The largest accepted move of an answer by optimisation, relative to its scale. Rounding alone moves it less."""

_CLEARLY = 0.97  # another level replaces the usual best one if it takes at most this share of its time


@dataclass(frozen=True)
class LevelChoice:
    """The optimisation level that was chosen.

    Attributes:
        level: the level.
        time_ns: typical cost of one run at this level, in nanoseconds.
        moved: the largest distance between the answers at an allowed level and those at the lowest level, relative to
            the answers' scale.
    """

    level: Level
    time_ns: int
    moved: float


def best_level(
    model: Path,
    inputs: Path,
    *,
    threads: int,
    provider: str,
    budget: TimeBudget,
    data_folder: Path | None = None,
    custom_ops: Sequence[Library] = (),
    in_place: InPlace = (),
) -> LevelChoice:
    """Choose the optimisation level at which a model file runs fastest.

    The usual best (``all``) is kept unless another is clearly faster. Two kinds of levels are left out: levels at which
    ONNX Runtime refuses the model (it cannot optimise some models a second time), and levels at which the answers are
    far from those of the lowest level (some fused kernels are wrong).

    Args:
        model: the model file.
        inputs: an ``.npz`` with its inputs.
        threads: threads of the session.
        provider: execution provider.
        budget: how long to measure.
        data_folder: the folder of the model's external data; beside the file when None.
        custom_ops: libraries of custom ops that the session loads.
        in_place: pairs of an output and the input in whose memory it is written.

    Raises:
        ModelRefused: ONNX Runtime refuses the model at every level.
    """
    open_model = partial(
        TimedModel,
        model,
        inputs,
        threads=threads,
        provider=provider,
        data_folder=data_folder,
        custom_ops=custom_ops,
        in_place=in_place,
    )
    times_ns, answers, again = _tried(open_model, budget)
    *_, lowest = answers
    moved = dict.fromkeys(times_ns, MOST_MOVED)
    if answers_apart(again, answers[lowest]) == 0:  # the model gives the same answers each time
        moved = {level: answers_apart(answers[level], again) for level in times_ns}
        times_ns = {level: time_ns for level, time_ns in times_ns.items() if moved[level] <= MOST_MOVED}
    usual = next(iter(times_ns))
    fastest = min(times_ns, key=lambda level: times_ns[level])
    chosen = fastest if times_ns[fastest] < _CLEARLY * times_ns[usual] else usual
    return LevelChoice(chosen, times_ns[chosen], max(moved[level] for level in times_ns))


def _tried(
    open_model: Callable[..., TimedModel],
    budget: TimeBudget,
) -> tuple[dict[Level, int], dict[Level, dict[str, Array]], dict[str, Array]]:
    """Run a model at every level at which it loads.

    Returns:
        The cost of a run and the answers at each level, and the answers of the last run at the last level.

    Raises:
        ModelRefused: ONNX Runtime refuses the model at every level.
    """
    times_ns: dict[Level, int] = {}
    refused: list[ModelRefused] = []
    answers: dict[Level, dict[str, Array]] = {}
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxsplit-"))) / "out.npz"
        timed: TimedModel | None = None
        slow = False
        for level in CANDIDATE_LEVELS:
            if slow and not budget.stage_levels and level not in (LOWEST_LEVEL, *times_ns):
                continue  # a slow model is run at the usual level, and at the lowest one for its answers
            try:
                if timed is None:
                    timed = stack.enter_context(open_model(level=level))
                else:
                    timed.reload(level)
            except ModelRefused as error:
                refused.append(error)
                continue
            first = timed.run(0.0)
            timed.save_outputs(file)
            answers[level] = load_npz(file)
            run_s = first.wall_ns[0] / 1e9
            slow = slow or run_s > SLOW_S
            more = budget.samples_of(run_s) - budget.least_samples if slow else 3
            times_ns[level] = (
                timed.run(0.0 if slow else 2 * budget.sample_s, least=more).cost_ns if more else first.cost_ns
            )
        if not times_ns:
            raise refused[0]
        assert timed is not None
        timed.save_outputs(file)
        return times_ns, answers, load_npz(file)


def answers_apart(one: Mapping[str, Array], other: Mapping[str, Array]) -> float:
    """The largest distance between two sets of answers, relative to their scale; integers and texts are ignored."""
    return max((distance(one[name], other[name]) for name, array in one.items() if not is_discrete(array)), default=0.0)
