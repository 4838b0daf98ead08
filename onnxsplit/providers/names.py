"""How ``--provider`` is read, and which stage gets which provider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnxsplit.errors import ProviderError
from onnxsplit.numbers import parse_whole
from onnxsplit.providers.plugins import PLUGIN_NAMES, installed_plugins
from onnxsplit.providers.runtime import gpu_count

CPU = "CPUExecutionProvider"
"""ONNX Runtime's name of the provider that runs every op."""

_SHORT_NAMES = {
    "cpu": CPU,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "dnnl": "DnnlExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    **PLUGIN_NAMES,
}
_ON_CORES = frozenset((CPU, "DnnlExecutionProvider", "XnnpackExecutionProvider"))


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

    NAME is a short name (``tensorrt``, ``openvino`` and so on), the name of an installed plugin, or ONNX Runtime's own
    name. N is the device's number.

    Raises:
        ProviderError: the text has another form.
    """
    name, *parts = text.strip().split(":")
    full = _full_name(name)
    options: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if full == CPU:
            raise ProviderError(f"provider {text!r}: the CPU has no devices and takes no options; write 'cpu'")
        if equals and key:
            options[key] = value
        elif part.isdecimal():
            options["device_id"] = part
        else:
            raise ProviderError(f"provider {text!r}: {part!r} is neither the number of a device nor KEY=VALUE")
    return Provider(text=text.strip(), name=full, options=options)


def _full_name(name: str) -> str:
    """ONNX Runtime's name of a provider."""
    full = _SHORT_NAMES.get(name.lower(), name)
    if full.endswith("ExecutionProvider"):
        return full
    plugins = installed_plugins()
    for plugin in plugins:
        if plugin.name == name.lower().replace("_", "-"):
            return plugin.provider_names()[0]
    allowed = dict.fromkeys((*_SHORT_NAMES, *(plugin.name for plugin in plugins)))
    raise ProviderError(
        f"provider {name!r} is unknown. Allowed: {', '.join(allowed)}, another plugin once its package "
        "onnxruntime-ep-NAME is installed, or ONNX Runtime's own name of a provider (ending in ExecutionProvider), "
        "with options as NAME[:DEVICE][:KEY=VALUE]"
    )


def threads_on_cores(text: str, threads: int) -> int:
    """The number of threads with which a session computes on the cores of the host; 0 if it computes elsewhere.

    Args:
        text: the provider, as ``--provider`` names it.
        threads: the number of threads that the session is opened with.
    """
    provider = parse_provider(text)
    if provider.name != PLUGIN_NAMES["openvino"]:
        return threads if provider.name in _ON_CORES else 0
    if provider.options.get("device_type", "CPU").upper() != "CPU":
        return 0
    own = provider.options.get("INFERENCE_NUM_THREADS", provider.options.get("num_of_threads", ""))
    return int(own) if own.isdecimal() else threads


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
