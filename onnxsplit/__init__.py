"""Cut any ONNX model into cost-balanced stages, with a plan that other processes can run.

``import onnxsplit`` loads no heavy library; the public names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxsplit.errors import OnnxsplitError
    from onnxsplit.plan import Plan
    from onnxsplit.plan_files import load_plan
    from onnxsplit.planning.planner import partition

__version__ = "0.1.0"
__all__ = ["partition", "load_plan", "Plan", "OnnxsplitError", "__version__"]

_HOMES = {
    "partition": "onnxsplit.planning.planner",
    "load_plan": "onnxsplit.plan_files",
    "Plan": "onnxsplit.plan",
    "OnnxsplitError": "onnxsplit.errors",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'onnxsplit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
