"""Why a model is not treated as a decoder, as the parts of the detection say it."""

from __future__ import annotations

from collections.abc import Collection

from onnxsplit.errors import shown

_MOST_NAMES = 4

DECIDE = "decide it with --decoder FILE.toml"
"""What a user can do where detection finds no answer."""


class NotClaimed(Exception):
    """The model looks like a decoder and cannot be claimed as one; the message is the reason, in one line."""


def listed(names: Collection[str]) -> str:
    """A few names for a message, and the number of the others."""
    few = [shown(name, 60) for name in names][:_MOST_NAMES]
    return ", ".join(few) + (f" and {len(names) - len(few)} more" if len(names) > len(few) else "")
