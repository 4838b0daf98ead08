"""A simulated pipeline whose devices change their speed, and a host that carries out what the rule for re-cuts decides.

Requests pass the stages one after the other, each stage one request at a time, on a clock of their own.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from runtime.balance.policies import UNIT_COST
from runtime.coordinator.counters import NodeCounters
from runtime.coordinator.status import NodeStats
from runtime.recut.decision import CutNow, Rebalancing, RecutAdvice, RecutSettings, WantPlan
from runtime.recut.gain import NewPlan, verdict
from runtime.recut.window import Look, NodeWindow, Window, window_between
from runtime.wire.messages.data import Visit

LOOK_S = 0.5
PLAN_S = 2.0
LOAD_S = 5.0
RESTART_S = 2.0
IN_FLIGHT = 8  # for each stage
SECOND = 1_000_000_000

Speed = Callable[[float], float]
"""The speed of a device at a time in seconds: 1 at first, 0.5 when it takes twice as long."""


def steady(now_s: float) -> float:
    return 1.0


def falls(at_s: float, speed: float = 0.5, until_s: float = 1e9) -> Speed:
    """A device that has another speed from one time to another."""
    return lambda now_s: speed if at_s <= now_s < until_s else 1.0


def alternates(each_s: float, speed: float = 0.5) -> Speed:
    """A device that has another speed in every second time of this length."""
    return lambda now_s: speed if int(now_s // each_s) % 2 else 1.0


def node_stats(stage: int, replica: int, by_cost, *, state: str = "ready", restarts: int = 0, failures: int = 0):
    """The statistics of a node, of which only these matter here."""
    zeros = dict.fromkeys(
        ("retries", "wait_ns", "run_ns", "waited_ns", "ran_ns", "p50_ns", "p99_ns", "output_bytes", "shared_bytes"), 0
    )
    runs = {cost: (requests, ran_ns) for cost, (requests, ran_ns) in by_cost.items()}
    return NodeStats(
        stage=stage, replica=replica, pid=100 + restarts, host="h", state=state, provider="cpu", requests=0,
        failures=failures, restarts=restarts, queue=0.0, run_buckets=(), by_cost=runs, **zeros,
    )  # fmt: skip


def window(*stages: float | list[float], requests: int = 20, cost: int = 1000, seconds: float = 3.0) -> Window:
    """A window of requests of one cost; stages and the times of their replicas in ms. Node i.r is on device hi.r."""
    nodes = {}
    for stage, times in enumerate(stages):
        for replica, ms in enumerate(times if isinstance(times, list) else [times]):
            name = f"h{stage}.{replica}" if isinstance(times, list) else f"h{stage}"
            nodes[stage, replica] = NodeWindow(device=name, runs={cost: (requests, int(requests * ms * 1e6))})
    return Window(seconds=seconds, answered=requests, full_s=seconds, nodes=nodes)


@dataclass
class DriftingPipeline:
    """A pipeline, its devices, and what was decided.

    Attributes:
        speeds: the speed of every device; stage i runs on device ``h{i}``.
        stage_s: time of a request of unit cost at every stage, with all devices at speed 1.
        noise: the time of each request varies by at most this share.
        window_noise: so does that of every stage for three seconds at a time.
        arrival_per_s: requests that arrive, at random; None if the callers always have more.
        costs: the cost of the next request, by the time.
        growth: the exponent of a stage's time in the cost of requests.
        restarts: when the node of a stage is lost, with the stage.
        failures: when a request fails at a stage, with the stage.
        worsens: what new plans are slower by than planned.
        loads: whether new plans load.
        shares: the part of the whole work that every stage has.
    """

    speeds: Sequence[Speed]
    stage_s: float = 0.08
    noise: float = 0.1
    window_noise: float = 0.0
    arrival_per_s: float | None = None
    costs: Callable[[random.Random, float], int] = lambda source, now_s: UNIT_COST
    growth: Sequence[float] = (1.0,) * 8
    restarts: Sequence[tuple[float, int]] = ()
    failures: Sequence[tuple[float, int]] = ()
    worsens: float = 1.0
    loads: bool = True
    settings: RecutSettings = field(default_factory=RecutSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        self.source = random.Random(self.seed)
        self.rule = Rebalancing(self.settings)
        self._lost_s = [[at for at, where in self.restarts if where == stage] for stage in range(len(self.speeds))]
        self.shares = [1.0 / len(self.speeds)] * len(self.speeds)
        self.penalty = 1.0
        self.now_s = 0.0
        self.wanted: list[tuple[float, WantPlan]] = []
        self.recuts: list[tuple[float, CutNow]] = []
        self.advice: list[tuple[float, RecutAdvice]] = []
        self.proofs: list[tuple[float, bool]] = []
        self.rates: list[tuple[float, int]] = []
        self.why: list[str] = []
        self.drift: list[tuple[float, Mapping[str, float]]] = []
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._after: Window | None = None
        self._swapped_s = 0.0
        self._begin()

    def _begin(self) -> None:
        """A generation begins, with counters of its own."""
        self.counters = [NodeCounters() for _ in self.speeds]
        self.answered = 0
        self._free_s = [self.now_s] * len(self.speeds)
        self._pending: deque[tuple[float, int, list[float]]] = deque()
        self._done: deque[float] = deque(
            [self.now_s] * IN_FLIGHT * len(self.speeds), maxlen=IN_FLIGHT * len(self.speeds)
        )
        self._arrived_s = self.now_s
        self._looked = self._look()

    def go(self, seconds: float) -> DriftingPipeline:
        while self.now_s < seconds:
            self.now_s += LOOK_S
            self._answer()
            look = self._look()
            window = window_between(self._looked, look, self._devices, full=self._full())
            self._looked = look
            self.rates.append((self.now_s, window.answered))
            self._prove(window)
            self._carry_out(self.rule.look(window, self._now_ns))
            self.why.append(self.rule.why)
            self.drift.append((self.now_s, self.rule.slowness))
            for due in [each for each in self._due if each[0] <= self.now_s]:
                self._due.remove(due)
                due[1]()
        return self

    # The pipeline

    @property
    def _now_ns(self) -> int:
        return int(self.now_s * SECOND)

    @property
    def _devices(self):
        return {(stage, 0): f"h{stage}" for stage in range(len(self.speeds))}

    def _full(self) -> float:
        return 1.0 if len(self._pending) >= IN_FLIGHT * len(self.speeds) // 2 else 0.0

    def _look(self) -> Look:
        nodes = []
        for stage, counters in enumerate(self.counters):
            lost = [at for at in self._lost_s[stage] if at <= self.now_s]
            is_back = not lost or self.now_s - lost[-1] > RESTART_S
            failed = sum(where == stage and at <= self.now_s for at, where in self.failures)
            state = "ready" if is_back else "starting"
            nodes.append(node_stats(stage, 0, counters.by_cost, state=state, restarts=len(lost), failures=failed))
        return Look(now_ns=self._now_ns, answered=self.answered, nodes=tuple(nodes))

    def _answer(self) -> None:
        """Answer the requests until now."""
        while not self._pending or self._free_s[0] <= self.now_s:
            arrived_s = self._done[0]
            if self.arrival_per_s is not None:
                self._arrived_s += self.source.expovariate(self.arrival_per_s)
                arrived_s = max(arrived_s, self._arrived_s)
            self._enter(arrived_s)
            if arrived_s > self.now_s:
                break
        while self._pending and self._pending[0][0] <= self.now_s:
            _, cost, times = self._pending.popleft()
            self.answered += 1
            for counters, time_s in zip(self.counters, times, strict=True):
                counters.add(Visit(0, 0, 0, 0, int(time_s * SECOND), int(time_s * SECOND), 0, 0), cost)

    def _enter(self, at_s: float) -> None:
        cost, times = self.costs(self.source, at_s), []
        for stage, speed in enumerate(self.speeds):
            at_s = max(at_s, self._free_s[stage])
            for lost_s in self._lost_s[stage]:
                if lost_s <= at_s < lost_s + RESTART_S:
                    at_s = lost_s + RESTART_S
            work = self.stage_s * len(self.speeds) * self.shares[stage] * (cost / UNIT_COST) ** self.growth[stage]
            noise = 1 + self.noise * self.source.uniform(-1, 1)
            if self.window_noise:
                noise *= 1 + self.window_noise * random.Random(f"{self.seed} {stage} {at_s // 3}").uniform(-1, 1)
            loading = 0.7 if self.rule.phase.name == "LOADING" else 1.0
            times.append(work * noise * self.penalty / speed(at_s) / loading)
            at_s += times[-1]
            self._free_s[stage] = at_s
        self._done.append(at_s)
        self._pending.append((at_s, cost, times))

    # The host

    def _carry_out(self, action) -> None:
        match action:
            case WantPlan():
                self.wanted.append((self.now_s, action))
                self._due.append((self.now_s + PLAN_S, lambda: self.rule.planned(self._plan(action), self._now_ns)))
            case CutNow():
                self.recuts.append((self.now_s, action))
                self._due.append((self.now_s + LOAD_S, lambda: self._swap(action)))
            case RecutAdvice():
                self.advice.append((self.now_s, action))

    def _plan(self, want: WantPlan) -> NewPlan | None:
        """The best cut where work can be divided as one likes."""
        names = [f"h{stage}" for stage in range(len(self.speeds))]
        times = want.stage_times_ns
        works = [want.speeds[n] * share / time for n, share, time in zip(names, self.shares, times, strict=True)]
        self._planned = [work / sum(works) for work in works]
        new = [max(1, round(time * p / s)) for time, p, s in zip(times, self._planned, self.shares, strict=True)]
        old_ns = max(time / want.speeds[name] for time, name in zip(times, names, strict=True))
        return NewPlan(
            plan="new.plan",
            speeds=want.speeds,
            old_ns=round(old_ns),
            new_ns=round(1 / sum(works)),
            old=[[(name, time)] for name, time in zip(names, times, strict=True)],
            new=[[(name, time)] for name, time in zip(names, new, strict=True)],
        )

    def _swap(self, recut: CutNow) -> None:
        if not self.loads:
            self.rule.failed(self._now_ns)
            return
        self._old, self.shares, self.penalty = (self.shares, self.penalty), self._planned, self.worsens
        self.rule.swapped(self._now_ns)
        self._begin()
        self._after, self._before, self._swapped_s = None, recut.before, self.now_s

    def _prove(self, window: Window) -> None:
        """Compare the new plan with the old one, once it has served for three seconds and a window."""
        if self.rule.phase.name != "PROVING" or self.now_s < self._swapped_s + 3:
            return
        self._after = window if self._after is None else self._after + window
        if self._after.is_enough(self.settings.drift):
            proof = verdict(self._before, self._after, self.settings.drift)
            self.proofs.append((self.now_s, proof.kept))
            self.rule.proved(proof.kept, self._now_ns)
            if not proof.kept:
                self.shares, self.penalty = self._old
                self._begin()
