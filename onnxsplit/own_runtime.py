"""Finds out whether another file or folder named ``runtime`` hides the package of that name beside this one."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

_OURS = Path(__file__).resolve().parents[1] / "runtime"


def check_runtime() -> None:
    """Check that ``import runtime`` finds the package that was installed with this one.

    Raises:
        ImportError: something else has its name, or it is missing; the message says where and what to do.
    """
    loaded = sys.modules.get("runtime")
    spec = loaded.__spec__ if loaded is not None else find_spec("runtime")
    if spec is None:
        raise ImportError(f"onnxsplit needs its package 'runtime', which is not in {_OURS.parent}; install it again")
    places = [Path(place).resolve() for place in (spec.submodule_search_locations or [spec.origin or "?"])]
    if _OURS not in places:
        raise ImportError(
            f"onnxsplit needs its package 'runtime', but {places[0]} has the same name and is found first. "
            f"Rename that, or remove its folder from sys.path, which begins with {sys.path[0]!r}"
        )
