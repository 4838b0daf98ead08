"""``onnxsplit doctor``."""

from __future__ import annotations

from onnxsplit.cli.output import Output, binary, make_command


@make_command
def command(output: Output) -> None:
    """Show what this host has: versions, providers and why each can or cannot be used, cores, memory, limits."""
    from onnxsplit.views.doctor import diagnose

    found = diagnose()
    output.line(f"Python {found.python} on {found.platform}")
    output.table(("package", "version"), [(name, text or "not installed") for name, text in found.packages.items()])
    output.line()
    output.table(("provider", "state"), [(p.name, p.problem or "can be used") for p in found.providers])
    output.line()
    output.line(f"{found.cores} cores, {found.gpus} NVIDIA GPUs")
    output.line(f"Memory {binary(found.memory_bytes)}, {binary(found.memory_available_bytes)} available")
    output.line(f"Shared memory {binary(found.shared_memory_bytes)} free")
    output.line(f"Temporary files in {found.temporary_folder}, {binary(found.temporary_free_bytes)} free")
    output.line(f"{found.open_files_limit} files may be open")
    output.line()
    for problem in found.problems:
        output.line(f"Problem: {problem}")
    if not found.problems:
        output.line("No problems found. Next: onnxsplit partition model.onnx")
    output.result({"doctor": found})
