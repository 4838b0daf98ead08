"""Thousands of nodes that are not there: the real state machines and balancing, and everything else simulated.

    python benchmarks/balance/simulation.py policies [--replicas 10 100 1000 5000] [--json]   late binding, each policy
    python benchmarks/balance/simulation.py binding      bound late, or all at the entrance
    python benchmarks/balance/simulation.py failures     nodes die at given rates
    python benchmarks/balance/simulation.py delays       links that take longer
    python benchmarks/balance/simulation.py coordinators one for all, or several with a share each
    python benchmarks/balance/simulation.py decision     one choice among so many, in microseconds of this machine
    python benchmarks/balance/simulation.py change       one node lost and replaced: what the coordinator does for it
    python benchmarks/balance/simulation.py coordinator  a real coordinator process with stages that do nothing

Coordinator and node state machines, roster, router, chooser, gauge and board are those of the runtime; processes,
sockets and time are events in a heap. Three stages share the replicas; runs take 5 ms on average, each replica up to
20 % faster or slower, each run scattered (lognormal, sigma 0.3); requests come at random (Poisson) at 80 % of what the
slowest stage can do. No node sees another's memory: what it knows comes by messages, as between hosts.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]

from environment import environment_line

import runtime.coordinator.roster
from onnxsplit.plan import CALLER
from onnxsplit.plan_files import parse_plan
from runtime.balance.board import LoadBoard
from runtime.balance.policies import UNIT_COST, ServiceTime
from runtime.balance.router import Router
from runtime.coordinator import events as c
from runtime.coordinator.events import KillNode, StartNode
from runtime.coordinator.state import CoordinatorState, PipelinePhase
from runtime.node import events as n
from runtime.node.state import NodeState
from runtime.timings import Timings
from runtime.wire.messages.control import POLICIES, PROTOCOL, Assign, Hello, Peer, Wire
from runtime.wire.messages.data import ANY, Fragment, Receipt, TensorHead

STAGES = 3
SERVICE_NS = 5_000_000
LOAD = 0.8
PEERS = 1 << 14
MS, SECOND = 1_000_000, 1_000_000_000
RESTART_NS = 2 * SECOND
BEAT_NS = SECOND // 2
REQUESTS_A_REPLICA, WARM_UP = 40, 15


def chain() -> Any:
    """A plan of stages in a row."""
    golden = json.loads((ROOT / "tests" / "onnxsplit" / "golden_plan.json").read_text())
    one = golden["stages"][0]
    names = ["x", *(f"h{number}" for number in range(STAGES - 1)), "y"]
    golden["stages"] = [
        {
            **one,
            "index": number,
            "file": f"s{number}.onnx",
            "files": [{**one["files"][0], "name": f"s{number}.onnx"}],
            "inputs": [names[number]],
            "outputs": [names[number + 1]],
        }
        for number in range(STAGES)
    ]
    golden |= {
        "tensors": {name: {"dtype": "float32", "shape": [1], "batch_axis": None} for name in names},
        "cuts": [],
        "inputs": ["x"],
        "outputs": ["y"],
        "passthrough": {},
        "outputs_need": {"y": list(range(STAGES))},
        "example_inputs": None,
    }
    return parse_plan(json.dumps(golden).encode(), where=Path("simulated"))


class Node:
    """A process."""

    def __init__(self, number: int, slot: tuple[int, int], policy: str, speed: float) -> None:
        self.number, self.slot, self.speed = number, slot, speed
        self.state, self.gauge, self.board = NodeState(), ServiceTime(), LoadBoard(peers=PEERS)
        self.router = Router(policy, self.board)  # type: ignore[arg-type]
        self.here: Counter[int] = Counter()
        self.alive = True


class World:
    """One coordinator and its nodes."""

    def __init__(
        self, replicas: int, policy: str, *, seed: int = 0, early: bool = False, delay_ns: int = 50_000,
        mean_life_s: float | None = None, speeds: float = 0.2,
    ) -> None:  # fmt: skip
        runtime.coordinator.roster.PEERS = PEERS
        self.random, self.policy, self.early, self.delay_ns = random.Random(seed), policy, early, delay_ns
        self.plan, self.now, self.events, self.count = chain(), 0, [], 0
        self.mean_life_s = mean_life_s
        counts = tuple(max(1, replicas // STAGES + (stage < replicas % STAGES)) for stage in range(STAGES))
        self.speeds = {
            (stage, replica): self.random.uniform(1 - speeds, 1 + speeds)
            for stage in range(STAGES)
            for replica in range(counts[stage])
        }
        self.capacity = min(
            sum(speed for slot, speed in self.speeds.items() if slot[0] == stage) for stage in range(STAGES)
        )
        timings = Timings(circuit_failures=10**6, lost_s=10**6)
        self.coordinator = CoordinatorState(self.plan, counts, choose=lambda *_: None, timings=timings, attempts=10**6)
        self.board = LoadBoard(peers=PEERS)
        self.router = Router(policy, self.board)  # type: ignore[arg-type]
        self.nodes: dict[int, Node] = {}
        self.done: dict[int, int] = {}  # by node: cost of what passed it, where routes are bound early
        self.begun: dict[int, int] = {}
        self.latencies: list[int] = []
        self.wrong = self.losses = 0
        self.tell(c.Tick(0))
        while self.coordinator.state is PipelinePhase.STARTING:
            self.step()

    # Time

    def later(self, delay_ns: int, what: Callable[..., None], *words: Any) -> None:
        """Do something after a while."""
        self.count += 1
        heapq.heappush(self.events, (self.now + delay_ns, self.count, what, words))

    def step(self) -> None:
        """The next event."""
        self.now, _, what, words = heapq.heappop(self.events)
        what(*words)

    # The coordinator

    def tell(self, event: Any) -> None:
        """Hand the coordinator an event, and do what it wants done."""
        effects = deque(self.coordinator.handle(event))
        while effects:
            effect = effects.popleft()
            match effect:
                case c.Enter():
                    self.enter(effect)
                case c.Resolve(request):
                    self.latencies.append(self.now - self.begun.pop(request))
                case StartNode(slot, number):
                    self.later(RESTART_NS if self.losses else 0, self.start, slot, number)
                case KillNode(number):
                    self.nodes[number].alive = False
                case c.GiveStage(identity, (stage, replica)):
                    assign = Assign("id", "", "", stage, replica, "cpu", 0, False, False, 1, 1, self.policy)
                    self.later(self.delay_ns, self.hear, int(identity), n.Assigned(assign))
                case c.Introduce(identities, meet):
                    effects.extend(self.introduce(identities, meet))
                case c.Forget(request, attempt, identities):
                    for identity in identities:
                        self.later(self.delay_ns, self.hear, int(identity), n.AttemptCancelled(request, attempt))
                case c.Reject():
                    self.wrong += 1

    def start(self, slot: tuple[int, int], number: int) -> None:
        """A process begins, and reports."""
        self.nodes[number] = Node(number, slot, self.policy, self.speeds[slot])
        hello = Hello(PROTOCOL, number, number, "host", str(number), *slot, "", None, "")
        self.later(self.delay_ns, self.tell, c.Joined(str(number).encode(), hello, self.now))
        if self.mean_life_s is not None:
            life = self.random.expovariate(1 / self.mean_life_s)
            self.later(int(life * SECOND), self.kill, number)

    def kill(self, number: int) -> None:
        """It ends."""
        node = self.nodes[number]
        if node.alive:
            node.alive = False
            self.losses += 1
            self.later(self.delay_ns, self.tell, c.Lost(number, "is gone", {}, self.now))

    def introduce(self, identities: tuple[bytes, ...], meet: bool) -> list[Any]:
        """Nodes are told who all are."""
        roster, starting = self.coordinator.roster, self.coordinator.state is PipelinePhase.STARTING
        caller = Peer(0, CALLER, 0, False, "", "", None, "")
        everybody = (caller, *roster.peers(None, everyone=starting))
        records = {record.identity: record for record in roster}
        for identity in identities:
            record = records[identity]
            record.introduced = True
            peers = everybody if starting else (caller, *roster.peers(record, everyone=starting))
            self.later(self.delay_ns, self.hear, record.number, n.Wired(Wire(roster.view, record.number, peers)))
        if not meet:
            return []
        self.router.learn(0, everybody, {})
        return list(self.coordinator.handle(c.Met((), self.now)))

    def submit(self) -> None:
        """A request comes."""
        request = self.count
        self.begun[request] = self.now
        self.tell(c.Submitted(request, ("y",), UNIT_COST, None, self.now))

    def enter(self, enter: c.Enter) -> None:
        """A request goes to a node of the first stage."""
        route = enter.route
        if self.early:
            route = tuple(self.router.choose(stage, (CALLER,), UNIT_COST, 0, self.now) or 0 for stage in range(STAGES))
            for number in route:
                self.router.sent(number, UNIT_COST)
            number = route[0]
        else:
            number = self.router.choose(0, (CALLER,), UNIT_COST, 0, self.now) or 0
            self.router.sent(number, UNIT_COST)
        heads = (TensorHead("x", "float32", (1,), b""),)
        fragment = Fragment(
            enter.request, enter.attempt, enter.view, UNIT_COST, 0, 0, CALLER, route, enter.wanted, heads, ()
        )
        self.later(self.delay_ns, self.arrive, number, fragment)

    def returned(self, fragment: Fragment) -> None:
        """It comes back."""
        if self.early:
            for number in fragment.route:
                self.done[number] = self.done.get(number, 0) + UNIT_COST
                gauge = self.nodes[number].gauge
                done = self.done[number]
                self.router.told(Receipt(number, done, done, 0, gauge.service_ns, gauge.peak_ns), self.now)
        self.tell(c.Returned(fragment.request, fragment.attempt, ("y",), fragment.history))

    # Nodes

    def hear(self, number: int, event: Any) -> None:
        """A node gets an event, and does what follows."""
        node = self.nodes.get(number)
        if node is None or not node.alive:
            return
        effects = deque(node.state.handle(event))
        while effects:
            effect = effects.popleft()
            match effect:
                case n.Load():
                    effects.extend(node.state.handle(n.Loaded(self.plan)))
                case n.Connect(me, peers):
                    node.router.learn(me, peers, {})
                case n.SayReady():
                    self.later(self.delay_ns, self.tell, c.Prepared(str(number).encode(), (), self.now))
                case n.Run():
                    took = int(SERVICE_NS / node.speed * self.random.lognormvariate(-0.045, 0.3))
                    self.later(took, self.executed, node, took)
                case n.Forward():
                    self.forward(node, effect)
                case n.GiveBack(fragments):
                    for fragment in fragments:
                        node.board.finish(fragment.sender, fragment.cost)
                        node.here[fragment.sender] -= fragment.cost
                        self.receipt(node, fragment.sender)
        if node.state.ready:
            self.hear(number, n.Turn(self.now))

    def arrive(self, number: int, fragment: Fragment) -> None:
        """It gets to a node."""
        if number in self.nodes and self.nodes[number].alive:
            self.nodes[number].here[fragment.sender] += fragment.cost
        self.hear(number, n.Arrived(fragment, {}, self.now))

    def executed(self, node: Node, took: int) -> None:
        """A run ends."""
        if node.alive:
            node.gauge.ran(took, UNIT_COST, self.now)
            node.board.ended(node.gauge, self.now)
            self.hear(node.number, n.Executed(self.now - took, self.now, self.now, 0, 0))

    def forward(self, node: Node, effect: n.Forward) -> None:
        """Outputs go to a node of the next stage, or back."""
        fragment, stage = effect.fragment, node.slot[0]
        number = 0
        if stage + 1 < STAGES:
            number = fragment.route[stage + 1]
            if number == ANY:
                number = node.router.choose(stage + 1, (stage,), UNIT_COST, 0, self.now) or 0
                node.router.sent(number, UNIT_COST)
        following = Fragment(
            fragment.request, fragment.attempt, fragment.view, UNIT_COST, 0, node.number, stage, fragment.route,
            fragment.wanted, (), effect.history,
        )  # fmt: skip
        self.later(self.delay_ns, *((self.arrive, number, following) if number else (self.returned, following)))

    def receipt(self, node: Node, sender: int) -> None:
        """Tell who sent how busy the node is; as nodes do it, when it has a choice."""
        if self.early:
            return
        router = self.router if sender == 0 else self.nodes[sender].router
        here, done = node.here[sender], node.board.done(sender)
        others = sum(node.here.values()) - here
        said = Receipt(node.number, done, done + here, others, node.gauge.service_ns, node.gauge.peak_ns)
        self.later(self.delay_ns, lambda: router.told(said, self.now))

    # A run

    def run(self, requests: int, warm_up: int) -> dict[str, Any]:
        """Let requests come; the figures of those after the first."""
        gap = SERVICE_NS / (LOAD * self.capacity)
        at = self.now
        for _ in range(requests + warm_up):
            at += int(self.random.expovariate(1 / gap))
            self.later(at - self.now, self.submit)
        begun, wall = self.now, time.perf_counter()
        if self.mean_life_s is not None:
            self.later(BEAT_NS, self.tick)
        while len(self.latencies) < requests + warm_up:
            self.step()
        wall = time.perf_counter() - wall
        found = sorted(self.latencies[warm_up:])
        return {
            "requests": len(found),
            "p50_ms": found[len(found) // 2] / MS,
            "p99_ms": found[len(found) * 99 // 100] / MS,
            "mean_ms": statistics.fmean(found) / MS,
            "simulated_s": (self.now - begun) / SECOND,
            "wall_s": wall,
            "failed": self.wrong,
            "lost_nodes": self.losses,
            "again": self.coordinator.retries,
        }

    def tick(self) -> None:
        """Time passes for the coordinator."""
        self.tell(c.Tick(self.now))
        self.later(BEAT_NS, self.tick)


def simulated(replicas: int, policy: str, **how: Any) -> dict[str, Any]:
    """A row."""
    made = World(replicas, policy, **how)
    each = max(1, replicas // STAGES)
    found = made.run(max(2000, REQUESTS_A_REPLICA * each), max(500, WARM_UP * each))
    return {"replicas": replicas, "policy": policy, **found}


def policies(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Each policy, bound late."""
    return [show(given, simulated(count, policy)) for count in given.replicas for policy in POLICIES]


def binding(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The next replica chosen at each hop, or all of them at the entrance."""
    return [
        show(given, {"bound": "early" if early else "late", **simulated(count, "completion", early=early)})
        for count in given.replicas
        for early in (False, True)
    ]


def failures(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Nodes live for a while, at random, and are replaced two seconds after."""
    rows = []
    for count in [count for count in given.replicas if count <= 200]:
        for life_s in (None, 600.0, 60.0):
            made = World(count, "completion", mean_life_s=life_s)
            found = made.run(20_000, 500)
            rows.append(show(given, {"replicas": count, "a_node_lives_s": life_s or "for ever", **found}))
    return rows


def delays(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every message takes longer."""
    return [
        show(given, {"delay_ms": delay_ms, **simulated(count, policy, delay_ns=int(delay_ms * MS))})
        for count in [count for count in given.replicas if count <= 1000]
        for delay_ms in (0.05, 1.0, 10.0)
        for policy in ("completion", "round-robin")
    ]


def coordinators(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The same replicas behind one coordinator, or in equal shares behind several."""
    rows = []
    for count in [count for count in given.replicas if count >= 100]:
        for several in (1, 4, 16):
            found = [simulated(count // several, "completion", seed=seed) for seed in range(several)]
            row = {"replicas": count, "coordinators": several}
            for name in ("p50_ms", "p99_ms", "mean_ms"):
                row[name] = statistics.fmean(one[name] for one in found)
            rows.append(show(given, row))
    return rows


def decision(given: argparse.Namespace) -> list[dict[str, Any]]:
    """What one choice takes, on other hosts and (up to 255) with memory mapped."""
    rows = []
    for count in given.replicas:
        for policy in POLICIES:
            peers = [Peer(number + 1, 0, number, True, "", "", None, "") for number in range(count)]
            row: dict[str, Any] = {"replicas": count, "policy": policy}
            for where in ("hosts", "memory"):
                if where == "memory" and count > 255:
                    continue
                router = Router(policy, LoadBoard(peers=PEERS))
                boards = {peer.number: LoadBoard() for peer in peers} if where == "memory" else {}
                router.learn(0, peers, boards)
                for peer in peers:
                    router.told(Receipt(peer.number, 0, 0, 0, SERVICE_NS, SERVICE_NS), 1)
                times = []
                for _ in range(20):
                    begun = time.perf_counter_ns()
                    for _ in range(500):
                        number = router.choose(0, (CALLER,), UNIT_COST, 1000, 2)
                        router.sent(number, UNIT_COST)
                    times.append((time.perf_counter_ns() - begun) / 500)
                row[f"{where}_us"] = statistics.median(times) / 1000
            rows.append(show(given, row))
    return rows


def change(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The processor time of the coordinator's and of all nodes' machines for one lost node and its successor."""
    rows = []
    for count in [count for count in given.replicas if count <= 1000]:
        made = World(count, "completion")
        begun, losing = time.perf_counter(), next(iter(made.nodes))
        made.kill(losing)
        while made.coordinator.roster.missing() or made.events:
            made.tell(c.Tick(made.now))
            if made.events:
                made.step()
        rows.append(show(given, {"replicas": count, "machines_ms": (time.perf_counter() - begun) * 1000}))
    return rows


def coordinator(given: argparse.Namespace) -> list[dict[str, Any]]:
    """A real one: its own processor time for a request that passes stages which do nothing, and the rate here."""
    import build
    import numpy as np

    from onnxsplit.planning.planner import partition
    from runtime import Pipeline

    rows = []
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        model = build.save(build.chain(3, 8), Path(scratch))
        partition(model, stages=3, out=Path(scratch) / "m.plan", costs="analytic")
        one = {"x": np.ones((1, 8), np.float32)}
        for replicas in (1, 4, 16):
            with Pipeline.launch(Path(scratch) / "m.plan", replicas=replicas, inflight=64) as pipeline:
                rates, costs = [], []
                for _ in range(6):
                    begun, used, pending, count = time.perf_counter(), time.process_time(), deque(), 0
                    while time.perf_counter() - begun < 1.5:
                        pending.append(pipeline.submit(one))
                        if len(pending) > 48:
                            pending.popleft().result()
                        count += 1
                    for future in pending:
                        future.result()
                    rates.append(count / (time.perf_counter() - begun))
                    costs.append((time.process_time() - used) / count)
            cost = statistics.median(costs[1:])
            row = {"nodes": 3 * replicas, "per_s": statistics.median(rates[1:]), "coordinator_us": cost * 1e6}
            rows.append(show(given, {**row, "per_s_alone": 1 / cost}))
    return rows


def show(given: argparse.Namespace, row: dict[str, Any]) -> dict[str, Any]:
    """Print a row as it comes."""
    if given.json:
        print(json.dumps(row), flush=True)
    else:
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "wall_s")
        print("  ".join(shown), flush=True)
    return row


WHAT = {f.__name__: f for f in (policies, binding, failures, delays, coordinators, decision, change, coordinator)}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", choices=[*WHAT, []], default=[])
    parser.add_argument("--replicas", type=int, nargs="+", default=[10, 100, 1000, 5000])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not given.json:
        print(environment_line())
    for name in given.what or WHAT:
        if not given.json:
            print(f"\n{name}: {(WHAT[name].__doc__ or '').strip()}")
        WHAT[name](given)


if __name__ == "__main__":
    main()
