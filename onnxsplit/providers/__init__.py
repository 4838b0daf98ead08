"""Execution providers: how ``--provider`` is read, which stage gets which provider, and which this host can use.

A provider is part of the installed ONNX Runtime (*built in*), or it comes as a *plugin*: a package
``onnxruntime-ep-NAME`` whose library ONNX Runtime loads. Where both exist, the built-in one is used.
"""

from onnxsplit.providers.names import CPU, Provider, parse_provider, providers_by_stage, threads_on_cores
from onnxsplit.providers.plugins import Plugin, PluginDevice, installed_plugins
from onnxsplit.providers.runtime import available_providers, gpu_count, load_runtime, runtime_version
from onnxsplit.providers.use import (
    provider_here,
    provider_problem,
    require_provider,
    use_provider,
    why_not_loaded,
)

__all__ = [
    "CPU",
    "Plugin",
    "PluginDevice",
    "Provider",
    "available_providers",
    "gpu_count",
    "installed_plugins",
    "load_runtime",
    "parse_provider",
    "provider_here",
    "provider_problem",
    "providers_by_stage",
    "require_provider",
    "runtime_version",
    "use_provider",
    "threads_on_cores",
    "why_not_loaded",
]
