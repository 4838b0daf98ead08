"""Runs a plan: each stage in a process of its own, connected by ZeroMQ.

The public names are those of :mod:`onnxsplit`: ``from onnxsplit import Pipeline``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline
    from runtime.requests.generate_options import GenerateOptions
    from runtime.requests.generation import Generated, Generation

__all__ = ["Pipeline", "Generation", "Generated", "GenerateOptions"]

_HOMES = {
    "Pipeline": "runtime.pipeline",
    "Generation": "runtime.requests.generation",
    "Generated": "runtime.requests.generation",
    "GenerateOptions": "runtime.requests.generate_options",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
