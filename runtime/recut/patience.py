"""How long speeds have stayed as they are, and when another plan may be made. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

from runtime.recut.gain import NewPlan

_DRIFT = math.log(1.15)  # a device that is slower or faster by this has drifted, though no new cut may be needed
_FLAP_NS = 600 * 10**9  # a drift that ends sooner makes the next one wait
_REMEMBER_NS = 1800 * 10**9  # for so long
_RETRY_NS = 300 * 10**9  # until planning that has failed is tried again at the same speeds
_NEVER_NS = -(1 << 62)


def are_alike(one: Mapping[str, float], other: Mapping[str, float], tolerance: float) -> bool:
    """Whether no ratio differs by more than ``tolerance``, the logarithm of a ratio. A device that is absent has 1."""
    return all(
        abs(math.log(one.get(device, 1.0) / other.get(device, 1.0))) <= tolerance
        for device in one.keys() | other.keys()
    )


class Stays:
    """The times in which speeds stayed as they were, and how long drifts of devices lasted that have ended.

    A stay also ends when a drift that a new cut may mend comes into sight or is out of sight.

    Attributes:
        since_ns: when the present stay began.
        windows: number of its windows.
    """

    def __init__(self) -> None:
        self.since_ns = 0
        self.windows = 0
        self._level: dict[str, float] = {}  # the geometric mean of its ratios
        self._is_sighted = False
        self._drifts: dict[str, int] = {}  # since when each device has been slower or faster
        self._ended: deque[tuple[int, int]] = deque()  # drifts: when they ended, and how long they were

    def note(
        self, start_ns: int, now_ns: int, ratios: Mapping[str, float], tolerance: float, *, is_sighted: bool
    ) -> None:
        """Take note of a window.

        Args:
            start_ns: its beginning.
            now_ns: its end.
            ratios: the slowness of every device.
            tolerance: speeds that differ by less, as the logarithm of a ratio, are the same.
            is_sighted: whether a drift is in sight that a new cut may mend.
        """
        for device, ratio in ratios.items():
            self._follow(device, math.log(ratio), tolerance, start_ns)
        if is_sighted != self._is_sighted or not self.windows or not are_alike(ratios, self._level, tolerance):
            self.since_ns, self.windows, self._level, self._is_sighted = start_ns, 0, {}, is_sighted
        self.windows += 1
        for device, ratio in ratios.items():
            mean = self._level.get(device, ratio)
            self._level[device] = mean * (ratio / mean) ** (1 / self.windows)
        while self._ended and now_ns - self._ended[0][0] > _REMEMBER_NS:
            self._ended.popleft()

    def _follow(self, device: str, ratio: float, tolerance: float, now_ns: int) -> None:
        """Take note of the drift of a device. It ends when the device goes back, by however much; not if it goes on."""
        level = math.log(self._level.get(device, 1.0))
        goes_back = level * (ratio - level) < 0 and abs(ratio - level) > tolerance
        if goes_back and device in self._drifts:
            length_ns = now_ns - self._drifts.pop(device)
            if length_ns < _FLAP_NS:
                self._ended.append((now_ns, length_ns))
        if abs(ratio) >= _DRIFT:
            self._drifts.setdefault(device, now_ns)

    def needed_ns(self) -> int:
        """How long the present stay must last: twice as long as any drift that has ended."""
        return 2 * max((length_ns for _, length_ns in self._ended), default=0)

    def begin(self) -> None:
        """Forget the present stay, because another plan serves. Drifts that have ended are kept."""
        self.windows = 0
        self._level.clear()
        self._drifts.clear()


class Planning:
    """When a plan is made, so that planning takes a small share of the time in the long run.

    Args:
        every_s: least time between two plannings while the last plan still gains enough.
        again_s: the same if it does not gain enough any more.
        share: share of the time that planning takes in the long run.
        credit_s: time that planning may take at once.

    Attributes:
        candidate: the last plan; None if there is none.
        is_under_way: whether a plan is being made.
        problem: why the last plan could not be made; empty if it could.
    """

    def __init__(self, *, every_s: float, again_s: float, share: float, credit_s: float) -> None:
        self.candidate: NewPlan | None = None
        self.is_under_way = False
        self.problem = ""
        self._every_s, self._again_s, self._share, self._most_s = every_s, again_s, share, credit_s
        self._asked: Mapping[str, float] | None = None
        self._begun_ns = _NEVER_NS
        self._credit_s, self._credit_ns = credit_s, 0

    def wants(self, speeds: Mapping[str, float], tolerance: float, now_ns: int, *, is_useful: bool) -> bool:
        """Whether another plan is to be made: the speeds are others than those of the last one, and it is time.

        Args:
            speeds: the speed of every device now.
            tolerance: speeds that differ by less, as the logarithm of a ratio, are the same.
            now_ns: the time.
            is_useful: whether the last plan gains enough at these speeds.
        """
        same = self._asked is not None and are_alike(speeds, self._asked, tolerance)
        if self.problem and now_ns - self._begun_ns > _RETRY_NS:
            same = False
        if self.is_under_way or same:
            return False
        self._credit_s = min(self._most_s, self._credit_s + self._share * (now_ns - self._credit_ns) / 1e9)
        self._credit_ns = now_ns
        waited_s = (now_ns - self._begun_ns) / 1e9
        return waited_s >= (self._every_s if is_useful else self._again_s) and self._credit_s > 0

    def begin(self, speeds: Mapping[str, float], now_ns: int) -> None:
        """A plan for these speeds is being made."""
        self.is_under_way, self._asked, self._begun_ns = True, speeds, now_ns

    def end(self, candidate: NewPlan | None, now_ns: int, problem: str = "") -> None:
        """The plan was made; None if there is none, or ``problem`` says why it could not be made."""
        self.is_under_way, self.candidate, self.problem = False, candidate, problem
        self._credit_s -= (now_ns - self._begun_ns) / 1e9

    @property
    def story(self) -> str:
        """Why there is no plan, in words."""
        if self.is_under_way:
            return "a new cut is being planned"
        return f"no new cut could be planned: {self.problem}" if self.problem else "no cut is better"

    def forget(self) -> None:
        """Forget the last plan, because another plan serves or the last one did not load."""
        self.candidate, self._asked = None, None
