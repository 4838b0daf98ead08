"""Three hosts, as network namespaces, and a switch between them that is fast, lossy, far, slow, or cut.

    python benchmarks/hosts/links.py [MODEL] [--slices 6] [--links lan,loss,far,slow] [--json]

Needs root, for namespaces and for the kernel's CPU controller: each host has SHARE of a core, so that three of them,
the caller and the switch find room on two. Hosts share no memory; nodes fetch their stages; all links have keys. At
each link speed agents measure the hosts, a cut is made for what they found and one as if links were free, and both
run in turn. Then a host's link is cut for ten seconds under load, and a host is frozen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "models")]

import numpy as np
from environment import benchmark, environment_line

HOSTS = ("h1", "h2", "h3")
SHARE = 0.4  # of a core, for each host
LINKS = {
    "lan": ("1 Gbit/s, 1 ms", 1e9, 1.0, 0.0),
    "loss": ("1 Gbit/s, 1 ms, 0.1 % lost", 1e9, 1.0, 0.001),
    "far": ("1 Gbit/s, 20 ms", 1e9, 20.0, 0.0),
    "slow": ("50 Mbit/s, 1 ms", 50e6, 1.0, 0.0),
}
SLICE_S = 4.0
PORT = 5600


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command that must succeed."""
    return subprocess.run([*map(str, words)], check=True, text=True, **options)


@contextmanager
def network():
    """Three namespaces and the switch; gives the switch's process and its addresses."""
    names = {host: f"onnxsplit-{os.getpid()}-{host}" for host in (*HOSTS, "switch")}
    process = None
    try:
        for name in names.values():
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        for number, host in enumerate(HOSTS):
            near, far = f"on{os.getpid() % 10000}n{number}", f"on{os.getpid() % 10000}f{number}"
            run("ip", "link", "add", near, "type", "veth", "peer", "name", far)
            run("ip", "link", "set", near, "netns", names[host], "name", "eth0")
            run("ip", "link", "set", far, "netns", names["switch"], "name", f"p{number}")
            run("ip", "-n", names[host], "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            run("ip", "-n", names[host], "link", "set", "eth0", "up")
            run("ip", "-n", names["switch"], "link", "set", f"p{number}", "up")
        ports = [f"p{number}" for number in range(len(HOSTS))]
        process = subprocess.Popen(
            ["ip", "netns", "exec", names["switch"], sys.executable, str(HERE / "switch.py"), *ports],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        process.stdout.readline()
        yield process, names
    finally:
        if process is not None:
            process.stdin.close()
            process.wait(10)
            process.stdout.close()
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], check=False)


def tell(switch: subprocess.Popen[str], *commands: str) -> None:
    """Have the switch do something."""
    for command in commands:
        switch.stdin.write(command + "\n")
        switch.stdin.flush()
        switch.stdout.readline()


class Hosts:
    """Processes on the three hosts, each host held to its share of a core."""

    def __init__(self, names: dict[str, str], folder: Path, stack: ExitStack) -> None:
        self._names, self._folder, self._stack = names, folder, stack

    def start(self, host: str, *words: object, hold: bool = True, log: Path | None = None) -> subprocess.Popen[Any]:
        """A command of onnxsplit there, as a process that ends with the benchmark."""
        environment = {**os.environ, "XDG_CACHE_HOME": str(self._folder / f"cache-{host}"), "PYTHONPATH": str(ROOT)}
        command = ["ip", "netns", "exec", self._names[host], sys.executable, "-P", "-m", "onnxsplit", *map(str, words)]
        stream = log.open("ab") if log is not None else subprocess.DEVNULL
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
        self._stack.callback(lambda: (process.kill(), process.wait()))
        if hold:
            self._stack.enter_context(benchmark("balance/devices").held(process.pid, SHARE))
        return process

    def here(self, *words: object) -> str:
        """A command of onnxsplit on h1, run to its end; its output."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = ["ip", "netns", "exec", self._names["h1"], sys.executable, "-P", "-m", "onnxsplit", *map(str, words)]
        return run(*command, env=environment, capture_output=True).stdout


def measured_cluster(hosts: Hosts, model: Path, dims: dict[str, int], folder: Path) -> Any:
    """What agents find."""
    from onnxsplit.cluster import Cluster, Device
    from onnxsplit.cluster_files import load_cluster

    file = folder / "cluster.toml"
    file.write_text(Cluster(tuple(Device(f"cpu-{host}", host) for host in HOSTS), {}, "h1").to_toml())
    agents = []
    started = []
    for number, host in enumerate(HOSTS):
        address = f"tcp://10.77.0.{number + 1}:7000"
        started.append(hosts.start(host, "cluster", "agent", "--bind", address, "--keys", folder / "keys" / host))
        agents += ["--agent", f"{host}={address}"]
    sizes = [word for name, size in dims.items() for word in ("--dim", f"{name}={size}")]
    hosts.here("cluster", "measure", model, "-c", file, *agents, "--keys", folder / "keys" / "coordinator", *sizes)
    for process in started:
        process.terminate()
        process.wait(10)
    return load_cluster(file)


def caller(folder: Path, plan: Path, port: int) -> None:
    """What runs on h1: the coordinator and the load; commands on standard input, a line of JSON for each answer."""
    from onnxsplit.npz import load_npz
    from onnxsplit.plan_files import example_file, load_plan
    from runtime import Pipeline

    inputs = load_npz(example_file(plan, load_plan(plan)))
    wanted = load_npz(folder / "wanted.npz")  # of the whole model
    wrong = 0

    def right(found: dict[str, Any]) -> bool:
        return all(np.allclose(found[n], a, rtol=0, atol=1e-4 * np.abs(a).max()) for n, a in wanted.items())

    bind = f"tcp://10.77.0.1:{port}"
    with Pipeline.listen(plan, bind=bind, keys=folder / "keys" / "coordinator", shared_memory=False) as pipeline:
        print(json.dumps({"nodes": [node.host for node in pipeline.nodes], "inflight": pipeline.inflight}), flush=True)
        for line in sys.stdin:
            seconds = float(line)
            pending = [pipeline.submit(inputs) for _ in range(pipeline.inflight)]
            count, begun, slowest = 0, time.monotonic(), 0.0
            while time.monotonic() - begun < seconds:
                asked = time.monotonic()
                wrong += not right(pending.pop(0).result(120))
                slowest = max(slowest, time.monotonic() - asked)
                count += 1
                pending.append(pipeline.submit(inputs))
            elapsed = time.monotonic() - begun
            for future in pending:
                wrong += not right(future.result(120))
            stories = [incident.story.splitlines()[0] for incident in pipeline.incidents]
            answer = {"per_s": count / elapsed, "answered": count + len(pending), "wrong": wrong, "slowest_s": slowest}
            print(json.dumps({**answer, "incidents": stories, "retries": pipeline.retries}), flush=True)


class Running:
    """A plan on the three hosts."""

    def __init__(self, hosts: Hosts, folder: Path, plan: Path, port: int, names: dict[str, str]) -> None:
        from onnxsplit.plan_files import load_plan

        self.plan = load_plan(plan)
        self.nodes = []
        for stage in self.plan.stages:
            for host in stage.hosts:
                words = ["node", "--connect", f"tcp://10.77.0.1:{port}", "--keys", folder / "keys" / host]
                words += ["--host", host, "--fetch", "--no-shared-memory", "--stage", stage.index]
                log = folder / f"{plan.stem}-{stage.index}.log"
                self.nodes.append((host, hosts.start(host, *words, log=log), log))
        command = ["ip", "netns", "exec", names["h1"], sys.executable, __file__, "--caller", str(folder)]
        self._caller = subprocess.Popen(
            [*command, "--plan", str(plan), "--port", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.said = json.loads(self._caller.stdout.readline())

    def begin(self, seconds: float) -> None:
        """Load it for a while."""
        self._caller.stdin.write(f"{seconds}\n")
        self._caller.stdin.flush()

    def end(self) -> dict[str, Any]:
        """What came of it."""
        return json.loads(self._caller.stdout.readline())

    def load(self, seconds: float) -> dict[str, Any]:
        """Both."""
        self.begin(seconds)
        return self.end()

    def close(self) -> None:
        """End it."""
        self._caller.stdin.close()
        self._caller.wait(20)
        for _, node, _ in self.nodes:
            node.wait(20)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="resnet50")
    parser.add_argument("--slices", type=int, default=6)
    parser.add_argument("--links", default=",".join(LINKS))
    parser.add_argument("--no-faults", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--caller", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.caller is not None:
        caller(given.caller, given.plan, given.port)
        return
    if os.geteuid() != 0 or shutil.which("ip") is None:
        sys.exit("namespaces need root and iproute2 (apt-get install iproute2)")
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        found = measure(given, Path(scratch))
    if given.json:
        print(json.dumps(found))
        return
    print(environment_line())
    print("\n| links | measured | cut for | devices | predicted /s | measured /s | of predicted | wrong |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in found["links"]:
        for kind in ("planned", "free"):
            one = row[kind]
            print(
                f"| {row['link']} | {row['measured']} | {kind} | {one['hosts']} | {one['predicted_per_s']:.1f} "
                f"| {one['per_s']:.1f} | {one['per_s'] / one['predicted_per_s']:.2f} "
                f"| {one['wrong']} of {one['answered']} |"
            )
        print(f"| | | planned over free | | | {row['ratio']:.2f} ({row['least']:.2f}-{row['most']:.2f}) | | |")
    for row in found["faults"]:
        print(f"\n{row['what']}: {row['caller']}")
        print(f"  coordinator: {'; '.join(row['incidents'])}")
        print(f"  node: {'; '.join(row['node'])}")


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything."""
    from onnxsplit.npz import save_npz
    from onnxsplit.planning.options import CutOptions
    from onnxsplit.planning.planner import write_plan
    from onnxsplit.planning.subject import examine
    from onnxsplit.session import open_session
    from runtime.wire.keys import create_for

    create_for(folder / "keys", HOSTS)
    model, dims = benchmark("data_path/throughput").model_of(given.model, folder)
    subject = examine(model, dims=dims, threads=1)
    save_npz(folder / "wanted.npz", open_session(model, threads=1).run(subject.inputs))
    found: dict[str, Any] = {"model": given.model, "links": [], "faults": []}
    with network() as (switch, names):
        for number, key in enumerate(given.links.split(",")):
            words, rate, delay, loss = LINKS[key]
            tell(switch, f"rate {rate}", f"delay {delay}", f"loss {loss}")
            with ExitStack() as stack:
                hosts = Hosts(names, folder, stack)
                cluster = measured_cluster(hosts, model, dims, folder)
                link = cluster.links["h1", "h2"]
                row: dict[str, Any] = {
                    "link": words,
                    "measured": f"{link.bytes_per_s * 8e-6:.0f} Mbit/s, {link.delay_ns / 1e6:.2f} ms",
                }
                # Speeds are beside the first device's, which has SHARE of the core that costs were measured on.
                devices = tuple(replace(device, speed=device.speed * SHARE) for device in cluster.devices)
                running = {}
                for kind, there in (
                    ("planned", replace(cluster, devices=devices)),
                    ("free", replace(cluster, devices=devices, links={}, caller=None)),
                ):
                    file = folder / f"{kind}.toml"
                    file.write_text(there.to_toml())
                    plan = folder / f"{key}-{kind}.plan"
                    write_plan(subject, plan, CutOptions(cluster=file, rounds=1))
                    running[kind] = Running(hosts, folder, plan, PORT + 2 * number + (kind == "free"), names)
                rates: dict[str, list[dict[str, Any]]] = {kind: [] for kind in running}
                for pipeline in running.values():
                    pipeline.load(SLICE_S / 2)
                for _ in range(given.slices):
                    for kind, pipeline in running.items():
                        rates[kind].append(pipeline.load(SLICE_S))
                for kind, pipeline in running.items():
                    row[kind] = {
                        "hosts": " ".join("+".join(stage.hosts) for stage in pipeline.plan.stages),
                        "predicted_per_s": pipeline.plan.prediction.throughput_per_s,
                        "per_s": statistics.median(one["per_s"] for one in rates[kind]),
                        "answered": sum(one["answered"] for one in rates[kind]),
                        "wrong": rates[kind][-1]["wrong"],
                        "inflight": pipeline.said["inflight"],
                    }
                ratios = [a["per_s"] / b["per_s"] for a, b in zip(rates["planned"], rates["free"], strict=True)]
                row |= {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
                found["links"].append(row)
                print(json.dumps(row), file=sys.stderr)
                if key == "lan" and not given.no_faults:
                    found["faults"] = faults(switch, running["free"])
                    print(json.dumps(found["faults"]), file=sys.stderr)
                for pipeline in running.values():
                    pipeline.close()
    return found


def faults(switch: subprocess.Popen[str], running: Running) -> list[dict[str, Any]]:
    """A link that is cut for ten seconds, and a host that is frozen for as long, under load."""
    host, node, log = next(one for one in running.nodes if one[0] != "h1")
    number = HOSTS.index(host)
    rows = []
    for what in ("link cut for 10 s", "host frozen for 10 s"):
        said, before = len(log.read_text().splitlines()), len(running.load(1.0)["incidents"])
        running.begin(25.0)
        time.sleep(3)
        if what.startswith("link"):
            tell(switch, f"cut {number}")
            time.sleep(10)
            tell(switch, f"mend {number}")
        else:
            os.kill(node.pid, signal.SIGSTOP)
            time.sleep(10)
            os.kill(node.pid, signal.SIGCONT)
        after = running.end()
        words = [
            line.split(" ", 2)[2]
            for line in log.read_text().splitlines()[said:]
            if "WARNING" in line or "ending" in line
        ]
        rows.append(
            {
                "what": f"{what} ({host})",
                "caller": f"{after['answered']} answered, {after['wrong']} wrong, "
                f"longest pause {after['slowest_s']:.1f} s, "
                f"{after['retries']} made again, {after['per_s']:.1f}/s over all",
                "incidents": after["incidents"][before:],
                "node": words,
            }
        )
    return rows


if __name__ == "__main__":
    main()
