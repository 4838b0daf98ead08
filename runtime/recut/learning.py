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

from collections import deque
from collections.abc import Mapping

from runtime.recut.drift import Baseline, Drift, noise_of
from runtime.recut.window import DriftSettings, Window

_HISTORY = 20  # windows from which the noise is taken


class Learning:
    """The baseline of one plan while it serves.

    Args:
        settings: when figures count.
        made: the speed of every device that the plan was made for, as a share of that when the pipeline started; 1
            where it lacks a device.

    Attributes:
        made: as given.
        baseline: the baseline; None before it is known.
        noise: the noise of the slowness of devices, as the logarithm of a ratio.
        why: why the last window was not compared.
    """

    def __init__(self, settings: DriftSettings, made: Mapping[str, float] | None = None) -> None:
        self.made = made or {}
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
