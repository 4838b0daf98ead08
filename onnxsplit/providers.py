"""Execution providers: how ``--provider`` is read, which stage gets which provider, and which this host can use."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxsplit.errors import MissingDependency, OnnxsplitError, ProviderError
from onnxsplit.numbers import parse_whole

_SHORT_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "dnnl": "DnnlExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}
_NVIDIA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")


@dataclass(frozen=True)
class Provider:
    """An execution provider with its options, as ``--provider`` names it for one stage.

    Attributes:
        text: the user's text without spaces around it: ``cpu``, ``cuda:1``, ``openvino:device_type=GPU``.
        name: ONNX Runtime's name of the provider.
        options: the provider's options.
    """

    text: str
    name: str
    options: Mapping[str, str] = field(default_factory=dict)


def parse_provider(text: str) -> Provider:
    """Read ``cpu``, ``cuda[:N]`` or ``NAME[:N][:KEY=VALUE ...]``.

    NAME is a short name (``tensorrt``, ``openvino`` and so on) or ONNX Runtime's own name. N is the device's number.

    Raises:
        ProviderError: the text has another form.
    """
    name, *parts = text.strip().split(":")
    full = _SHORT_NAMES.get(name.lower(), name)
    if not full.endswith("ExecutionProvider"):
        raise ProviderError(
            f"provider {name!r} is unknown. Allowed: {', '.join(_SHORT_NAMES)}, or ONNX Runtime's own name "
            "of a provider (ending in ExecutionProvider), with options as NAME[:DEVICE][:KEY=VALUE]"
        )
    options: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if equals and key:
            options[key] = value
        elif part.isdecimal() and full != "CPUExecutionProvider":
            options["device_id"] = part
        else:
            raise ProviderError(f"provider {text!r}: {part!r} is neither the number of a device nor KEY=VALUE")
    return Provider(text=text.strip(), name=full, options=options)


def providers_by_stage(text: str, stages: int, default: Sequence[str] | None = None) -> tuple[str, ...]:
    """Assign a provider to every stage.

    Args:
        text: one provider for all stages; ``auto``, which distributes stages over this host's GPUs, or uses the CPU
            without one; or ``0=cuda:0,1=cpu``, where a stage that is not named gets its default.
        stages: the number of stages.
        default: the default provider of each stage; ``cpu`` when None.

    Raises:
        ProviderError: a stage or provider is unknown.
    """
    result = list(default) if default is not None else ["cpu"] * stages
    if text == "auto":
        gpus = gpu_count()
        return tuple(f"cuda:{stage % gpus}" for stage in range(stages)) if gpus else ("cpu",) * stages
    entries = text.split(",")
    if not entries[0].partition("=")[0].strip().isdecimal():
        return (parse_provider(text).text,) * stages
    for entry in entries:
        number, _, provider = entry.partition("=")
        stage = parse_whole(number.strip(), stages - 1)
        if stage is None:
            raise ProviderError(f"{entry!r} in {text!r}: the stages are 0 to {stages - 1}; write STAGE=PROVIDER")
        result[stage] = parse_provider(provider).text
    return tuple(result)


def gpu_count() -> int:
    """The number of CUDA devices that ONNX Runtime can use: 0 without the CUDA provider or an NVIDIA driver."""
    if "CUDAExecutionProvider" not in available_providers():
        return 0
    listed = list(Path("/proc/driver/nvidia/gpus").glob("*")) or list(Path("/dev").glob("nvidia[0-9]*"))
    return len(listed)


def available_providers() -> tuple[str, ...]:
    """The providers of the installed ONNX Runtime; empty if none is installed or it does not load."""
    try:
        return tuple(load_runtime().get_available_providers())
    except OnnxsplitError:
        return ()


def runtime_version() -> str | None:
    """The version of the installed ONNX Runtime; None if none is installed or it does not load."""
    try:
        return str(load_runtime().__version__)
    except OnnxsplitError:
        return None


def provider_problem(name: str) -> str | None:
    """Why a provider, by ONNX Runtime's name, cannot be used on this host; None if no reason is known."""
    try:
        require_provider(load_runtime(), Provider(text=name, name=name))
    except OnnxsplitError as error:
        return str(error)
    if name in _NVIDIA and not gpu_count():
        return "no NVIDIA GPU or driver was found"
    return None


def provider_here(text: str) -> str:
    """The same provider, as ``--provider`` names it, if this host can use it; else ``cpu``."""
    return text if provider_problem(parse_provider(text).name) is None else "cpu"


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


def require_provider(ort: Any, wanted: Provider) -> None:
    """Check that ONNX Runtime has a provider and that the provider's libraries load.

    Raises:
        ProviderError: the provider cannot be used; says what is missing.
    """
    available = ort.get_available_providers()
    if wanted.name not in available:
        hint = (
            "This is the CPU build: pip uninstall onnxruntime, then pip install 'onnxsplit[gpu]'"
            if wanted.name in _NVIDIA
            else "Install the build of ONNX Runtime that has it"
        )
        raise ProviderError(
            f"provider {wanted.text!r} is not in the installed ONNX Runtime {ort.__version__}; "
            f"it has: {', '.join(available)}. {hint}"
        )
    missing = _missing_library(ort, wanted.name)
    if missing is not None:
        raise ProviderError(f"provider {wanted.text!r} cannot load: {missing}")


def _missing_library(ort: Any, name: str) -> str | None:
    """Why a provider's own library does not load; None if it loads or there is none."""
    folder = Path(ort.__file__).parent / "capi"
    library = folder / f"libonnxruntime_providers_{name.removesuffix('ExecutionProvider').lower()}.so"
    if not library.is_file():
        return None
    preload = getattr(ort, "preload_dlls", None)
    if preload is not None and name in _NVIDIA:
        with redirect_stdout(io.StringIO()):
            preload()
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))
    except OSError as error:
        hint = "NVIDIA's driver must be installed; its libraries come with pip install 'onnxsplit[gpu]'"
        return f"{error}" + (f". {hint}" if name in _NVIDIA else "")
    return None


def why_not_loaded(ort: Any, wanted: Provider) -> str:
    """The message for a user whose provider ONNX Runtime replaced by the CPU."""
    return (
        f"provider {wanted.text!r} was asked for, and ONNX Runtime {ort.__version__} fell back to the CPU: the device "
        "or its driver is missing, or the options do not fit. Check nvidia-smi, or use the provider cpu"
    )
