"""Are cuts that consider slow, lossy or distant links faster, and do pipelines survive a lost link?

The three hosts are network namespaces with a switch between them (hosts/switch.py). The benchmark needs root for
namespaces and for the kernel's CPU controller: each host has SHARE of a core, so that three hosts, the caller and the
switch fit on two cores. Hosts share no memory, nodes fetch their stages, and all links have keys. At each link speed
agents measure the hosts. A cut for the measured links and a cut that assumes free links run in turns. Then the link of
a host is cut for ten seconds under load, and a host is frozen.
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import example_models, harness

TAKES = "15 min"

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
    """Run a command that must succeed."""
    return subprocess.run([*map(str, words)], check=True, text=True, **options)


@contextmanager
def network():
    """Make three namespaces and the switch; yield the process of the switch and the names of the namespaces."""
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
    """Send commands to the switch."""
    for command in commands:
        switch.stdin.write(command + "\n")
        switch.stdin.flush()
        switch.stdout.readline()


class Hosts:
    """Processes on the three hosts, each host held to its share of a core."""

    def __init__(self, names: dict[str, str], folder: Path, stack: ExitStack) -> None:
        self.names, self._folder, self._stack = names, folder, stack

    def start(self, host: str, *words: object, hold: bool = True, log: Path | None = None) -> subprocess.Popen[Any]:
        """Start a command of onnxsplit on a host; the process ends with the benchmark."""
        environment = {**os.environ, "XDG_CACHE_HOME": str(self._folder / f"cache-{host}")}
        command = ["ip", "netns", "exec", self.names[host], sys.executable, "-P", "-m", "onnxsplit", *map(str, words)]
        stream = log.open("ab") if log is not None else subprocess.DEVNULL
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
        self._stack.callback(lambda: (process.kill(), process.wait()))
        if hold:
            self._stack.enter_context(harness.held(process.pid, SHARE))
        return process

    def here(self, *words: object) -> str:
        """Run a command of onnxsplit on h1 and return its output."""
        command = ["ip", "netns", "exec", self.names["h1"], sys.executable, "-P", "-m", "onnxsplit", *map(str, words)]
        return run(*command, capture_output=True).stdout


def measured_cluster(hosts: Hosts, model: Path, dims: dict[str, int], folder: Path) -> Any:
    """Let agents on the hosts measure the cluster, and return it."""
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
    """Run the coordinator and the load on h1; each line of standard input has seconds and is answered with JSON."""
    from onnxsplit.npz import load_npz
    from onnxsplit.plan_files import load_plan
    from runtime import Pipeline

    inputs = harness.example(plan)
    wanted = load_npz(folder / "wanted.npz")  # of the whole model
    borders = load_plan(plan, check_files=False).borders
    allowed = max(1e-4, borders.tolerance if borders is not None else 0.0)
    wrong = 0

    bind = f"tcp://10.77.0.1:{port}"
    with Pipeline.listen(plan, bind=bind, keys=folder / "keys" / "coordinator", shared_memory=False) as pipeline:
        print(json.dumps({"nodes": [node.host for node in pipeline.nodes], "inflight": pipeline.inflight}), flush=True)
        for line in sys.stdin:
            seconds = float(line)
            pending = [pipeline.submit(inputs) for _ in range(pipeline.inflight)]
            count, begun, slowest = 0, time.monotonic(), 0.0
            while time.monotonic() - begun < seconds:
                asked = time.monotonic()
                wrong += not harness.right(pending.pop(0).result(120), wanted, allowed)
                slowest = max(slowest, time.monotonic() - asked)
                count += 1
                pending.append(pipeline.submit(inputs))
            elapsed = time.monotonic() - begun
            for future in pending:
                wrong += not harness.right(future.result(120), wanted, allowed)
            stories = [incident.story.splitlines()[0] for incident in pipeline.incidents]
            answer = {"per_s": count / elapsed, "answered": count + len(pending), "wrong": wrong, "slowest_s": slowest}
            print(json.dumps({**answer, "incidents": stories, "retries": pipeline.retries}), flush=True)


class Running:
    """A pipeline on the three hosts."""

    def __init__(self, hosts: Hosts, folder: Path, plan: Path, port: int) -> None:
        from onnxsplit.plan_files import load_plan

        self.plan = load_plan(plan)
        self.nodes = []
        for stage in self.plan.stages:
            for host in stage.hosts:
                words = ["node", "--connect", f"tcp://10.77.0.1:{port}", "--keys", folder / "keys" / host]
                words += ["--host", host, "--fetch", "--no-shared-memory", "--stage", stage.index]
                log = folder / f"{plan.stem}-{stage.index}.log"
                self.nodes.append((host, hosts.start(host, *words, log=log), log))
        command = ["ip", "netns", "exec", hosts.names["h1"], sys.executable, __file__, "--caller", str(folder)]
        self._caller = subprocess.Popen(
            [*command, "--plan", str(plan), "--port", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.said = json.loads(self._caller.stdout.readline())

    def begin(self, seconds: float) -> None:
        """Start a load of this many seconds."""
        self._caller.stdin.write(f"{seconds}\n")
        self._caller.stdin.flush()

    def end(self) -> dict[str, Any]:
        """Wait for the end of the load and return its figures."""
        return json.loads(self._caller.stdout.readline())

    def load(self, seconds: float) -> dict[str, Any]:
        """Load it for this many seconds and return the figures."""
        self.begin(seconds)
        return self.end()

    def close(self) -> None:
        """End all its processes."""
        self._caller.stdin.close()
        self._caller.wait(20)
        for _, node, _ in self.nodes:
            node.wait(20)


def main() -> None:
    """Print the tables."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("model", nargs="?", default="resnet50", metavar="NAME|MODEL.onnx")
    parser.add_argument("--slices", type=int, default=6, help="slices of 4 s for each cut")
    parser.add_argument("--links", default=",".join(LINKS), help="names, separated by commas")
    parser.add_argument("--no-faults", action="store_true", help="cut no link and freeze no host")
    parser.add_argument("--caller", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.caller is not None:
        caller(given.caller, given.plan, given.port)
        return
    if os.geteuid() != 0 or shutil.which("ip") is None:
        sys.exit("namespaces need root and iproute2 (apt-get install iproute2)")
    report = harness.Report(
        given, link="28", measured="22", cut_for="7", hosts="10", predicted_per_s="15.1f", per_s="6.1f",
        of_predicted="12.2f", wrong="5", answered="8", planned_over_free="19",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        measure(given, report, Path(scratch))


def measure(given: argparse.Namespace, report: harness.Report, folder: Path) -> None:
    """Print a row for each link and cut, and then one for each fault."""
    from onnxsplit.npz import save_npz
    from onnxsplit.planning.examine import examine
    from onnxsplit.session import open_session
    from runtime.wire.keys import create_for

    create_for(folder / "keys", HOSTS)
    model, dims = example_models.named(given.model, folder)
    subject = examine(model, dims=dims, threads=1)
    save_npz(folder / "wanted.npz", open_session(model, threads=1).run(subject.inputs))
    broken: list[dict[str, Any]] = []
    with network() as (switch, names):
        for number, key in enumerate(given.links.split(",")):
            words, rate, delay, loss = LINKS[key]
            tell(switch, f"rate {rate}", f"delay {delay}", f"loss {loss}")
            with ExitStack() as stack:
                hosts = Hosts(names, folder, stack)
                cluster = measured_cluster(hosts, model, dims, folder)
                link = cluster.links["h1", "h2"]
                measured = f"{link.bytes_per_s * 8e-6:.0f} Mbit/s, {link.delay_ns / 1e6:.2f} ms"
                running = started(subject, cluster, hosts, folder, key, PORT + 2 * number)
                for row in compared(running, given.slices):
                    report.row({"link": words, "measured": measured, **row})
                if key == "lan" and not given.no_faults:
                    broken = faults(switch, running["free"])
                for pipeline in running.values():
                    pipeline.close()
    for row in broken:
        text = [f"\n{row['what']}: {row['caller']}", f"  coordinator: {'; '.join(row['incidents'])}"]
        report.row(row, "\n".join([*text, f"  node: {'; '.join(row['node'])}"]))


def started(subject: Any, cluster: Any, hosts: Hosts, folder: Path, key: str, port: int) -> dict[str, Running]:
    """Run a cut for the measured links and one that assumes free links on the hosts."""
    from onnxsplit.planning.options import CutOptions
    from onnxsplit.planning.planner import write_plan

    # Speeds are relative to the first device, which has SHARE of the core on which costs were measured.
    devices = tuple(replace(device, speed=device.speed * SHARE) for device in cluster.devices)
    running = {}
    for kind, there in (
        ("planned", replace(cluster, devices=devices)),
        ("free", replace(cluster, devices=devices, links={}, caller=None)),
    ):
        file, plan = folder / f"{kind}.toml", folder / f"{key}-{kind}.plan"
        file.write_text(there.to_toml())
        write_plan(subject, plan, CutOptions(cluster=file, rounds=1))
        running[kind] = Running(hosts, folder, plan, port + (kind == "free"))
    return running


def compared(running: dict[str, Running], slices: int) -> Iterator[dict[str, Any]]:
    """Load both cuts in turns, and print a row for each."""
    loads = harness.in_turns({kind: lambda p=p: p.load(SLICE_S) for kind, p in running.items()}, slices)
    rates = {kind: [one["per_s"] for one in each] for kind, each in loads.items()}
    for kind, pipeline in running.items():
        predicted, per_s = pipeline.plan.prediction.throughput_per_s, statistics.median(rates[kind])
        yield {
            "cut_for": kind,
            "hosts": " ".join("+".join(stage.hosts) for stage in pipeline.plan.stages),
            "predicted_per_s": predicted,
            "per_s": per_s,
            "of_predicted": per_s / predicted,
            "wrong": loads[kind][-1]["wrong"],
            "answered": sum(one["answered"] for one in loads[kind]),
            "planned_over_free": str(harness.ratio(rates["planned"], rates["free"])) if kind == "free" else None,
        }


def faults(switch: subprocess.Popen[str], running: Running) -> list[dict[str, Any]]:
    """Cut a link for ten seconds, and freeze a host for as long, under load."""
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
                f"{after['retries']} retries, {after['per_s']:.1f}/s over all",
                "incidents": after["incidents"][before:],
                "node": words,
            }
        )
    return rows


if __name__ == "__main__":
    main()
