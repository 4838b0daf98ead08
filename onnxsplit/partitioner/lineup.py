"""The orders in which devices can be assigned to consecutive stages.

The stages of a partition without cycles can be numbered so that tensors go to higher stages only. An algorithm goes
through the atoms and assigns devices to one stage after the other. A *state* is the number of devices of each kind that
are used; a *step* is one stage:

    0 --one cpu--> 1 --one cpu--> 2          two stages on two equal devices
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
"""How devices are used: a device for each stage, the whole model on each device, or stages with replicas."""

_SEQUENCES = 24  # the number of orders of devices that are tried where links differ


@dataclass(frozen=True)
class StageStep:
    """One stage in a lineup: the transition from one state to the next.

    Attributes:
        before: the state before the stage.
        after: the state in which the stage's devices are used too; greater than ``before``.
        kind: the kind of the stage's devices.
        replicas: the number of the stage's devices.
        arriving: the link over which the stage receives tensors.
        leaving: the link over which the stage sends tensors.
        caller: the link over which the stage sends outputs to the caller.
        devices: the devices themselves if the lineup fixes them; else empty.
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
    """All orders in which devices can be assigned to stages.

    Attributes:
        states: the number of states; state 0 is the first, in which no device is used.
        steps: the possible stages, in order of ``before``.
        final: the states in which all atoms may be placed.
    """

    states: int
    steps: tuple[StageStep, ...]
    final: frozenset[int]

    @cached_property
    def most_stages(self) -> int:
        """The largest number of stages on a path from state 0 to a final state."""
        longest = [0] * self.states
        for step in self.steps:
            longest[step.after] = max(longest[step.after], longest[step.before] + 1)
        return max((longest[state] for state in self.final), default=0)

    @cached_property
    def exact_stages(self) -> int | None:
        """The number of stages if all paths to a final state have the same number; else None."""
        counts = [count for count in range(self.most_stages + 1) if self.after_stages(count) & self.final]
        return counts[0] if len(counts) == 1 else None

    def after_stages(self, stages: int) -> frozenset[int]:
        """The states that are reached after this number of stages."""
        reached = {0}
        for _ in range(stages):
            reached = {step.after for step in self.steps if step.before in reached}
        return frozenset(reached)

    def devices(self, problem: Problem, steps: Sequence[StageStep]) -> tuple[tuple[int, ...], ...]:
        """The devices of each stage: those that its step names, else the first free devices of its kind."""
        free: dict[int, list[int]] = {}
        for device, kind in enumerate(problem.devices):
            free.setdefault(kind, []).append(device)
        return tuple(step.devices or tuple(free[step.kind].pop(0) for _ in range(step.replicas)) for step in steps)


def line_up(problem: Problem, stages: int | None, parallel: Parallel = "model") -> Lineup:
    """The lineup of a problem's devices in any order.

    Args:
        problem: the problem with its devices.
        stages: the exact number of stages; None allows any number, with idle devices.
        parallel: ``model``: one device for each stage; ``data``: one stage on all devices of a kind; ``hybrid``: a
            stage may have several devices of a kind as replicas.
    """
    counts = [problem.devices.count(kind) for kind in range(len(problem.kinds))]
    used = list(product(*(range(count + 1) for count in counts)))
    used.sort(key=lambda state: (sum(state), state))
    # A hybrid lineup with a fixed number of stages must count the stages in its states.
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
    """Lineups that fix the order of the devices, one device for each stage; empty when all links are alike.

    Up to four devices are tried in all orders. More devices are grouped by the cheapest links, and orders of the groups
    are tried; 24 orders at most.
    """
    if not (problem.links or problem.caller_links):
        return []
    count = len(problem.devices)
    groups = [[device] for device in range(count)]
    if factorial(count) > _SEQUENCES:
        near = _near(problem)
        groups = near if 1 < len(near) < count else groups
    orders = islice(permutations(groups), _SEQUENCES)
    return [fixed_lineup(problem, [(device,) for group in order for device in group], stages) for order in orders]


def _near(problem: Problem) -> list[list[int]]:
    """Groups of devices that the cheapest links join."""

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


def fixed_lineup(problem: Problem, homes: Sequence[tuple[int, ...]], stages: int | None) -> Lineup:
    """The lineup with these devices in this order.

    Args:
        problem: the problem with its links.
        homes: the devices of each stage.
        stages: the exact number of stages; None allows any number of the first ones.
    """
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
