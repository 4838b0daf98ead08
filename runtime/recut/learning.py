"""Learns what is usual for a running plan, without learning a drift. Pure.

The first window is warm-up. The next three make the baseline; up to ten windows in which all devices are as usual
refine it. A mean of several windows is used rather than the least of a few, because the least of noisy times differs
from stage to stage by chance.

If something else used a device while the baseline was taken, the device is faster later than it ever was. So a device
that is faster than when the pipeline started, while none is slower, makes a new baseline, after three windows in a row.
After a swap, a device that the plan was made to find slow may become as fast as it was at the start: that is a drift.

Requests of costs that the baseline lacks are added at the speed that their device has now, so that they do not change
what is usual.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median

from runtime.recut.drift import Baseline, Drift, Place, noise_of
from runtime.recut.window import DriftSettings, Window, total

_HALF = 0.5  # of the way from one speed to another, as logarithms
_HISTORY = 20  # windows from which the noise is taken


@dataclass(frozen=True)
class Expected:
    """What a new plan was made for.

    Attributes:
        times: the time of one run by stage and device in nanoseconds, at the speeds below.
        speeds: the speed of every device, relative to the baseline of the plan before.
    """

    times: Mapping[Place, float]
    speeds: Mapping[str, float]

    def restored(self, baseline: Baseline) -> Baseline:
        """A baseline for the speeds that the plan was made for, where devices have gone back since then.

        A device that goes back before the usual times are known would else be usual with a cut that was made for
        another speed. It has gone back if it is nearer to its speed before than to the one that the plan was made for,
        compared with the devices whose speed was not to change.
        """
        moves: dict[str, list[float]] = {}
        for place, runs in baseline.runs.items():
            requests, ran_ns = total(runs)
            if place in self.times and requests and ran_ns:
                moves.setdefault(place[1], []).append(math.log(ran_ns / requests / self.times[place]))
        steady = [fmean(moves[device]) for device in moves if self.speeds.get(device, 1.0) == 1.0]
        if not steady:
            return baseline
        common, back = median(steady), {}
        for device, found in moves.items():
            made = math.log(self.speeds.get(device, 1.0))
            move = fmean(found) - common
            if made and move / made > _HALF:
                back[device] = math.exp(-made)
        changed = {
            place: {cost: (n, round(ran_ns * back.get(place[1], 1.0))) for cost, (n, ran_ns) in known.items()}
            for place, known in baseline.runs.items()
        }
        return Baseline(changed, baseline.windows)


class Learning:
    """The baseline of one plan while it serves.

    Args:
        settings: when figures count.
        made: the speed of every device that the plan was made for, as a share of that when the pipeline started; 1
            where it lacks a device.
        expected: what the plan was made for; None for the first plan of a pipeline.

    Attributes:
        made: as given.
        baseline: the baseline; None before it is known.
        noise: the noise of the slowness of devices, as the logarithm of a ratio.
        why: why the last window was not compared.
    """

    def __init__(
        self, settings: DriftSettings, made: Mapping[str, float] | None = None, expected: Expected | None = None
    ) -> None:
        self.made = made or {}
        self._expected = expected
        self.baseline: Baseline | None = None
        self.noise = settings.least_noise
        self.why = ""
        self._settings = settings
        self._first: list[Window] | None = None  # None before the warm-up has passed
        self._faster: list[Window] = []
        self._history: deque[Mapping[str, float]] = deque(maxlen=_HISTORY)
        self._slowness: Mapping[str, float] = {}

    def compare(self, window: Window) -> Drift | None:
        """Compare a window with the baseline, and learn from it; None if it cannot be compared, which ``why`` tells."""
        if self.baseline is None:
            self._gather(window)
            return None
        drift = self.baseline.compare(window, self._settings.requests)
        if drift is None:
            self.baseline = self.baseline.learned(window, self._slowness, refines=False)
            self.why = "most requests have sizes that were not seen before; their usual times are learned"
            return None
        self._slowness = drift.devices
        self._history.append(drift.devices)
        self.noise = noise_of(self._history, self._settings)
        if drift.is_faster(self.noise, self.made):
            self._renew(window)
            return None
        self._faster.clear()
        is_usual = all(ratio == 1 for ratio in drift.ratios(self.noise).values())
        if is_usual and self.baseline.windows < self._settings.most_baseline_windows:
            alike = dict.fromkeys(drift.devices, drift.scale(self.noise))
            self.baseline = self.baseline.learned(window, alike, refines=True)
        else:
            self.baseline = self.baseline.learned(window, drift.devices, refines=False)
        return drift

    def _gather(self, window: Window) -> None:
        """Take note of one of the first windows."""
        wanted = self._settings.baseline_windows
        if self._first is None:
            self._first = []
        else:
            self._first.append(window)
        self.why = f"the usual times are being learned: {len(self._first)} of {wanted} windows"
        if len(self._first) == wanted:
            self._begin(self._first)
            if self._expected is not None and self.baseline is not None:
                self.baseline = self._expected.restored(self.baseline)

    def _renew(self, window: Window) -> None:
        """Take note of a window that is faster than the baseline."""
        self._faster.append(window)
        self.why = "a device is faster than it was at the start; its usual times are learned again"
        if len(self._faster) == self._settings.baseline_windows:
            self._begin(self._faster)

    def _begin(self, windows: list[Window]) -> None:
        """Begin with the baseline of some windows."""
        self.baseline = Baseline.of(windows)
        self._history.clear()
        for each in windows:
            if (drift := self.baseline.compare(each, 0)) is not None:
                self._history.append(drift.devices)
        self.noise = noise_of(self._history, self._settings)
        self._slowness, self._faster = {}, []
