"""The command ``onnxsplit doctor``."""

from __future__ import annotations

from onnxsplit.cli.output import Output, binary, make_command


@make_command
def command(output: Output) -> None:
    """Show what this host has: versions, providers (and why some cannot be used), cores, memory and limits."""
    from onnxsplit.views.doctor import diagnose

    host = diagnose()
    output.line(f"Python {host.python} on {host.platform}")
    output.table(("package", "version"), [(name, text or "not installed") for name, text in host.packages.items()])
    output.line()
    output.table(("provider", "state"), [(p.name, p.problem or "can be used") for p in host.providers])
    output.line()
    output.line(f"{host.cores} cores, {host.gpus} NVIDIA GPUs")
    output.line(f"Memory {binary(host.memory_bytes)}, {binary(host.memory_available_bytes)} available")
    output.line(f"Shared memory {binary(host.shared_memory_bytes)} free")
    output.line(f"Temporary files in {host.temporary_folder}, {binary(host.temporary_free_bytes)} free")
    output.line(f"{host.open_files_limit} files may be open at once")
    output.line()
    for problem in host.problems:
        output.line(f"Problem: {problem}")
    if not host.problems:
        output.line("No problems found. Next: onnxsplit partition model.onnx")
    output.result({"doctor": host})
