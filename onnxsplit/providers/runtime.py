"""The installed ONNX Runtime: its module, its own providers, and the GPUs that it can use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnxsplit.errors import MissingDependency, OnnxsplitError, ProviderError
from onnxsplit.providers.plugins import built_in


def gpu_count() -> int:
    """The number of CUDA devices that ONNX Runtime can use: 0 without the CUDA provider or an NVIDIA driver."""
    if "CUDAExecutionProvider" not in available_providers():
        return 0
    listed = list(Path("/proc/driver/nvidia/gpus").glob("*")) or list(Path("/dev").glob("nvidia[0-9]*"))
    return len(listed)


def available_providers() -> tuple[str, ...]:
    """The providers that the installed ONNX Runtime itself has; empty if none is installed or it does not load."""
    try:
        return built_in(load_runtime())
    except OnnxsplitError:
        return ()


def runtime_version() -> str | None:
    """The version of the installed ONNX Runtime; None if none is installed or it does not load."""
    try:
        return str(load_runtime().__version__)
    except OnnxsplitError:
        return None


def load_runtime() -> Any:
    """Import the module onnxruntime.

    Raises:
        MissingDependency: ONNX Runtime is not installed.
        ProviderError: ONNX Runtime does not load, or two of its builds are installed over each other.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise ProviderError(f"ONNX Runtime does not load: it needs the module {error.name!r}") from error
        raise MissingDependency(
            "ONNX Runtime is not installed. Install exactly one of the two extras: "
            "pip install 'onnxsplit[cpu]' or pip install 'onnxsplit[gpu]'"
        ) from error
    except ImportError as error:
        raise ProviderError(
            f"ONNX Runtime is installed but does not load: {error}. The GPU build needs NVIDIA's libraries: "
            "pip install 'onnxsplit[gpu]' brings them; without a GPU use pip install 'onnxsplit[cpu]' instead "
            "(uninstall onnxruntime-gpu first: the two builds exclude each other)"
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise ProviderError(
            "the installed onnxruntime is broken: onnxruntime and onnxruntime-gpu overwrite each other. "
            "Uninstall both, then install exactly one of 'onnxsplit[cpu]' and 'onnxsplit[gpu]'"
        )
    onnxruntime.set_default_logger_severity(4)  # errors are raised, not logged as well
    return onnxruntime
