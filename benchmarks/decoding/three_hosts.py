"""How fast is a decoder that is cut over three hosts, against one host with the whole model?

The hosts are network namespaces with a switch between them: 1 Gbit/s and 1 ms (hosts/switch.py). Hosts share no memory,
nodes fetch their stages, and all links have keys. Agents measure the hosts, and each cut considers what they found. For
several sequences each host has SHARE of a core, so that three hosts, the caller and the switch fit on two cores; a
single sequence keeps one host busy at a time, so the hosts have a core. For each number of sequences there is a plan
for three hosts and one for one host, made for the rows that a step then has, and both pipelines run in turns. The
prediction is the plan's own. It needs root for namespaces.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "models", "tests/support", "benchmarks/hosts")]

import links

from benchmarks import harness
from benchmarks.decoding import setting

TAKES = "12 min"

LOADS = ((1, 1.0), (4, 0.4), (16, 0.4))  # sequences, and the share of a core that each host has
STAGES = 3
PROMPT = 32
PORT = 5700


def caller(folder: Path, plan: Path, port: int) -> None:
    """Run the coordinator on h1; each line of standard input has a number of sequences and one of tokens."""
    from runtime import Pipeline

    bind, options = f"tcp://10.77.0.1:{port}", {"max_rows": 16, "cache_bytes": "1G", "max_length": 512}
    keys = folder / "keys" / "coordinator"
    with Pipeline.listen(plan, bind=bind, keys=keys, shared_memory=False, **options) as pipeline:
        print(json.dumps([node.host for node in pipeline.nodes]), flush=True)
        for line in sys.stdin:
            count, tokens = map(int, line.split())
            prompts = [setting.prompt(PROMPT, seed) for seed in range(count)]
            rate = setting.decode_rate(pipeline, prompts, tokens)
            first = pipeline.generate(prompts[0], max_tokens=8, stop_tokens=()).result().tokens
            print(json.dumps({"per_s": rate, "first": first}), flush=True)


class Decoding:
    """A pipeline on some hosts, and its caller on h1."""

    def __init__(self, hosts: links.Hosts, folder: Path, plan: Path, port: int) -> None:
        from onnxsplit.plan_files import load_plan

        self.plan = load_plan(plan)
        self._nodes = []
        for stage in self.plan.stages:
            host = stage.hosts[0]
            words = ["node", "--connect", f"tcp://10.77.0.1:{port}", "--keys", folder / "keys" / host, "--host", host]
            words += ["--fetch", "--no-shared-memory", "--threads", 1, "--stage", stage.index]
            self._nodes.append(hosts.start(host, *words, log=folder / f"{plan.stem}-{stage.index}.log"))
        command = ["ip", "netns", "exec", hosts.names["h1"], sys.executable, __file__, "--caller", str(folder)]
        self._caller = subprocess.Popen(
            [*command, "--plan", str(plan), "--port", str(port), "--model", "unused"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.hosts = json.loads(self._caller.stdout.readline())

    def decode(self, sequences: int, tokens: int) -> dict[str, Any]:
        """Continue some sequences by some tokens, and return the figures."""
        self._caller.stdin.write(f"{sequences} {tokens}\n")
        self._caller.stdin.flush()
        return json.loads(self._caller.stdout.readline())

    def predicted_per_s(self, sequences: int) -> float:
        """Tokens per second by the plan's prediction, for groups of ``cost_rows`` sequences."""
        prediction, rows = self.plan.prediction, self.plan.decoder.cost_rows
        groups = -(-sequences // rows)
        return sequences / groups / max(prediction.bottleneck_ns, prediction.latency_ns / groups) * 1e9

    def close(self) -> None:
        """End all its processes."""
        self._caller.stdin.close()
        self._caller.wait(30)
        for node in self._nodes:
            node.wait(30)


def main() -> None:
    """Print the table."""
    parser = harness.parser(__doc__, TAKES)
    setting.add_model(parser)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each sequence in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--caller", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.caller is not None:
        caller(given.caller, given.plan, given.port)
        return
    if os.geteuid() != 0 or shutil.which("ip") is None:
        sys.exit("namespaces need root and iproute2 (apt-get install iproute2)")
    report = harness.Report(
        given, sequences="9", three_per_s="11.1f", predicted_per_s="15.1f", of_predicted="12.2f",
        one_per_s="9.1f", predicted_one="13.1f", three_over_one="18", equal_tokens="12",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        measure(given, report, Path(scratch))


def measure(given: argparse.Namespace, report: harness.Report, folder: Path) -> None:
    """Print a row for each number of sequences."""
    from runtime.wire.keys import create_for

    create_for(folder / "keys", links.HOSTS)
    for count, share in LOADS:
        links.SHARE = share
        with links.network() as (switch, names), ExitStack() as stack:
            _, rate, delay, loss = links.LINKS["lan"]
            links.tell(switch, f"rate {rate}", f"delay {delay}", f"loss {loss}")
            hosts = links.Hosts(names, folder, stack)
            cluster = links.measured_cluster(hosts, given.model, {}, folder)
            running = {
                kind: Decoding(hosts, folder, made(given, cluster, folder, kind, count), PORT + at)
                for at, kind in enumerate(("three", "one"))
            }
            report.row({"sequences": count, **compared(running, count, given)})
            for pipeline in running.values():
                pipeline.close()


def compared(running: dict[str, Decoding], count: int, given: argparse.Namespace) -> dict[str, Any]:
    """The figures of both pipelines, which run in turns."""
    turns = {kind: lambda one=one: one.decode(count, given.tokens) for kind, one in running.items()}
    loads = harness.in_turns(turns, given.turns)
    rates = {kind: [one["per_s"] for one in each] for kind, each in loads.items()}
    three, one = (setting.median(rates[kind]) for kind in ("three", "one"))
    predicted = running["three"].predicted_per_s(count)
    return {
        "three_per_s": three,
        "predicted_per_s": predicted,
        "of_predicted": three / predicted,
        "one_per_s": one,
        "predicted_one": running["one"].predicted_per_s(count),
        "three_over_one": str(harness.ratio(rates["three"], rates["one"])),
        "equal_tokens": loads["three"][0]["first"] == loads["one"][0]["first"],
    }


def made(given: argparse.Namespace, cluster: Any, folder: Path, kind: str, sequences: int) -> Path:
    """A plan for three hosts or for one, for the rows that a step has then."""
    from onnxsplit.planning.planner import partition

    count = STAGES if kind == "three" else 1
    # Speeds are relative to the first device, which has SHARE of the core on which costs were measured.
    devices = tuple(replace(device, speed=device.speed * links.SHARE) for device in cluster.devices[:count])
    file, plan = folder / f"{kind}-{sequences}.toml", folder / f"{kind}-{sequences}.plan"
    file.write_text(replace(cluster, devices=devices, links=cluster.links if count > 1 else {}).to_toml())
    rows = -(-sequences // count)
    partition(given.model, stages=count, cluster=file, decode_rows=rows, context=64, rounds=1, out=plan)
    return plan


if __name__ == "__main__":
    main()
