"""What every benchmark says of the machine it ran on."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType


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


def ended(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Close the standard input of a process that ends with it, and reap it; kill it when it takes too long."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def benchmark(name: str) -> ModuleType:
    """Another benchmark's module, for what it shares."""
    spec = importlib.util.spec_from_file_location(Path(name).name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment_line() -> str:
    """The same in one line."""
    return ", ".join(f"{name} {value}" for name, value in environment().items())
