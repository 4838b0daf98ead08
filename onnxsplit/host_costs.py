"""What requests cost on this host: measured once with ``onnxsplit doctor --measure``, and kept in the user's cache.

The file is ``$XDG_CACHE_HOME/onnxsplit/host.json``, by default in ``~/.cache``. It names the processor, the cores and
the version that it was measured with; figures of another one are not used.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

import onnxsplit
from onnxsplit.errors import InputError
from onnxsplit.files import read_regular, replacing
from onnxsplit.plan import TYPICAL_HOST, HostCosts
from onnxsplit.plan_base import PlanStruct

_MOST_BYTES = 1 << 16


class _Kept(PlanStruct, frozen=True, kw_only=True):
    host: str
    costs: HostCosts


def host_costs() -> HostCosts:
    """The costs that were measured on this host, or else typical ones."""
    try:
        kept = msgspec.json.decode(read_regular(costs_file(), most_bytes=_MOST_BYTES), type=_Kept)
    except (OSError, msgspec.DecodeError, RuntimeError):  # RuntimeError: the user has no home folder
        return TYPICAL_HOST
    return kept.costs if kept.host == _host() else TYPICAL_HOST


def keep_host_costs(costs: HostCosts) -> Path:
    """Keep the costs of this host for later plans.

    Returns:
        The file.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        file = costs_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(_Kept(host=_host(), costs=costs))))
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"the measured costs cannot be kept: {error}. Set XDG_CACHE_HOME to a folder of yours"
        ) from error
    return file


def costs_file() -> Path:
    """The file of the measured costs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxsplit" / "host.json"


def _host() -> str:
    """The processor, the number of its cores that this process may use, and the version of onnxsplit."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{model}, {len(os.sched_getaffinity(0))} cores, onnxsplit {onnxsplit.__version__}"
