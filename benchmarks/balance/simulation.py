"""How do thousands of nodes behave, when everything except the state machines and the balancing is simulated?

    policies      each policy, with late binding
    binding       replicas chosen late, or all on admission
    failures      nodes die at given rates
    delays        links with longer delays
    coordinators  one for all, or several with a share each
    decision      one choice among N replicas, in microseconds on this machine
    change        processor time of the state machines for one node that is lost and replaced
    coordinator   a real coordinator process with stages that do nothing

Coordinator and node state machines, roster, router, chooser, gauge and board are those of the runtime; processes, links
and time are those of runtime.testing. Three stages share the replicas; runs take 5 ms on average, each replica up to 20
% faster or slower, each run scattered (lognormal, sigma 0.3); requests arrive at random (Poisson) at 80 % of the
slowest stage's capacity. No node sees another's memory: nodes learn about each other by messages, as between hosts.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from msgspec import structs

from benchmarks import harness
from onnxsplit.plan import CALLER
from onnxsplit.plan_files import parse_plan
from runtime.balance.board import LoadBoard
from runtime.balance.policies import UNIT_COST, ServiceTime
from runtime.balance.router import Router
from runtime.coordinator import events as c
from runtime.errors import PipelineError
from runtime.node import events as n
from runtime.testing import COORDINATOR
from runtime.testing.network import SECOND
from runtime.testing.node import SimulatedNode
from runtime.testing.pipeline import SimulatedPipeline
from runtime.timings import Timings
from runtime.wire.messages.control import POLICIES, Peer, Policy
from runtime.wire.messages.data import Fragment, Receipt, Visit

TAKES = "20 min"
STAGES = 3
SERVICE_NS = 5_000_000
LOAD = 0.8
PEERS = 1 << 14
MS = 1_000_000
RESTART_NS = 2 * SECOND
BEAT_NS = SECOND // 2
REQUESTS_A_REPLICA, WARM_UP = 40, 15


def chain() -> Any:
    """A plan of stages in a row."""
    golden = json.loads((harness.ROOT / "tests" / "onnxsplit" / "golden_plan.json").read_text())
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


class TimedNode(SimulatedNode):
    """A simulated process that chooses among replicas and reports its load."""

    def __init__(self, number: int, slot: tuple[int, int], policy: Policy, speed: float) -> None:
        super().__init__(number, slot)
        self.speed, self.gauge, self.board = speed, ServiceTime(), LoadBoard(peers=PEERS)
        self.router = Router(policy, self.board)
        self.here: Counter[int] = Counter()  # cost of the fragments that wait here, by sender


class TimedPipeline(SimulatedPipeline):
    """A simulated pipeline whose nodes take their time, and choose replicas as real ones do."""

    def __init__(
        self, replicas: int, policy: Policy, *, seed: int = 0, early: bool = False, delay_ns: int = 50_000,
        mean_life_s: float | None = None, speeds: float = 0.2,
    ) -> None:  # fmt: skip
        choices = random.Random(seed)
        counts = tuple(max(1, replicas // STAGES + (stage < replicas % STAGES)) for stage in range(STAGES))
        self.early, self.mean_life_s = early, mean_life_s
        self.speeds = {
            (stage, replica): choices.uniform(1 - speeds, 1 + speeds)
            for stage in range(STAGES)
            for replica in range(counts[stage])
        }
        self.capacity = min(
            sum(speed for slot, speed in self.speeds.items() if slot[0] == stage) for stage in range(STAGES)
        )
        self.router = Router(policy, LoadBoard(peers=PEERS))
        self.done: Counter[int] = Counter()  # by node: cost of the requests that passed it, if routes are bound early
        self.begun: dict[int, int] = {}
        self.latencies: list[int] = []
        self.wrong = self.losses = 0
        super().__init__(
            chain(), counts, choices, timings=Timings(circuit_failures=10**6, lost_s=10**6), delay_ns=delay_ns,
            policy=policy, process_numbers=PEERS,
        )  # fmt: skip
        while not self.ready:
            self.step()

    # The coordinator

    def start_node(self, slot: tuple[int, int], number: int) -> None:
        """Start a process; the replacement of a lost node starts after a delay."""
        self.later(RESTART_NS if self.losses else 0, super().start_node, slot, number)

    def new_node(self, number: int, slot: tuple[int, int]) -> SimulatedNode:
        """Make a process with a random lifetime."""
        if self.mean_life_s is not None:
            self.later(int(self.choices.expovariate(1 / self.mean_life_s) * SECOND), self.kill, number)
        return TimedNode(number, slot, self.policy, self.speeds[slot])

    def node_ended(self, node: SimulatedNode) -> None:
        """Count it."""
        self.losses += 1
        super().node_ended(node)

    def steps(self) -> c.Steps:
        """Return no steps: no node sees another's memory."""
        return {}

    def coordinator_met(self, peers: tuple[Peer, ...]) -> None:
        """Learn the nodes to which requests can be sent."""
        self.router.learn(0, peers, {})

    def begin(self) -> None:
        """Start a request."""
        begun = self.now_ns
        self.begun[self.submit(("y",))] = begun

    def enter(self, enter: c.Enter) -> None:
        """Admit a request; if routes are bound early, choose all its replicas now."""
        if self.early:
            route = tuple(self.choose(COORDINATOR, stage) or 0 for stage in range(STAGES))
            enter = structs.replace(enter, route=route)
        super().enter(enter)

    def resolve(self, request: int, visits: tuple[Visit, ...]) -> None:
        """Note how long a request took."""
        super().resolve(request, visits)
        self.latencies.append(self.now_ns - self.begun.pop(request))
        if self.early:
            for visit in visits:
                self.passed(visit)

    def passed(self, visit: Visit) -> None:
        """Learn from an answer what each node has done, if routes are bound early."""
        number = self.coordinator.roster.nodes[visit.stage, visit.replica].number
        if (node := self.nodes.get(number)) is not None:
            assert isinstance(node, TimedNode)
            self.done[number] += UNIT_COST
            done = self.done[number]
            receipt = Receipt(number, done, done, 0, node.gauge.service_ns, node.gauge.peak_ns)
            self.router.told(receipt, self.now_ns)

    def reject(self, request: int, error: PipelineError) -> None:
        """Count it."""
        super().reject(request, error)
        self.wrong += 1

    # Nodes

    def choose(self, sender: int, stage: int) -> int | None:
        """Choose a replica by the balancing policy."""
        node = self.nodes.get(sender)
        router = node.router if isinstance(node, TimedNode) else self.router
        number = router.choose(stage, (stage - 1 if stage else CALLER,), UNIT_COST, 0, self.now_ns)
        if number is not None:
            router.sent(number, UNIT_COST)
        return number

    def node_connected(self, node: SimulatedNode, connect: n.Connect) -> None:
        """Learn the nodes to which outputs can be sent."""
        assert isinstance(node, TimedNode)
        node.router.learn(connect.me, connect.peers, {})

    def give(self, node: SimulatedNode, event: n.NodeEvent) -> None:
        """Count a fragment that arrived."""
        if isinstance(event, n.Arrived):
            assert isinstance(node, TimedNode)
            node.here[event.fragment.sender] += event.fragment.cost
        super().give(node, event)

    def duration_ns(self, node: SimulatedNode) -> int:
        """Draw a duration around the time that the node's speed implies."""
        assert isinstance(node, TimedNode)
        return int(SERVICE_NS / node.speed * self.choices.lognormvariate(-0.045, 0.3))

    def node_ran(self, node: SimulatedNode, took_ns: int) -> None:
        """Measure the run, as real nodes do."""
        assert isinstance(node, TimedNode)
        node.gauge.ran(took_ns, UNIT_COST, self.now_ns)
        node.board.ended(node.gauge, self.now_ns)

    def node_finished(self, node: SimulatedNode, fragments: Iterable[Fragment]) -> None:
        """Tell the senders that have a choice of replicas how busy the node is, as real nodes do."""
        assert isinstance(node, TimedNode)
        for fragment in fragments:
            sender = fragment.sender
            node.board.finish(sender, fragment.cost)
            node.here[sender] -= fragment.cost
            if self.early:
                continue
            from_node = self.nodes.get(sender)
            router = from_node.router if isinstance(from_node, TimedNode) else self.router
            here, done = node.here[sender], node.board.done(sender)
            others = sum(node.here.values()) - here
            receipt = Receipt(node.number, done, done + here, others, node.gauge.service_ns, node.gauge.peak_ns)
            self.later(self.delay_ns or 0, self.told, router, receipt)

    def told(self, router: Router, receipt: Receipt) -> None:
        """Take the figures of a receipt."""
        router.told(receipt, self.now_ns)

    # A run

    def run(self, requests: int, warm_up: int) -> dict[str, Any]:
        """Run the simulation, and return the figures of all requests after the first ones."""
        gap = SERVICE_NS / (LOAD * self.capacity)
        delay_ns = 0
        for _ in range(requests + warm_up):
            delay_ns += int(self.choices.expovariate(1 / gap))
            self.later(delay_ns, self.begin)
        begun, wall = self.now_ns, time.perf_counter()
        if self.mean_life_s is not None:
            self.later(BEAT_NS, self.tick)
        while len(self.latencies) < requests + warm_up:
            self.step()
        wall = time.perf_counter() - wall
        latencies = sorted(self.latencies[warm_up:])
        return {
            "requests": len(latencies),
            "p50_ms": latencies[len(latencies) // 2] / MS,
            "p99_ms": latencies[len(latencies) * 99 // 100] / MS,
            "mean_ms": statistics.fmean(latencies) / MS,
            "simulated_s": (self.now_ns - begun) / SECOND,
            "wall_s": wall,
            "failed": self.wrong,
            "lost_nodes": self.losses,
            "again": self.coordinator.requests.retries,
        }

    def tick(self) -> None:
        """Let time pass for the coordinator."""
        self.tell(c.Tick(self.now_ns))
        self.later(BEAT_NS, self.tick)


def simulated(replicas: int, policy: str, **how: Any) -> dict[str, Any]:
    """Run one simulation and return its row."""
    made = TimedPipeline(replicas, policy, **how)
    each = max(1, replicas // STAGES)
    found = made.run(max(2000, REQUESTS_A_REPLICA * each), max(500, WARM_UP * each))
    return {"replicas": replicas, "policy": policy, **found}


def policies(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Simulate each policy with late binding."""
    return [show(given, simulated(count, policy)) for count in given.replicas for policy in POLICIES]


def binding(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare choosing the next replica at each hop with choosing all of them on admission."""
    return [
        show(given, {"bound": "early" if early else "late", **simulated(count, "completion", early=early)})
        for count in given.replicas
        for early in (False, True)
    ]


def failures(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Simulate nodes with random lifetimes, which are replaced two seconds after they end."""
    rows = []
    for count in [count for count in given.replicas if count <= 200]:
        for life_s in (None, 600.0, 60.0):
            made = TimedPipeline(count, "completion", mean_life_s=life_s)
            found = made.run(20_000, 500)
            rows.append(show(given, {"replicas": count, "a_node_lives_s": life_s or "for ever", **found}))
    return rows


def delays(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Simulate links with longer delays."""
    return [
        show(given, {"delay_ms": delay_ms, **simulated(count, policy, delay_ns=int(delay_ms * MS))})
        for count in [count for count in given.replicas if count <= 1000]
        for delay_ms in (0.05, 1.0, 10.0)
        for policy in ("completion", "round-robin")
    ]


def coordinators(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare one coordinator for all replicas with several that have equal shares of them."""
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
    """Measure one choice, among replicas on other hosts and (up to 255) in mapped memory."""
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
    """Measure the processor time of all state machines for one lost node and its replacement."""
    rows = []
    for count in [count for count in given.replicas if count <= 1000]:
        made = TimedPipeline(count, "completion")
        begun, losing = time.perf_counter(), next(iter(made.nodes))
        made.kill(losing)
        while made.step() or made.coordinator.roster.missing():
            made.tell(c.Tick(made.now_ns))
        rows.append(show(given, {"replicas": count, "machines_ms": (time.perf_counter() - begun) * 1000}))
    return rows


def coordinator(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a real coordinator: processor time per request through stages that do nothing, and its rate here."""
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
    """Print a row as soon as it is measured."""
    if given.json:
        print(json.dumps(row), flush=True)
    else:
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "wall_s")
        print("  ".join(shown), flush=True)
    return row


WHAT = {f.__name__: f for f in (policies, binding, failures, delays, coordinators, decision, change, coordinator)}


def main() -> None:
    """Print the tables."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("what", nargs="*", choices=[*WHAT, []], default=[], metavar="PART", help="default: all")
    parser.add_argument("--replicas", type=int, nargs="+", default=[10, 100, 1000, 5000])
    given = parser.parse_args()
    report = harness.Report(given)
    for name in given.what or WHAT:
        report.note(f"\n{name}: {(WHAT[name].__doc__ or '').strip()}")
        WHAT[name](given)


if __name__ == "__main__":
    main()
