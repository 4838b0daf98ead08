"""Runs a plan: each stage in a process of its own, connected by ZeroMQ.

with Pipeline.launch("plan/") as pipeline:
    outputs = pipeline.run({"input": array})
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline

__all__ = ["Pipeline"]


def __getattr__(name: str) -> Any:
    if name == "Pipeline":
        from runtime.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
