"""In which order devices can be lined up along the stages.

Any partition whose stages form no cycle can be numbered so that tensors flow to higher stages only. An algorithm then
walks along the atoms and uses up devices; a *state* is how many devices of each kind are used, a *step* is one stage:

    0 --one cpu--> 1 --one cpu--> 2          two stages on two devices alike
    0 --two cpus as replicas-----> 2         the same devices in a hybrid plan
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, permutations, product
from math import factorial
from typing import Literal

from onnxsplit.cluster import Link
from onnxsplit.partitioner.objective import Problem

Parallel = Literal["model", "data", "hybrid"]
_SEQUENCES = 24  # of devices, tried where links differ


@dataclass(frozen=True)
class StageStep:
    """One more stage.

    Attributes:
        before: state before it.
        after: state with its devices used, too; greater than ``before``.
        kind: the kind of its devices.
        replicas: how many of them.
        arriving: link that tensors come over.
        leaving: link that tensors leave over.
        caller: link that outputs go to the caller over.
        devices: the very devices, where the lineup fixes them.
    """

    before: int
    after: int
    kind: int
    replicas: int
    arriving: Link
    leaving: Link
    caller: Link
    devices: tuple[int, ...] = ()


@dataclass(frozen=True)
class Lineup:
    """All ways to line devices up.

    Attributes:
        states: number of states; 0 is the first, with nothing used.
        steps: stages that can follow, in order of ``before``.
        final: states in which the last atom may be placed.
    """

    states: int
    steps: tuple[StageStep, ...]
    final: frozenset[int]

    @cached_property
    def most_stages(self) -> int:
        """The most stages that any way through has."""
        longest = [0] * self.states
        for step in self.steps:
            longest[step.after] = max(longest[step.after], longest[step.before] + 1)
        return max((longest[state] for state in self.final), default=0)

    @cached_property
    def exact_stages(self) -> int | None:
        """The number of stages, when every way through has the same."""
        counts = [count for count in range(self.most_stages + 1) if self.after_stages(count) & self.final]
        return counts[0] if len(counts) == 1 else None

    def after_stages(self, stages: int) -> frozenset[int]:
        """The states in which so many stages may be done."""
        reached = {0}
        for _ in range(stages):
            reached = {step.after for step in self.steps if step.before in reached}
        return frozenset(reached)

    def devices(self, problem: Problem, steps: Sequence[StageStep]) -> tuple[tuple[int, ...], ...]:
        """Devices for the stages of one way through: those that the steps name, else the first free ones."""
        free: dict[int, list[int]] = {}
        for device, kind in enumerate(problem.devices):
            free.setdefault(kind, []).append(device)
        return tuple(step.devices or tuple(free[step.kind].pop(0) for _ in range(step.replicas)) for step in steps)


def line_up(problem: Problem, stages: int | None, parallel: Parallel = "model") -> Lineup:
    """The lineup of a problem's devices, in any order.

    Args:
        problem: its devices.
        stages: exactly so many stages; any number, idle devices allowed, when None.
        parallel: ``model``: a device a stage; ``data``: one stage on all devices of a kind; ``hybrid``: stages may have
            several devices of a kind as replicas.
    """
    counts = [problem.devices.count(kind) for kind in range(len(problem.kinds))]
    used = list(product(*(range(count + 1) for count in counts)))
    used.sort(key=lambda state: (sum(state), state))
    # Hybrid plans need to know how many stages there were when that number is fixed.
    depths = range(stages + 1) if stages is not None and parallel == "hybrid" else range(1)
    number = {(state, depth): index for index, (state, depth) in enumerate(product(used, depths))}
    link = problem.cheapest_link
    steps = []
    for (state, depth), before in number.items():
        for kind, count in enumerate(counts):
            left = count - state[kind]
            most = {"model": min(1, left), "data": left, "hybrid": left}[parallel]
            least = most if parallel == "data" else 1
            for replicas in range(max(1, least), most + 1):
                following = (*state[:kind], state[kind] + replicas, *state[kind + 1 :])
                after = number.get((following, depth + 1 if len(depths) > 1 else 0))
                if after is not None and (parallel != "data" or before == 0):
                    steps.append(StageStep(before, after, kind, replicas, link, link, problem.cheapest_caller_link))
    final = frozenset(
        index
        for (state, depth), index in number.items()
        if index
        and (stages is None or (sum(state) == stages if parallel == "model" else len(depths) == 1 or depth == stages))
    )
    return Lineup(len(number), tuple(steps), final)


def sequences(problem: Problem, stages: int | None) -> list[Lineup]:
    """Lineups that fix which device follows which, a device a stage, where links differ; else none.

    A few devices are tried in all orders. Of more, those that are joined by the cheapest links stand together; orders
    of such groups are tried.
    """
    if not (problem.links or problem.caller_links):
        return []
    count = len(problem.devices)
    groups = [[device] for device in range(count)]
    if factorial(count) > _SEQUENCES:
        near = _near(problem)
        groups = near if 1 < len(near) < count else groups
    orders = islice(permutations(groups), _SEQUENCES)
    return [fixed(problem, [(device,) for group in order for device in group], stages) for order in orders]


def _near(problem: Problem) -> list[list[int]]:
    """Groups of devices that are joined by the cheapest links."""

    def cost(one: int, other: int) -> int:
        return problem.link_between((one,), (other,)).transfer_ns(1 << 20)

    count = len(problem.devices)
    cheapest = min((cost(a, b) for a in range(count) for b in range(a)), default=0)
    groups: list[list[int]] = []
    for device in range(count):
        group = next((group for group in groups if cost(group[0], device) <= cheapest), None)
        if group is not None:
            group.append(device)
        else:
            groups.append([device])
    return groups


def fixed(problem: Problem, homes: Sequence[tuple[int, ...]], stages: int | None) -> Lineup:
    """The lineup of stages on just these devices, in this order; ``stages`` of them, or any number of the first."""
    steps = []
    for position, devices in enumerate(homes):
        caller = problem.caller_link(devices)
        before, after = position > 0, position + 1 < len(homes)
        arriving = problem.link_between(devices, homes[position - 1]) if before else caller
        leaving = problem.link_between(devices, homes[position + 1]) if after else caller
        kind = problem.devices[devices[0]]
        steps.append(StageStep(position, position + 1, kind, len(devices), arriving, leaving, caller, devices))
    final = range(1, len(homes) + 1) if stages is None else (stages,)
    return Lineup(len(homes) + 1, tuple(steps), frozenset(final))
