"""How many bytes do narrow borders save, how far off are the outputs, and how much faster are slow links?

Errors: trained models are cut in two for hosts with 1 Gbit/s between them, with --border auto and a few examples. Then
the stages and the whole model run on fresh inputs of the same kind: crops of a picture with other size, contrast and
noise, or tones with noise. The table says which forms were chosen, and how many of the fresh inputs are above the
tolerance.

Rates: two hosts are network namespaces with a switch between them (hosts/switch.py); neither has memory for the whole
model. Hosts share no memory, nodes fetch their stages, and all links have keys. Agents measure hosts and links. A cut
with float32 borders and cuts with narrow ones, each made for the measured link, run in turns. This part needs root for
namespaces; `--only errors` needs neither root nor a network.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "models", "tests/support", "benchmarks/hosts")]

import links
import numpy as np

from benchmarks import example_models, harness

TAKES = "40 min"

PICTURES = {
    "ocr-recognizer": ("x", (1, 3, 48, 320)),
    "ocr-detector": ("x", (1, 3, 192, 320)),
    "ocr-classifier": ("x", (1, 3, 48, 192)),
    "centerface": ("input.1", (10, 3, 32, 32)),
}
SOUNDS = {"basic-pitch": ("serving_default_input_2:0", (1, 43844, 1))}
TOLERANCES = (1e-3, 2e-2)
LINE = 64  # pixels; lines of text are not higher
CASES = (("resnet50", "slow"), ("ocr-recognizer", "lan"))
SHARE = 1.0  # of a core, for each host
MEMORY = 0.8  # of the whole model's, for each host
SLICE_S = 4.0
PORT = 5800


def example(name: str, random: np.random.Generator) -> dict[str, Any]:
    """Return one input of a model."""
    if name in SOUNDS:
        tensor, shape = SOUNDS[name]
        time = np.arange(shape[1]) / 22050
        tones = sum(
            random.uniform(0.05, 0.5) * np.sin(2 * np.pi * 55 * 2 ** random.uniform(0, 5) * time)
            for _ in range(random.integers(1, 6))
        )
        return {tensor: (tones + random.normal(0, 0.01, time.size)).astype(np.float32).reshape(shape)}
    tensor, (rows, channels, height, width) = PICTURES[name]
    return {tensor: np.stack([_crop(random, height, width) for _ in range(rows)])[:, :channels]}


def _crop(random: np.random.Generator, height: int, width: int) -> Any:
    """Return a part of the demo's line of text as float32 [3, height, width], with random contrast and noise.

    A picture that is much higher than a line has the line somewhere on an empty page.
    """
    from PIL import Image

    with Image.open(ROOT / "models" / "demo.png") as picture:
        line = picture.convert("RGB")
    begin, end = sorted(random.uniform(0, 1, 2) * [0.4, 0.6] + [0, 0.4])
    line = line.crop((int(begin * line.width), 0, int(end * line.width), line.height))
    page = Image.new("RGB", (width, height), line.getpixel((0, 0)))
    if height > LINE:
        high = int(random.uniform(0.5, 1.0) * LINE)
        line = line.resize((min(width, int(line.width * high / line.height)), high))
        left, top = random.integers(0, width - line.width + 1), random.integers(0, height - line.height + 1)
        page.paste(line, (int(left), int(top)))
    else:
        page = line.resize((width, height))
    values = np.asarray(page, np.float32).transpose(2, 0, 1) / 127.5 - 1.0
    return (values * random.uniform(0.5, 1.0) + random.normal(0, 0.03, values.shape)).astype(np.float32)


def errors(given: argparse.Namespace, report: harness.Report, folder: Path) -> None:
    """Print a row for each model and tolerance."""
    from onnxsplit.cluster import Cluster, Device, Link
    from onnxsplit.distance import distance
    from onnxsplit.planning.examine import examine
    from onnxsplit.planning.options import CutOptions
    from onnxsplit.planning.planner import write_plan
    from onnxsplit.session import open_session

    link = Link(latency_ns=150_000, delay_ns=1_000_000, bytes_per_s=119_000_000)
    cluster = Cluster((Device("one", "h1"), Device("two", "h2")), {("h1", "h2"): link}, "h1")
    (folder / "two.toml").write_text(cluster.to_toml())
    for name in given.models.split(","):
        model, _ = example_models.named(name, folder)
        random = np.random.default_rng(0)
        subject = examine(model, inputs=[example(name, random) for _ in range(given.examples)], threads=1)
        for tolerance in TOLERANCES:
            options = CutOptions(cluster=folder / "two.toml", stages=2, rounds=1, border="auto", tolerance=tolerance)
            plan = write_plan(subject, folder / "e.plan", options).plan
            fresh = np.random.default_rng(1)
            whole = open_session(model, threads=1)
            stages = [
                open_session(folder / "e.plan" / stage.file, threads=1, level=stage.optimization_level)
                for stage in plan.stages
            ]
            found = []
            for _ in range(given.fresh):
                inputs = example(name, fresh)
                wanted, got = whole.run(inputs), dict(inputs)
                for stage in stages:
                    got |= stage.run({tensor: got[tensor] for tensor, _ in stage.inputs})
                found.append(max(distance(got[output], wanted[output]) for output in plan.outputs))
            report.row({"model": name, "tolerance": tolerance, **_said(plan), **_errors(found, tolerance)})


def _said(plan: Any) -> dict[str, Any]:
    """Return what a plan says about its borders."""
    forms = Counter(border.form for border in plan.borders.tensors)
    wire = sum(cut.bytes for cut in plan.cuts)
    saved = sum(border.bytes_before - border.bytes_after for border in plan.borders.tensors)
    return {
        "forms": " ".join(f"{count} {form}" for form, count in forms.items()) or "float32",
        "bytes_before": wire + saved,
        "bytes": wire,
        "said": plan.borders.error,
    }


def _errors(found: list[float], tolerance: float) -> dict[str, Any]:
    """Return the figures of the errors on fresh inputs."""
    return {
        "median": statistics.median(found),
        "worst": max(found),
        "above": sum(error > tolerance for error in found),
        "fresh": len(found),
    }


def rates(given: argparse.Namespace, report: harness.Report, folder: Path) -> None:
    """Print a row for each model, link and form."""
    from onnxsplit.npz import save_npz
    from onnxsplit.planning.examine import examine
    from onnxsplit.session import open_session
    from runtime.wire.keys import create_for

    links.SHARE = given.share
    create_for(folder / "keys", links.HOSTS)
    with links.network() as (switch, names):
        for number, case in enumerate(given.cases.split(",")):
            name, _, key = case.partition(":")
            model, dims = example_models.named(name, folder)
            subject = examine(model, dims=dims, threads=1)
            save_npz(folder / "wanted.npz", open_session(model, threads=1).run(subject.inputs))
            words, rate, delay, loss = links.LINKS[key]
            links.tell(switch, f"rate {rate}", f"delay {delay}", f"loss {loss}")
            with ExitStack() as stack:
                hosts = links.Hosts(names, folder, stack)
                cluster = links.measured_cluster(hosts, model, dims, folder)
                running = started(given, subject, cluster, hosts, folder / f"{number}", PORT + 10 * number)
                for row in compared(running, given.slices):
                    report.row({"model": name, "link": words, **row})
                for pipeline in running.values():
                    pipeline.close()


def started(
    given: argparse.Namespace, subject: Any, cluster: Any, hosts: links.Hosts, place: Path, port: int
) -> dict[str, links.Running]:
    """Run one pipeline for each form on the first two hosts."""
    from onnxsplit.planning.options import CutOptions
    from onnxsplit.planning.planner import write_plan
    from onnxsplit.stages.parts import peak_memory_bytes, whole_parts

    whole = peak_memory_bytes(subject.graph, subject.shapes, whole_parts(subject.graph))
    devices = tuple(replace(device, speed=device.speed * given.share) for device in cluster.devices[:2])
    known = {device.host for device in devices}
    between = {pair: link for pair, link in cluster.links.items() if set(pair) <= known}
    place.with_suffix(".toml").write_text(replace(cluster, devices=devices, links=between).to_toml())
    running = {}
    for number, border in enumerate(given.borders.split(",")):
        plan = place.parent / f"{place.name}-{border}.plan"
        options = CutOptions(
            cluster=place.with_suffix(".toml"), stages=2, rounds=2, max_memory=int(MEMORY * whole), border=border,
            tolerance=None if border == "float32" else given.tolerance,
        )  # fmt: skip
        write_plan(subject, plan, options)
        running[border] = links.Running(hosts, place.parent, plan, port + number)
    return running


def compared(running: dict[str, links.Running], slices: int) -> Iterator[dict[str, Any]]:
    """Load the pipelines in turns, and print a row for each."""
    loads = harness.in_turns({border: lambda p=p: p.load(SLICE_S) for border, p in running.items()}, slices)
    rates = {border: [one["per_s"] for one in each] for border, each in loads.items()}
    first = next(iter(rates))
    for border, pipeline in running.items():
        plan = pipeline.plan
        yield {
            "border": border,
            "bytes": sum(cut.bytes for cut in plan.cuts),
            "said": plan.borders.error if plan.borders is not None else 0.0,
            "predicted_per_s": plan.prediction.throughput_per_s,
            "per_s": statistics.median(rates[border]),
            "over_first": str(harness.ratio(rates[border], rates[first])) if border != first else None,
            "wrong": loads[border][-1]["wrong"],
            "answered": sum(one["answered"] for one in loads[border]),
        }


def main() -> None:
    """Print the tables."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--only", choices=["errors", "rates"], help="one of the two tables")
    parser.add_argument("--models", default=",".join([*PICTURES, *SOUNDS]), help="for errors")
    parser.add_argument("--examples", type=int, default=8, help="examples that --border auto is given")
    parser.add_argument("--fresh", type=int, default=1000, help="fresh inputs for each model and tolerance")
    parser.add_argument("--cases", default=",".join(map(":".join, CASES)), metavar="MODEL:LINK,...", help="for rates")
    parser.add_argument("--borders", default="float32,float16,int8,auto", help="for rates; the first is the reference")
    parser.add_argument("--tolerance", type=float, default=2e-2, help="for rates")
    parser.add_argument("--share", type=float, default=SHARE, help="of a core, for each host")
    parser.add_argument("--slices", type=int, default=8, help="slices of 4 s for each cut")
    given = parser.parse_args()
    if given.only != "errors" and (os.geteuid() != 0 or shutil.which("ip") is None):
        sys.exit("namespaces need root and iproute2 (apt-get install iproute2); --only errors needs neither")
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        if given.only != "rates":
            errors(given, harness.Report(
                given, model="14", tolerance="9.0e", forms="18", bytes_before="12", bytes="9", said="8.1e",
                median="8.1e", worst="8.1e", above="5", fresh="5",
            ), Path(scratch))  # fmt: skip
        if given.only != "errors":
            rates(given, harness.Report(
                given, model="14", link="16", border="8", bytes="9", said="8.1e", predicted_per_s="15.1f",
                per_s="6.1f", over_first="19", wrong="5", answered="8",
            ), Path(scratch))  # fmt: skip


if __name__ == "__main__":
    main()
