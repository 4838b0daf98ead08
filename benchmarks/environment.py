"""What every benchmark says of the machine it ran on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def environment() -> dict[str, str]:
    """Processor, cores, Python and the versions that matter."""
    from onnxsplit.session import host_cores

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    found = {"processor": model, "cores": str(host_cores()), "python": platform.python_version()}
    for package in ("onnxsplit", "onnxruntime", "onnx", "pyzmq", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment_line() -> str:
    """The same in one line."""
    return ", ".join(f"{name} {value}" for name, value in environment().items())
