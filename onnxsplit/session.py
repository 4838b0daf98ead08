"""ONNX Runtime sessions: the one place that sets their options.

Every measurement and every node opens its session here, so that what is measured is what runs: the number of
threads is always explicit, threads never spin on a neighbour's core, and a provider that was asked for and cannot
be used is an error instead of a silent fall-back to the CPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxsplit.errors import MissingDependency, ModelError, ModelRefused, OnnxsplitError, ProviderError
from onnxsplit.plan import Level
from onnxsplit.tensors import ONNX_TYPE_NUMBER, Array, is_native, numpy_dtype

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
_RUNTIME_TYPES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True)
class Provider:
    """An execution provider with its options, as ``--provider`` names it for one stage.

    Attributes:
        text: what the user wrote, in normal form: ``cpu``, ``cuda:1``, ``openvino:device_type=GPU``.
        name: ONNX Runtime's name of it.
        options: provider options.
    """

    text: str
    name: str
    options: Mapping[str, str] = field(default_factory=dict)


def parse_provider(text: str) -> Provider:
    """Read ``cpu``, ``cuda[:N]`` or ``NAME[:N][:KEY=VALUE ...]``.

    NAME is a short name (``tensorrt``, ``openvino`` ...) or ONNX Runtime's own. N is the device's number.

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
            raise ProviderError(f"provider {text!r}: {part!r} is neither a device's number nor KEY=VALUE")
    return Provider(text=text.strip(), name=full, options=options)


def providers_by_stage(text: str, stages: int, default: Sequence[str] | None = None) -> tuple[str, ...]:
    """Give every stage its provider.

    Args:
        text: one provider for all; ``auto`` (stages over the GPUs found, else the CPU); or ``0=cuda:0,1=cpu``, where
            a stage that is not named gets ``default``.
        stages: number of stages.
        default: a provider a stage; ``cpu`` when None.

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
        if not number.strip().isdecimal() or int(number) >= stages:
            raise ProviderError(f"{entry!r} in {text!r}: the stages are 0 to {stages - 1}; write STAGE=PROVIDER")
        result[int(number)] = parse_provider(provider).text
    return tuple(result)


def gpu_count() -> int:
    """CUDA devices that ONNX Runtime could use here: 0 without the CUDA provider or an NVIDIA driver."""
    if "CUDAExecutionProvider" not in available_providers():
        return 0
    listed = list(Path("/proc/driver/nvidia/gpus").glob("*")) or list(Path("/dev").glob("nvidia[0-9]*"))
    return len(listed)


def available_providers() -> tuple[str, ...]:
    """The providers the installed ONNX Runtime was built with; empty when none is installed or it does not load."""
    try:
        return tuple(_onnxruntime().get_available_providers())
    except OnnxsplitError:
        return ()


def runtime_version() -> str | None:
    """Version of the installed ONNX Runtime; None when none is installed or it does not load."""
    try:
        return str(_onnxruntime().__version__)
    except OnnxsplitError:
        return None


def require_runtime() -> None:
    """Raise when no ONNX Runtime is installed or it does not load, saying what to do."""
    _onnxruntime()


def provider_problem(name: str) -> str | None:
    """Why a provider of the installed ONNX Runtime cannot be used here; None when nothing speaks against it."""
    try:
        _require_provider(_onnxruntime(), Provider(text=name, name=name))
    except OnnxsplitError as error:
        return str(error)
    if name == "CUDAExecutionProvider" and not gpu_count():
        return "no NVIDIA GPU or driver was found"
    return None


def host_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def threads_per_node(nodes: int) -> int:
    """Threads for each of the nodes that share this host's cores: at least one."""
    return max(1, host_cores() // max(1, nodes))


def quiet_environment() -> dict[str, str]:
    """The environment for a child that must use no more threads than its session was given."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _onnxruntime() -> Any:
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


class Session:
    """An ONNX Runtime session on one model file, fed with and returning NumPy arrays by name.

    Attributes:
        inputs: (name, ONNX type name) of every input; the type is None for sequences, maps and optionals.
        outputs: the same for outputs.
    """

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.inputs = tuple((value.name, runtime_type(value.type)) for value in raw.get_inputs())
        self.outputs = tuple((value.name, runtime_type(value.type)) for value in raw.get_outputs())
        self.output_shapes: dict[str, list[Any]] = {value.name: value.shape for value in raw.get_outputs()}
        self._names = [name for name, _ in self.outputs]
        self._plain = all(kind is not None and is_native(kind) for _, kind in (*self.inputs, *self.outputs))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Execute once.

        Raises:
            ModelError: ONNX Runtime could not execute the model; carries its message.
        """
        try:
            if self._plain:
                return dict(zip(self._names, self._raw.run(self._names, inputs), strict=True))
            return self._run_with_values(inputs)
        except OnnxsplitError:
            raise
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise ModelError(_first_lines(error)) from error

    def _run_with_values(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """As :meth:`run`, for element types that ``session.run`` does not take from NumPy."""
        value_type = _onnxruntime().OrtValue
        values = {}
        for name, kind in self.inputs:
            array = inputs[name]
            if kind is not None and not is_native(kind):
                values[name] = value_type.ortvalue_from_numpy_with_onnx_type(
                    array.view(f"u{array.dtype.itemsize}"), ONNX_TYPE_NUMBER[kind]
                )
            else:
                values[name] = value_type.ortvalue_from_numpy(array)
        results = self._raw.run_with_ort_values(self._names, values)
        return {name: _to_numpy(value, kind) for (name, kind), value in zip(self.outputs, results, strict=True)}

    def end_profiling(self) -> Path:
        """Stop the profile this session was opened with and return its file."""
        return Path(self._raw.end_profiling())


def _to_numpy(value: Any, kind: str | None) -> Array:
    if kind is None or is_native(kind):
        result: Array = value.numpy()
        return result
    dtype = numpy_dtype(kind)
    shape = value.shape()
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if count == 0:
        return np.empty(shape, dtype)
    memory = ctypes.string_at(value.data_ptr(), count)
    return np.frombuffer(bytearray(memory), dtype=np.uint8).view(dtype).reshape(shape)


def runtime_type(text: str) -> str | None:
    """ONNX's name of what ONNX Runtime calls ``tensor(float)``; None for what is no tensor."""
    if not text.startswith("tensor(") or not text.endswith(")"):
        return None
    name = text[len("tensor(") : -1]
    return _RUNTIME_TYPES.get(name, name)


def open_session(
    model: Path | bytes,
    *,
    threads: int,
    level: Level = "all",
    provider: str = "cpu",
    spinning: bool = False,
    external_data_folder: Path | None = None,
    profile_prefix: Path | None = None,
) -> Session:
    """Open a session.

    Args:
        model: a model file, or the bytes of a model.
        threads: threads of one op; ops run one after the other.
        level: graph optimisation level.
        provider: as :func:`parse_provider` reads it.
        spinning: let idle threads spin, as ONNX Runtime does when it has the host to itself.
        external_data_folder: where a model given as bytes finds its external data.
        profile_prefix: when given, ONNX Runtime profiles every run into a file with this prefix.

    Raises:
        MissingDependency: no ONNX Runtime is installed.
        ProviderError: the provider cannot be used; says what is missing.
        ModelRefused: ONNX Runtime refuses the model.
    """
    ort = _onnxruntime()
    wanted = parse_provider(provider)
    _require_provider(ort, wanted)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = getattr(
        ort.GraphOptimizationLevel,
        {"disabled": "ORT_DISABLE_ALL"}.get(level, f"ORT_ENABLE_{level.upper()}"),
    )
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    options.add_session_config_entry("session.inter_op.allow_spinning", str(int(spinning)))
    if external_data_folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(external_data_folder)
        )
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    providers: list[Any] = [(wanted.name, dict(wanted.options))]
    if wanted.name != "CPUExecutionProvider":
        providers.append("CPUExecutionProvider")
    source = model if isinstance(model, bytes) else str(model)
    try:
        raw = ort.InferenceSession(source, options, providers=providers)
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise ModelRefused(f"ONNX Runtime {ort.__version__} refuses the model: {_first_lines(error)}") from error
    if wanted.name not in raw.get_providers():
        raise ProviderError(_why_not_loaded(ort, wanted))
    return Session(raw)


def _require_provider(ort: Any, wanted: Provider) -> None:
    available = ort.get_available_providers()
    if wanted.name not in available:
        hint = (
            "This is the CPU build: pip uninstall onnxruntime, then pip install 'onnxsplit[gpu]'"
            if wanted.name in ("CUDAExecutionProvider", "TensorrtExecutionProvider")
            else "Install the build of ONNX Runtime that has it"
        )
        raise ProviderError(
            f"provider {wanted.text!r} is not in the installed ONNX Runtime {ort.__version__}; "
            f"it has: {', '.join(available)}. {hint}"
        )
    if wanted.name == "CUDAExecutionProvider":
        missing = _missing_cuda_library(ort)
        if missing is not None:
            raise ProviderError(f"provider {wanted.text!r} cannot load: {missing}")


def _missing_cuda_library(ort: Any) -> str | None:
    """Why the CUDA provider's library does not load; None when it does."""
    import io
    from contextlib import redirect_stdout

    preload = getattr(ort, "preload_dlls", None)
    if preload is not None:
        with redirect_stdout(io.StringIO()):
            preload()
    folder = Path(ort.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        return f"{error}. NVIDIA's driver must be installed; its libraries come with pip install 'onnxsplit[gpu]'"
    return None


def _why_not_loaded(ort: Any, wanted: Provider) -> str:
    return (
        f"provider {wanted.text!r} was asked for, and ONNX Runtime {ort.__version__} fell back to the CPU: the device "
        "or its driver is missing, or the options do not fit. Check nvidia-smi, or use the provider cpu"
    )


def _first_lines(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 600 else text[:600] + " ..."
