"""How a node tells probes of a supervisor that it lives: a file that it writes anew with each sign of life.

The file holds the state of the node in a word (``waiting``, ``loading``, ``ready``, ...). A shell can ask it:

    is ready    grep -q ready FILE
    lives       test $(($(date +%s) - $(stat -c %Y FILE))) -lt 15
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from onnxsplit.files import replacing


def write_health(file: Path, state: str) -> None:
    """Say how the node is, now."""
    with suppress(OSError), replacing(file) as draft:  # a full disk makes the probe fail, and not the node
        draft.write_text(f"{state}\n")
