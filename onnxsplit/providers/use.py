"""Using a provider: whether this host can, and what a session is told."""

from __future__ import annotations

import ctypes
import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from onnxsplit.errors import OnnxsplitError, ProviderError
from onnxsplit.providers.names import CPU, Provider, parse_provider
from onnxsplit.providers.openvino import OPENVINO, openvino_options
from onnxsplit.providers.plugins import PLUGIN_NAMES, Plugin, PluginDevice, built_in, find_plugin, hardware
from onnxsplit.providers.runtime import gpu_count, load_runtime

_NVIDIA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
_NO_DEVICE = {
    OPENVINO: "The plugin takes only Intel devices. A build of ONNX Runtime has OpenVINO for other CPUs: pip uninstall "
    "onnxruntime, then pip install onnxruntime-openvino",
    "WebGpuExecutionProvider": "It needs a GPU with a driver for Vulkan; Vulkan in software is not enough",
}
_PLUGIN_OPTIONS = ("device_id", "device_type")  # they choose the device


def provider_problem(name: str) -> str | None:
    """Why a provider cannot be used on this host; None if no reason is known.

    Args:
        name: the provider as ``--provider`` names it, such as ONNX Runtime's own name. A plugin is loaded.
    """
    try:
        provider = parse_provider(name)
        require_provider(load_runtime(), provider)
    except OnnxsplitError as error:
        return str(error)
    if provider.name in _NVIDIA and not gpu_count():
        return "no NVIDIA GPU or driver was found"
    return None


def provider_here(text: str) -> str:
    """The same provider, as ``--provider`` names it, if this host can use it; else ``cpu``."""
    parse_provider(text)
    return text if provider_problem(text) is None else "cpu"


def require_provider(ort: Any, wanted: Provider) -> None:
    """Check that this host has a provider: that its libraries load, and that a plugin offers the device.

    Raises:
        ProviderError: the provider cannot be used; says what is missing.
    """
    if wanted.name not in built_in(ort):
        _plugin_device(ort, wanted)
        return
    missing = _missing_library(ort, wanted.name)
    if missing is not None:
        raise ProviderError(f"provider {wanted.text!r} cannot load: {missing}")


def use_provider(ort: Any, options: Any, wanted: Provider, threads: int) -> list[Any]:
    """Give a provider to a session.

    Args:
        ort: the module onnxruntime.
        options: the session's options; a plugin is added to them.
        wanted: the provider.
        threads: threads of the session, for a provider that has threads of its own.

    Returns:
        The session's argument ``providers``.

    Raises:
        ProviderError: the provider cannot be used; says what is missing.
    """
    require_provider(ort, wanted)
    given = dict(wanted.options)
    if wanted.name == OPENVINO:
        given = openvino_options(wanted.options, threads)
    if wanted.name not in built_in(ort):
        device = _plugin_device(ort, wanted)
        given = {key: value for key, value in given.items() if key not in _PLUGIN_OPTIONS}
        try:
            options.add_provider_for_devices([device.handle], given)
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise ProviderError(f"provider {wanted.text!r} cannot be used on {device}: {error}") from error
        return []
    return [(wanted.name, given), *([] if wanted.name == CPU else [CPU])]


def _plugin_device(ort: Any, wanted: Provider) -> PluginDevice:
    """The device of a plugin that a provider names; the first one that the plugin offers if it names none."""
    plugin = find_plugin(wanted.name)
    if plugin is None:
        raise ProviderError(_not_installed(ort, wanted))
    kind = wanted.options.get("device_type", "CPU" if wanted.name == OPENVINO else "").upper()
    number = int(wanted.options.get("device_id", 0))
    offered = plugin.devices(ort, wanted.name)
    suitable = [device for device in offered if kind in ("", device.kind)]
    if number < len(suitable):
        return suitable[number]
    why = no_device(ort, plugin, wanted.name)
    if offered:
        why = f"it does not offer this device here. It offers: {', '.join(map(str, offered))}"
    raise ProviderError(f"provider {wanted.text!r}, {plugin.package} {plugin.version}: {why}")


def no_device(ort: Any, plugin: Plugin, provider: str) -> str:
    """The message for a user whose plugin offers no device for one of its providers."""
    hint = _NO_DEVICE.get(provider, f"Check the driver of the device that {plugin.name} is for")
    return f"it finds no device that it can use. ONNX Runtime sees: {hardware(ort)}. {hint}"


def _not_installed(ort: Any, wanted: Provider) -> str:
    short = wanted.text.partition(":")[0]
    if wanted.name in _NVIDIA:
        hint = "This is the CPU build: pip uninstall onnxruntime, then pip install 'onnxsplit[gpu]'"
    elif short.lower() in PLUGIN_NAMES:
        hint = f"Install its plugin: pip install onnxruntime-ep-{short.lower()}"
    else:
        hint = "Install the build of ONNX Runtime that has it, or its plugin, a package onnxruntime-ep-NAME"
    return (
        f"provider {wanted.text!r} is not in the installed ONNX Runtime {ort.__version__}; "
        f"it has: {', '.join(built_in(ort))}. {hint}"
    )


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
    check = "Check nvidia-smi. " if wanted.name in _NVIDIA else ""
    return (
        f"provider {wanted.text!r} was asked for, and ONNX Runtime {ort.__version__} fell back to the CPU: the device "
        f"or its driver is missing, or the options do not fit. {check}Use the provider cpu"
    )
