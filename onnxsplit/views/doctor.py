"""What this host has, and what of it can be used."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from onnxsplit.errors import OnnxsplitError
from onnxsplit.plan import PlanStruct
from onnxsplit.providers import available_providers, gpu_count, load_runtime, provider_problem
from onnxsplit.session import host_cores

PACKAGES = ("onnxsplit", "onnxruntime", "onnxruntime-gpu", "onnx", "networkx", "numpy", "pyzmq", "torch")


class ProviderState(PlanStruct, frozen=True, kw_only=True):
    """A provider of the installed ONNX Runtime; ``problem`` is None when it can be used."""

    name: str
    problem: str | None


class Diagnosis(PlanStruct, frozen=True, kw_only=True):
    """What :func:`diagnose` found; sizes in bytes."""

    python: str
    platform: str
    packages: dict[str, str | None]
    runtime_problem: str | None
    providers: tuple[ProviderState, ...]
    gpus: int
    cores: int
    memory_bytes: int
    memory_available_bytes: int
    shared_memory_bytes: int
    temporary_folder: str
    temporary_free_bytes: int
    open_files_limit: int
    problems: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Look at versions, providers, cores, memory and limits. Starts nothing."""
    runtime_problem = None
    try:
        load_runtime()
    except OnnxsplitError as error:
        runtime_problem = str(error)
    providers = tuple(ProviderState(name=name, problem=provider_problem(name)) for name in available_providers())
    memory = _memory()
    temporary = os.environ.get("TMPDIR") or "/tmp"  # noqa: S108  where nodes put their sockets
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    shared = Path("/dev/shm")  # noqa: S108  looked at, not written
    problems = [runtime_problem] if runtime_problem else []
    installed = {name: _version(name) for name in PACKAGES}
    if installed["onnxruntime"] and installed["onnxruntime-gpu"]:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and break each other: uninstall both, install one"
        )
    if not os.access(temporary, os.W_OK):
        problems.append(f"{temporary} cannot be written; nodes put their sockets there. Set TMPDIR to another folder")
    if files < 1024:
        problems.append(f"only {files} files may be open; raise it with ulimit -n 4096")
    return Diagnosis(
        python=platform.python_version(),
        platform=platform.platform(),
        packages=installed,
        runtime_problem=runtime_problem,
        providers=providers,
        gpus=gpu_count(),
        cores=host_cores(),
        memory_bytes=memory.get("MemTotal", 0),
        memory_available_bytes=memory.get("MemAvailable", 0),
        shared_memory_bytes=shutil.disk_usage(shared).free if shared.is_dir() else 0,
        temporary_folder=temporary,
        temporary_free_bytes=shutil.disk_usage(temporary).free if Path(temporary).is_dir() else 0,
        open_files_limit=files,
        problems=tuple(problems),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
