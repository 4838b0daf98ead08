"""The health file of a node, for the probes of a supervisor. The node rewrites it with each heartbeat.

The file holds the node's phase in one word (``waiting``, ``loading``, ``ready``, ...). Shell commands for probes:

    readiness   grep -q ready FILE
    liveness    test $(($(date +%s) - $(stat -c %Y FILE))) -lt 15
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from onnxsplit.files import replacing


def write_health(file: Path, state: str) -> None:
    """Write the node's phase into its health file."""
    with suppress(OSError), replacing(file) as draft:  # a full disk makes the probe fail, but not the node
        draft.write_text(f"{state}\n")
