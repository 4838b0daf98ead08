"""How long things may take before they count as failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from onnxsplit.errors import InputError
from onnxsplit.numbers import MOST_SECONDS, real_problem


@dataclass(frozen=True, kw_only=True)
class Timings:
    """When something counts as failed, and when to try again. All in seconds unless said.

    Attributes:
        beat_s: between two signs of life, in either direction.
        silence_s: without one, a node that serves, or the coordinator, is taken for dead.
        loading_silence_s: the same for a node that is not ready yet. One whose link was closed has ``silence_s``.
        stall_s: a run that lasts no longer is never taken for stuck.
        stall_factor: a run is taken for stuck when it lasts so many times what is usual.
        backoff_s: before the second restart in a row of a node; doubled each time. The first comes at once.
        backoff_most_s: between two restarts at most.
        settled_s: a node that served so long has its failures forgotten.
        circuit_failures: failures in a row of one node that open its circuit: it is left alone for a while.
        circuit_s: for so long; then it is tried once more.
        lost_s: an attempt that is under way for longer, and for longer than ``stall_factor`` times the usual, is made
            again: a message was lost.
        drain_s: a node that was told to end waits so long to be relieved of its work.
        unreachable_s: a link between two processes that is not connected for so long is taken for dead.
    """

    beat_s: float = 0.5
    silence_s: float = 5.0
    loading_silence_s: float = 60.0
    stall_s: float = 10.0
    stall_factor: float = 20.0
    backoff_s: float = 0.25
    backoff_most_s: float = 30.0
    settled_s: float = 5.0
    circuit_failures: int = 5
    circuit_s: float = 30.0
    lost_s: float = 30.0
    drain_s: float = 30.0
    unreachable_s: float = 3.0


def timings(changes: Mapping[str, float]) -> Timings:
    """The usual timings, with changes by name.

    Raises:
        InputError: there is no such timing, or it is not a number above 0 and at most 115 days.
    """
    known = {field.name: field.type for field in fields(Timings)}
    for name, value in changes.items():
        if name not in known:
            raise InputError(f"there is no timing {name!r}; there are: {', '.join(known)}")
        problem = real_problem(f"the timing {name}", value, MOST_SECONDS)
        if problem is None and known[name] == "int" and round(value) < 1:
            problem = f"the timing {name} must be at least 1, not {value:g}"
        if problem:
            raise InputError(problem)
    return Timings(**{name: round(value) if known[name] == "int" else value for name, value in changes.items()})  # type: ignore[arg-type]
