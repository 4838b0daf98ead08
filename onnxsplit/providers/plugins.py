"""Plugins: packages ``onnxruntime-ep-NAME`` with a library that adds an execution provider to ONNX Runtime.

The packages share a convention: each holds a module ``onnxruntime_ep_NAME`` with two functions. ``get_library_path``
returns the path of the library, ``get_ep_names`` returns ONNX Runtime's names of its providers. Variants such as
``onnxruntime-ep-NAME-cu13`` hold the same module, and a package without a module only requires another one.

The modules and libraries run code of their own, so they are loaded only when their provider is asked for.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from onnxsplit.errors import ProviderError, in_one_line

_PACKAGE = "onnxruntime-ep-"
_MODULE = "onnxruntime_ep_"

PLUGIN_NAMES = {
    "openvino": "OpenVINOExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
"""ONNX Runtime's names of some plugins, by short name: a plan can name them where the package is not installed."""

_lock = threading.Lock()
_registered: set[str] = set()
_built_in: tuple[str, ...] | None = None


@dataclass(frozen=True)
class PluginDevice:
    """A device that a plugin offers.

    Attributes:
        kind: ``CPU``, ``GPU`` or ``NPU``.
        vendor: the maker of the device.
        name: the name that the plugin gives it, if it does.
        handle: ONNX Runtime's object for it.
    """

    kind: str
    vendor: str
    name: str
    handle: Any

    def __str__(self) -> str:
        """The device in words."""
        return f"{self.kind} ({', '.join(dict.fromkeys(filter(None, (self.vendor, self.name)))) or 'unknown'})"


@dataclass(frozen=True)
class Plugin:
    """An installed package with an execution provider.

    Attributes:
        name: the short name, as ``--provider`` takes it.
        package: the name of the package.
        version: its version.
        module: the name of its module.
    """

    name: str
    package: str
    version: str
    module: str

    def provider_names(self) -> tuple[str, ...]:
        """ONNX Runtime's names of the providers in the plugin. Imports its module, unless the plugin is well known.

        Raises:
            ProviderError: the module does not load.
        """
        if self.name in PLUGIN_NAMES:
            return (PLUGIN_NAMES[self.name],)
        return tuple(map(str, self._call("get_ep_names")))

    def devices(self, ort: Any, provider: str) -> tuple[PluginDevice, ...]:
        """The devices that the plugin offers for one of its providers. Loads its library into this process once.

        Args:
            ort: the module onnxruntime.
            provider: ONNX Runtime's name of the provider.

        Raises:
            ProviderError: the library does not load.
        """
        if not hasattr(ort, "register_execution_provider_library"):
            raise ProviderError(
                f"{self.package} needs ONNX Runtime 1.23 or newer; {ort.__version__} is installed. Upgrade onnxruntime"
            )
        with _lock:
            if self.module not in _registered:
                _remember_built_in(ort)
                library = str(self._call("get_library_path"))
                try:
                    ort.register_execution_provider_library(self.module, library)
                except Exception as error:  # ONNX Runtime's errors share no base class
                    raise ProviderError(
                        f"the library of {self.package} {self.version} does not load into ONNX Runtime "
                        f"{ort.__version__}: {in_one_line(error)}. Install it again, or another version"
                    ) from error
                _registered.add(self.module)
        return tuple(_device(found) for found in ort.get_ep_devices() if found.ep_name == provider)

    def _call(self, function: str) -> Any:
        try:
            return getattr(import_module(self.module), function)()
        except Exception as error:  # code of another package
            raise ProviderError(
                f"the package {self.package} {self.version} does not load: {in_one_line(error)}. Install it again"
            ) from error


def installed_plugins() -> tuple[Plugin, ...]:
    """The installed plugins in order of their names. None of them is loaded."""
    found: dict[str, Plugin] = {}
    for distribution in metadata.distributions():
        package = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if package.startswith(_PACKAGE):
            for module in _modules(distribution):
                name = module.removeprefix(_MODULE).replace("_", "-").lower()
                found.setdefault(name, Plugin(name, package, distribution.version, module))
    return tuple(found[name] for name in sorted(found))


def find_plugin(provider: str) -> Plugin | None:
    """The installed plugin with a provider, by ONNX Runtime's name; None if there is none."""
    plugins = installed_plugins()
    known = [plugin for plugin in plugins if PLUGIN_NAMES.get(plugin.name) == provider]
    others = (plugin for plugin in plugins if plugin.name not in PLUGIN_NAMES and provider in plugin.provider_names())
    return known[0] if known else next(others, None)


def built_in(ort: Any) -> tuple[str, ...]:
    """The providers that ONNX Runtime itself has. It also lists those of plugins, once they are loaded."""
    return _built_in if _built_in is not None else tuple(ort.get_available_providers())


def hardware(ort: Any) -> str:
    """The devices of this host that ONNX Runtime sees, in words."""
    seen = [PluginDevice(*_kind_and_vendor(found), "", None) for found in ort.get_ep_devices()]
    return ", ".join(dict.fromkeys(map(str, seen))) or "none"


def _remember_built_in(ort: Any) -> None:
    global _built_in
    if _built_in is None:
        _built_in = tuple(ort.get_available_providers())


def _modules(distribution: metadata.Distribution) -> Sequence[str]:
    """The modules of a package that follow the convention."""
    listed = (distribution.read_text("top_level.txt") or "").split()
    files = (file.parts[0] for file in distribution.files or () if len(file.parts) > 1)
    return sorted({name for name in (*listed, *files) if re.fullmatch(f"{_MODULE}[A-Za-z0-9_]+", name)})


def _device(found: Any) -> PluginDevice:
    names = found.ep_metadata
    name = names.get("FULL_DEVICE_NAME") or names.get("ov_device") or found.device.metadata.get("Description") or ""
    return PluginDevice(*_kind_and_vendor(found), str(name), found)


def _kind_and_vendor(found: Any) -> tuple[str, str]:
    return str(found.device.type.name), str(found.device.vendor)
