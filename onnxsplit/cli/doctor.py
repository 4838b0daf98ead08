"""The command ``onnxsplit doctor``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from onnxsplit.cli.help import option
from onnxsplit.cli.output import Output, binary, make_command, milliseconds, percent

if TYPE_CHECKING:
    from onnxsplit.plan import HostCosts

_SMALL, _LARGE = 16, 1 << 18  # elements of a tensor
_MANY = 16  # tensors
_MATRICES, _WIDTH = 4, 512  # weights of a stage, which are as large as a core's cache: 4 MiB


@make_command
@option(
    "--measure",
    is_flag=True,
    help="Measure what requests cost on this host (about 20 s), and keep it for later plans.",
)
def command(output: Output, *, measure: bool) -> None:
    """Show what this host has: versions, providers (and why some cannot be used), cores, load, memory and limits."""
    from onnxsplit.host_costs import costs_file, host_costs, keep_host_costs
    from onnxsplit.views.doctor import diagnose

    kept = keep_host_costs(_measured(output)) if measure else None
    host = diagnose()
    output.line(f"Python {host.python} on {host.platform}")
    output.table(("package", "version"), [(name, text or "not installed") for name, text in host.packages.items()])
    output.line()
    output.table(
        ("provider", "state"), [(p.name, p.problem or "can be used") for p in host.providers], prose=("state",)
    )
    output.line()
    if host.plugins:
        rows = [
            (p.name, f"{p.package} {p.version}", ", ".join(p.devices) or "none", p.problem or "can be used")
            for p in host.plugins
        ]
        output.table(("plugin", "package", "devices", "state"), rows, may_go=("devices", "package"), prose=("state",))
        output.line()
    output.line(f"{host.cores} cores, {host.gpus} NVIDIA GPUs")
    output.line(
        f"Load {host.load_1_min:.2f} in the last minute; now {percent(host.busy_share)} of the cores are in use"
        + (f", {percent(host.stolen_share)} are taken by the machine's host" if host.stolen_share else "")
    )
    output.line(f"Memory {binary(host.memory_bytes)}, {binary(host.memory_available_bytes)} available")
    output.line(f"Shared memory {binary(host.shared_memory_bytes)} free")
    output.line(f"Temporary files in {host.temporary_folder}, {binary(host.temporary_free_bytes)} free")
    output.line(f"{host.open_files_limit} files may be open at once")
    costs = host_costs()
    _show_costs(output, costs)
    if kept:
        output.line(f"Kept them in {kept}.")
    elif costs.source == "typical":
        output.line("Measure them: onnxsplit doctor --measure")
    output.line()
    for problem in host.problems:
        output.line(f"Problem: {problem}")
    if not host.problems:
        output.line("No problems found. Next: onnxsplit partition model.onnx")
    output.result({"doctor": host, "host_costs": costs, "host_costs_file": costs_file()})


def _show_costs(output: Output, costs: HostCosts) -> None:
    """Print what requests cost beside the runs of the stages."""
    node, caller, hop, tensor = map(milliseconds, (costs.node_ns, costs.caller_ns, costs.hop_ns, costs.tensor_ns))
    output.line(f"A request costs {node} at each node and {caller} at the caller, beside the runs ({costs.source})")
    output.line(f"A message arrives after {hop}; a further tensor costs {tensor} at each end")


def _measured(output: Output) -> HostCosts:
    """Measure what requests cost on this host."""
    import numpy as np

    from onnxsplit.model.probes import negations, products
    from onnxsplit.planning.planner import partition
    from runtime.request_costs import Probe, request_costs

    models = {
        "one-stage": negations(1, 1, _SMALL),
        "two-stages": negations(2, 1, _SMALL),
        "working": products(2, _MATRICES, _WIDTH),
        "many-tensors": negations(2, _MANY, _SMALL),
        "large": negations(2, 1, _LARGE),
    }
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:

        def probe(name: str) -> Probe:
            graph = models[name].graph
            inputs = {x.name: np.ones(x.type.tensor_type.shape.dim[0].dim_value, np.float32) for x in graph.input}
            ends = {y.name for y in graph.output}
            borders = [y for node in graph.node for y in node.output if y.endswith("_0") and y not in ends]
            how = {"cut_at": borders} if borders else {"stages": 1}
            costs = "measured" if name in ("working", "large") else "analytic"
            out = Path(folder) / name
            plan = partition(models[name], out=out, inputs=inputs, costs=costs, rounds=1, **how)
            return Probe(out, inputs, plan.stages[0].measured_time_ns or 0)

        output.say("making small pipelines")
        costs = request_costs(output.say, *map(probe, models))
    output.done()
    return costs
