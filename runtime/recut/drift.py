"""Finds devices that are slower or faster than before, from the session times of a running pipeline. Pure.

    look, look        sums since the pipeline started
    `-- Window        what happened between two looks; windows that follow each other are added until they are enough
        `-- Baseline  the first windows: mean session time of each stage, device and cost of requests
            `-- Drift how slow each device is now, compared with the baseline at equal costs

A window is enough when it has covered 3 s and every stage has answered 10 requests. Three windows in a row are needed
for a decision, so at least 30 requests of every stage stand behind one.

Slowness is a ratio of session times: 2 means that a device takes twice as long as in the baseline. All ratios are
divided by the median over the stages (of an even number, the lesser of the two in the middle; of two stages, the
lesser). If the machine as a whole is slower, all ratios stay at 1, because no other cut would help. A ratio within the
noise is 1. The noise is twice the standard deviation of the ratios between windows, estimated from the differences of
successive windows. One step in the speed is one large difference, so it does not count as noise.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, geometric_mean, median, median_high, median_low
from typing import NamedTuple, TypeVar

from runtime.coordinator.counters import OTHER_COSTS
from runtime.recut.window import DriftSettings, Runs, Window, added

_Key = TypeVar("_Key", bound=Hashable)

_MOST_SLOWNESS = 16.0  # a larger ratio, or one below the inverse, counts as this one
_MOST_NOISE = 1.0  # as the logarithm of a ratio
_SURELY = 0.1  # speeds of plans are estimates: a device must be faster by this and the noise than at the start
_DEVIATIONS = 2.0  # the noise, in standard deviations
_DIFFERENCE_TO_DEVIATION = 1.048  # 1 / (0.6745 * sqrt(2)): from the median difference of two normal values

Place = tuple[int, str]
"""A stage and a device that executes it."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """A window compared with a baseline, without scaling.

    Attributes:
        devices: session time over that of the baseline at equal costs, by device.
        stages: the same by stage.
        places: mean session time in ns that the baseline has for the requests of this window, by stage and device.
    """

    devices: Mapping[str, float]
    stages: Mapping[int, float]
    places: Mapping[Place, float]

    def scale(self, noise: float) -> float:
        """The slowness that is common to the stages: the mean of those that are within the noise of their median."""
        middle = median_low(self.stages.values())
        return geometric_mean(each for each in self.stages.values() if abs(math.log(each / middle)) <= noise)

    def ratios(self, noise: float) -> dict[str, float]:
        """The slowness of every device over what is common to the stages; 1 within the noise.

        Args:
            noise: the noise, as the logarithm of a ratio.
        """
        scale = self.scale(noise)
        found = {device: slowness / scale for device, slowness in self.devices.items()}
        return {device: 1.0 if abs(math.log(ratio)) <= noise else ratio for device, ratio in found.items()}

    def is_faster(self, noise: float, speeds: Mapping[str, float]) -> bool:
        """Whether no device is slower than in the baseline, and one is faster than it was when the pipeline started.

        The baseline was then taken while something else used that device. If most stages are faster, the machine is,
        and a device that is not is slower than the others.

        Args:
            noise: the noise.
            speeds: the speed of every device in the baseline, as a share of that when the pipeline started; 1 where it
                lacks a device.
        """
        scale = min(1.0, median_high(self.stages.values()))
        ratios = {device: math.log(slowness / scale) for device, slowness in self.devices.items()}
        return max(ratios.values()) <= noise and any(
            math.log(speeds.get(device, 1.0)) - ratio > noise + _SURELY for device, ratio in ratios.items()
        )


@dataclass(frozen=True)
class Baseline:
    """The session times that count as usual.

    Attributes:
        runs: requests and their session times by cost, of every stage on every device.
        windows: number of windows that they are from.
    """

    runs: Mapping[Place, Runs]
    windows: int

    @classmethod
    def of(cls, windows: Sequence[Window]) -> Baseline:
        """The mean of some windows."""
        total: dict[Place, Runs] = {}
        for window in windows:
            for place, runs in _by_place(window).items():
                total[place] = added(total.get(place, {}), runs)
        return cls(total, len(windows))

    def compare(self, window: Window, least_requests: int) -> Drift | None:
        """Compare a window with this baseline, at equal costs.

        Requests of costs that the baseline does not have, or that share one entry of the counters, do not count. None
        if a stage has fewer than ``least_requests`` others.
        """
        matched: dict[Place, _Matched] = {}
        for place, runs in _by_place(window).items():
            known = self.runs.get(place, {})
            common = {cost: each for cost, each in runs.items() if cost in known and cost != OTHER_COSTS}
            if common:
                matched[place] = _Matched(
                    sum(requests for requests, _ in common.values()),
                    sum(ran_ns for _, ran_ns in common.values()),
                    sum(requests * known[cost][1] / known[cost][0] for cost, (requests, _) in common.items()),
                )
        if any(
            sum(each.requests for place, each in matched.items() if place[0] == stage) < least_requests
            for stage, _ in window.nodes
        ):
            return None
        return Drift(
            devices=_slowness({device: [m for p, m in matched.items() if p[1] == device] for _, device in matched}),
            stages=_slowness({stage: [m for p, m in matched.items() if p[0] == stage] for stage, _ in matched}),
            places={place: each.usual_ns / each.requests for place, each in matched.items()},
        )

    def learned(self, window: Window, slowness: Mapping[str, float], *, refines: bool) -> Baseline:
        """This baseline with more requests, whose times are divided by the slowness of their devices.

        Args:
            window: the window that has them.
            slowness: session time over that of the baseline, by device; devices that it lacks count as unchanged.
            refines: whether requests of costs that the baseline has are added too.
        """
        runs = dict(self.runs)
        for place, more in _by_place(window).items():
            known, factor = runs.get(place, {}), slowness.get(place[1], 1.0)
            wanted = {cost: (n, round(ran / factor)) for cost, (n, ran) in more.items() if refines or cost not in known}
            if wanted:
                runs[place] = added(known, wanted)
        return Baseline(runs, self.windows + refines)


class _Matched(NamedTuple):
    """Requests whose costs the baseline has, their session times, and those that the baseline has for them, in ns."""

    requests: int
    ran_ns: int
    usual_ns: float


def _slowness(groups: Mapping[_Key, Sequence[_Matched]]) -> dict[_Key, float]:
    """The session time of each group over the usual one, within bounds."""
    found = {}
    for key, group in groups.items():
        ran_ns, usual_ns = sum(each.ran_ns for each in group), sum(each.usual_ns for each in group)
        found[key] = min(max(ran_ns / max(1.0, usual_ns), 1 / _MOST_SLOWNESS), _MOST_SLOWNESS)
    return found


def _by_place(window: Window) -> dict[Place, Runs]:
    """The figures of a window that count, of every stage on every device."""
    places: dict[Place, Runs] = {}
    for stage, nodes in window.stages.items():
        for node in nodes:
            places[stage, node.device] = added(places.get((stage, node.device), {}), node.runs)
    return places


def noise_of(windows: Iterable[Mapping[str, float]], settings: DriftSettings) -> float:
    """The noise of the slowness of devices, as the logarithm of a ratio.

    Args:
        windows: the slowness of every device in successive windows. What is common to all devices is no noise.
        settings: the least noise.
    """
    steps = []
    for before, later in pairwise(windows):
        moves = [math.log(later[device] / before[device]) for device in sorted(before.keys() & later.keys())]
        if len(moves) > 1:
            freedom = math.sqrt(len(moves) / (len(moves) - 1))
            steps += [freedom * abs(move - fmean(moves)) for move in moves]
    deviation = _DIFFERENCE_TO_DEVIATION * median(steps) if steps else 0.0
    return min(max(_DEVIATIONS * deviation, settings.least_noise), _MOST_NOISE)
