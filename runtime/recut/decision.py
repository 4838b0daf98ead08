"""Decides when a pipeline is cut again, from windows of its figures. Pure: the caller gives windows and times.

    STEADY --- three windows in a row gain ---> LOADING --- swapped ---> PROVING --- kept -----------> STEADY
                                                   |                        `------- rolled back ----> STEADY
                                                   `--- failed ---> STEADY

In STEADY, every window is compared with the baseline. A *stay* is a time in which the speeds did not change by more
than the noise. A drift is in sight when the speeds alone promise the least gain. When a second window of the same stay
confirms it, a plan is wanted, so that planning takes place while further windows come in. A re-cut needs all of this:

    gain          in each of three usable windows in a row, the plan gains at least 15 % at the speeds of that window
    explanation   in each of them, the times of the stages explain the rate, and the slowest stage is mostly busy
    lasting       the stay is twice as long as each drift of the last half hour that ended within ten minutes
    worth         gain x expected stay (twice the time that the stay has lasted) >= seconds of loading x loss of rate
    cooldown      five minutes since the last re-cut; twice as long after each that was rolled back or did not load

The rule of lasting is what stops flapping: speeds that change again and again make every next drift wait for longer
than such a drift has ever lasted.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import reduce

from runtime.recut.gain import NewPlan, contradiction, possible_gain
from runtime.recut.learning import Expected, Learning
from runtime.recut.patience import Planning, Stays, are_alike
from runtime.recut.window import DriftSettings, Window

_SAME = 2.0  # speeds are the same if they differ by at most the noise times this: both were measured
_LEAST_DIP = 0.05


@dataclass(frozen=True, kw_only=True)
class RecutSettings:
    """When a pipeline is cut again.

    Attributes:
        least_gain: the predicted gain from which a new cut is made: 0.15 means 15 % more requests.
        acts: whether the pipeline is cut again; otherwise it is only advised.
        windows: usable windows in a row that must confirm the gain.
        cooldown_s: time after a re-cut in which there is no other.
        most_cooldown_s: the cooldown is doubled up to this.
        plan_every_s: least time between two plannings while the last plan still gains enough.
        plan_again_s: the same if it does not gain enough any more.
        plan_share: share of the time that planning takes in the long run.
        plan_credit_s: time that planning may take at once.
        loading_s: first guess of the seconds that loading takes.
        dip: first guess of the share of the rate that is lost while a new plan loads.
        drift: when figures count.
    """

    least_gain: float = 0.15
    acts: bool = True
    windows: int = 3
    cooldown_s: float = 300.0
    most_cooldown_s: float = 4 * 3600.0
    plan_every_s: float = 60.0
    plan_again_s: float = 10.0
    plan_share: float = 0.01
    plan_credit_s: float = 10.0
    loading_s: float = 5.0
    dip: float = 0.5
    drift: DriftSettings = field(default_factory=DriftSettings)


@dataclass(frozen=True)
class Nothing:
    """Nothing is to be done."""


@dataclass(frozen=True)
class WantPlan:
    """Make a plan, and tell it by :meth:`Rebalancing.planned`.

    Attributes:
        speeds: the speed of every device, relative to the baseline of the running plan.
        stage_times_ns: time of one run of each stage of the running plan in the baseline, on the device of its first
            replica, for requests as they are now.
    """

    speeds: Mapping[str, float]
    stage_times_ns: tuple[int, ...]


@dataclass(frozen=True)
class CutNow:
    """Load this plan and swap, and tell it by :meth:`Rebalancing.swapped` or :meth:`Rebalancing.failed`.

    Attributes:
        candidate: the plan.
        gain: its predicted gain.
        before: what the pipeline did while the decision was made, for the proof.
    """

    candidate: NewPlan
    gain: float
    before: Window


@dataclass(frozen=True)
class RecutAdvice:
    """What a re-cut would gain; said instead of :class:`CutNow` if the settings do not act.

    Attributes:
        gain: the predicted gain.
        speeds: the speed of every device, relative to the baseline of the running plan.
        text: the advice, in one sentence.
    """

    gain: float
    speeds: Mapping[str, float]
    text: str


Action = Nothing | WantPlan | CutNow | RecutAdvice


class DecisionPhase(Enum):
    """What is going on."""

    STEADY = auto()
    LOADING = auto()
    PROVING = auto()


@dataclass(frozen=True)
class _Seen:
    """A usable window, the speeds in it, whether they promise a gain, and what speaks against its figures."""

    window: Window
    speeds: Mapping[str, float]
    is_sighted: bool
    contradiction: str


class Rebalancing:
    """Decides about re-cuts. Call :meth:`look` about twice per second; times are the host's monotonic clock.

    A plan that was swapped by someone else needs a new object. While a new plan loads, the windows are those of the
    old one; after a swap or a roll-back, they begin with the first look at the plan that serves then.

    Attributes:
        phase: what is going on.
        why: the reason for the last decision, in one sentence.
        slowness: the slowness of every device in the last usable window of the plan that serves; empty before there
            is one.
        cooldown_s: time after the last re-cut in which there is no other.
    """

    def __init__(self, settings: RecutSettings) -> None:
        self.phase = DecisionPhase.STEADY
        self.why = "the baseline is not known yet"
        self.slowness: Mapping[str, float] = {}
        self._settings = settings
        self._learning = Learning(settings.drift)
        self._before = self._learning
        self._stays = Stays()
        self._planning = Planning(
            every_s=settings.plan_every_s,
            again_s=settings.plan_again_s,
            share=settings.plan_share,
            credit_s=settings.plan_credit_s,
        )
        self._least = 1 + settings.least_gain
        self._open: Window | None = None  # not enough yet
        self._row: deque[_Seen] = deque(maxlen=settings.windows)
        self._recut: CutNow | None = None
        self._recut_ns = 0
        self.cooldown_s, self._until_ns = settings.cooldown_s, 0
        self._loading_s, self._dip = settings.loading_s, settings.dip
        self._loading: Window | None = None

    def look(self, window: Window, now_ns: int) -> Action:
        """Take note of what happened since the last look; returns what to do."""
        if self.phase is DecisionPhase.LOADING:
            self._loading = window if self._loading is None else self._loading + window
            return Nothing()
        drift = self._settings.drift
        if window.trouble:
            return self._unusable(window.trouble)
        self._open = window if self._open is None else self._open + window
        if self._open.trouble:
            return self._unusable(self._open.trouble)
        if self._open.is_enough(drift):
            window, self._open = self._open, None
            return self._use(window, now_ns)
        if self._open.seconds > drift.longest_s:
            stage, requests = self._open.fewest()
            return self._unusable(f"stage {stage} has run {requests} requests in {self._open.seconds:.0f} s: too few")
        return self._decide(now_ns)

    def present(self) -> WantPlan | None:
        """What a plan for the present speeds would be made for; None before the baseline is known."""
        return self._wanted([self._row[-1]]) if self._row else None

    def planned(self, candidate: NewPlan | None, now_ns: int, problem: str = "") -> None:
        """The plan that was wanted was made; None if none gains anything, or if it could not be made: ``problem``."""
        self._planning.end(candidate, now_ns, problem)

    def swapped(self, now_ns: int) -> None:
        """The new plan serves: its baseline begins. How it serves is told by :meth:`proved`."""
        assert self._recut is not None, "a re-cut was decided"
        self._loading_s = (now_ns - self._recut_ns) / 1e9
        before, during = self._recut.before, self._loading
        if during is not None and during.seconds and before.answered:
            rate = (during.answered / during.seconds) / (before.answered / before.seconds)
            self._dip = min(1.0, max(_LEAST_DIP, 1 - rate))
        made = {d: self._learning.made.get(d, 1.0) * speed for d, speed in self._recut.candidate.speeds.items()}
        fastest = max(made.values(), default=1.0)  # only the relative speeds are known
        made = {device: speed / fastest for device, speed in made.items()}
        plan = self._recut.candidate
        times = {
            (stage, device): time_ns / plan.speeds.get(device, 1.0)
            for stage, replicas in enumerate(plan.new)
            for device, time_ns in replicas
        }
        expected = Expected(times, plan.speeds)
        self._before, self._learning = self._learning, Learning(self._settings.drift, made, expected)
        self._start(DecisionPhase.PROVING)
        self.slowness = {}
        self.why = "the new plan is being proved"

    def proved(self, kept: bool, now_ns: int) -> None:
        """The new plan was proved, or the old one serves again, whose baseline is known."""
        if not kept:
            self._learning = self._before
            self._start(DecisionPhase.STEADY)
        self.phase = DecisionPhase.STEADY
        self._cool(now_ns, longer=not kept)

    def failed(self, now_ns: int) -> None:
        """The new plan was not loaded; the old one still serves."""
        self._start(DecisionPhase.STEADY)
        self._cool(now_ns, longer=True)

    def _start(self, phase: DecisionPhase) -> None:
        """Forget what was seen of the windows before."""
        self.phase, self._open, self._loading = phase, None, None
        self._row.clear()
        self._stays.begin()
        self._planning.forget()

    def _cool(self, now_ns: int, *, longer: bool) -> None:
        settings = self._settings
        self.cooldown_s = min(2 * self.cooldown_s, settings.most_cooldown_s) if longer else settings.cooldown_s
        self._until_ns = now_ns + int(self.cooldown_s * 1e9)

    def _unusable(self, why: str) -> Nothing:
        self._open = None
        self._row.clear()
        self.why = why
        return Nothing()

    def _use(self, window: Window, now_ns: int) -> Action:
        """Compare a window that is enough with the baseline."""
        learning, start_ns = self._learning, now_ns - int(window.seconds * 1e9)
        drift = learning.compare(window)
        if drift is None:
            return self._unusable(learning.why)
        self.slowness = drift.ratios(learning.noise)
        seen = _Seen(
            window=window,
            speeds={device: 1 / ratio for device, ratio in self.slowness.items()},
            is_sighted=possible_gain(window, drift, self.slowness) >= self._least,
            contradiction=contradiction(window),
        )
        self._stays.note(start_ns, now_ns, self.slowness, _SAME * learning.noise, is_sighted=seen.is_sighted)
        self._row.append(seen)
        return self._decide(now_ns)

    def _decide(self, now_ns: int) -> Action:
        """Decide by the last windows."""
        obstacle = self._obstacle(now_ns)
        if obstacle:
            self.why = obstacle
            return Nothing()
        latest, plan = self._row[-1], self._planning.candidate
        story = _story(latest.speeds)
        gains = [plan.gain_at(seen.speeds) for seen in self._row] if plan is not None else [0.0]
        is_useful = gains[-1] >= self._least
        if self._planning.wants(latest.speeds, _SAME * self._learning.noise, now_ns, is_useful=is_useful):
            self.why = f"{story}; a new cut is being planned"
            return self._want(now_ns)
        if self._planning.is_under_way or plan is None:
            self.why = f"{story}; {self._planning.story}"
            return Nothing()
        gain = min(gains)
        self.why = f"{story}; a new cut would answer {gains[-1]:.2f} times as many requests"
        lasted_s = (now_ns - self._stays.since_ns) / 1e9
        if not is_useful:
            self.why += f", and {self._least:.2f} times is the least"
        elif gain < self._least or len(self._row) < self._settings.windows:
            self.why += f"; {self._settings.windows} windows in a row must confirm it"
        elif other := next((seen.contradiction for seen in self._row if seen.contradiction), ""):
            self.why += f"; but {other}"
        elif (gain - 1) * 2 * lasted_s < self._loading_s * self._dip:
            self.why += f"; it has lasted {lasted_s:.0f} s, too short for the cost of loading"
        else:
            return self._cut(plan, gains[-1], now_ns)
        return Nothing()

    def _obstacle(self, now_ns: int) -> str:
        """What prevents that a new cut is planned or made now; empty if nothing does."""
        if self.phase is DecisionPhase.PROVING:
            return "the new plan is being proved"
        if not self._row:
            return self.why
        latest, story = self._row[-1], _story(self._row[-1].speeds)
        if not latest.is_sighted:
            return f"{story}; no new cut is needed"
        if now_ns < self._until_ns:
            what = "new cut is possible" if self._settings.acts else "advice is given"
            return f"{story}; the next {what} in {(self._until_ns - now_ns) / 1e9:.0f} s"
        if latest.contradiction:
            return f"{story}, but {latest.contradiction}"
        lasted_ns, needed_ns = now_ns - self._stays.since_ns, self._stays.needed_ns()
        if lasted_ns < needed_ns:
            return f"{story}; speeds have changed often, so this must last {needed_ns / 1e9:.0f} s first"
        return f"{story}; the next window must confirm it" if self._stays.windows < 2 else ""

    def _want(self, now_ns: int) -> WantPlan:
        """Ask for a plan, for the speeds of the stay.

        Its first window may have begun before the speeds changed, so it counts only within the noise of the latest.
        """
        stay = list(self._row)[-self._stays.windows :]
        wanted = self._wanted([each for each in stay if are_alike(each.speeds, stay[-1].speeds, self._learning.noise)])
        self._planning.begin(wanted.speeds, now_ns)
        return wanted

    def _wanted(self, seen: Sequence[_Seen]) -> WantPlan:
        """The plan for the mean speeds of some windows."""
        window = reduce(operator.add, (each.window for each in seen))
        baseline = self._learning.baseline
        drift = baseline.compare(window, 1) if baseline is not None else None
        assert drift is not None, "each of the windows was compared"
        noise = self._learning.noise / math.sqrt(len(seen))
        speeds = {device: 1 / ratio for device, ratio in drift.ratios(noise).items()}
        first: dict[int, float] = {}  # by stage: of its first replica that ran requests
        for (stage, _), time_ns in drift.places.items():
            first.setdefault(stage, time_ns)
        return WantPlan(speeds, tuple(round(first[stage]) for stage in sorted(first)))

    def _cut(self, plan: NewPlan, gain: float, now_ns: int) -> CutNow | RecutAdvice:
        """Make the new cut, or advise it."""
        if not self._settings.acts:
            self._until_ns = now_ns + int(self._settings.cooldown_s * 1e9)
            return RecutAdvice(gain, plan.speeds, self.why)
        before = reduce(operator.add, (seen.window for seen in self._row))
        self._recut, self._recut_ns = CutNow(plan, gain, before), now_ns
        self.phase, self._open, self._loading = DecisionPhase.LOADING, None, None
        return self._recut


def _story(speeds: Mapping[str, float]) -> str:
    """The speeds of devices, for people."""
    changed = [f"device {device} runs at {speed:.2f} of its speed" for device, speed in speeds.items() if speed != 1]
    return ", ".join(changed) or "all devices run at their usual speeds"
