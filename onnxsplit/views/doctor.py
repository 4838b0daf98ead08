"""A diagnosis of this host: versions, providers, cores, memory and limits, and what is wrong with them."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from onnxsplit.errors import OnnxsplitError
from onnxsplit.machine_load import cpu_times
from onnxsplit.plan_base import PlanStruct
from onnxsplit.providers import available_providers, gpu_count, load_runtime, provider_problem
from onnxsplit.providers.probe import PluginState, plugin_states
from onnxsplit.session import host_cores

_LOAD_S = 0.5  # how long the load is observed
PACKAGES = ("onnxsplit", "onnxruntime", "onnxruntime-gpu", "onnx", "networkx", "numpy", "pyzmq", "torch")


class ProviderState(PlanStruct, frozen=True, kw_only=True):
    """A provider of the installed ONNX Runtime, and why it cannot be used; ``problem`` is None if it can be used."""

    name: str
    problem: str | None


class Diagnosis(PlanStruct, frozen=True, kw_only=True):
    """The result of :func:`diagnose`.

    Attributes:
        python: version of Python.
        platform: the operating system and processor.
        packages: version of each package; None if it is not installed.
        runtime_problem: why ONNX Runtime does not load; None if it loads.
        providers: the providers of the installed ONNX Runtime.
        plugins: the installed plugins, packages ``onnxruntime-ep-NAME`` with further providers.
        gpus: number of CUDA devices that ONNX Runtime can use.
        cores: number of cores that this process may use.
        load_1_min: the processes that worked or waited for a core, on average over the last minute.
        busy_share: the share of the cores that is in use now.
        stolen_share: the share of the cores that the host of this virtual machine takes now.
        memory_bytes: memory of the host.
        memory_available_bytes: memory that is available.
        shared_memory_bytes: free space in ``/dev/shm``.
        temporary_folder: the folder of nodes' sockets.
        temporary_free_bytes: free space in it.
        open_files_limit: number of files that a process may have open.
        problems: each problem in words, and what to do.
    """

    python: str
    platform: str
    packages: dict[str, str | None]
    runtime_problem: str | None
    providers: tuple[ProviderState, ...]
    plugins: tuple[PluginState, ...]
    gpus: int
    cores: int
    load_1_min: float
    busy_share: float
    stolen_share: float
    memory_bytes: int
    memory_available_bytes: int
    shared_memory_bytes: int
    temporary_folder: str
    temporary_free_bytes: int
    open_files_limit: int
    problems: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Diagnose this host. A process is started for each plugin, and loads it."""
    before = cpu_times()
    time.sleep(_LOAD_S)
    busy_share, stolen_share = cpu_times().busy_share_since(before), cpu_times().stolen_share_since(before)
    runtime_problem = None
    try:
        load_runtime()
    except OnnxsplitError as error:
        runtime_problem = str(error)
    providers = tuple(ProviderState(name=name, problem=provider_problem(name)) for name in available_providers())
    memory = _memory()
    temporary = os.environ.get("TMPDIR") or "/tmp"  # noqa: S108  where nodes put their sockets
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    shared = Path("/dev/shm")  # noqa: S108  only read
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
        plugins=plugin_states(),
        gpus=gpu_count(),
        cores=host_cores(),
        load_1_min=os.getloadavg()[0],
        busy_share=busy_share,
        stolen_share=stolen_share,
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
