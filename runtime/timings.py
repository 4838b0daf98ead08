"""How long things may take before they count as failed, and when to try again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from onnxsplit.errors import InputError
from onnxsplit.numbers import MOST_SECONDS, real_problem


@dataclass(frozen=True, kw_only=True)
class Timings:
    """When something counts as failed, and when to try again.

    Attributes:
        beat_s: seconds between two heartbeats, in either direction.
        silence_s: seconds without a heartbeat after which a node that serves, or the coordinator, counts as dead.
        loading_silence_s: the same for a node that is not ready yet, unless its link was closed.
        stall_s: a run that is shorter than this number of seconds never counts as stuck.
        stall_factor: a run that lasts longer than this many times the usual time counts as stuck.
        backoff_s: seconds before the second restart in a row of a node, doubled each time. The first comes at once.
        backoff_most_s: the largest number of seconds between two restarts.
        settled_s: seconds that a node must serve for its earlier failures to be forgotten.
        circuit_failures: failures in a row of one node after which it is not restarted for a while (an open circuit
            breaker).
        circuit_s: seconds before such a node is started once more.
        lost_s: seconds after which an attempt is repeated, if it has also lasted longer than ``stall_factor`` times
            the usual time: a message must have been lost.
        drain_s: seconds for which a node that was told to end waits until it has no more work.
        unreachable_s: seconds without a connection after which a link between two processes counts as dead.
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
    """The default timings, with changes by name.

    Raises:
        InputError: a name is unknown, or a value is not a number above 0 and at most 115 days.
    """
    known = {field.name: field.type for field in fields(Timings)}
    for name, value in changes.items():
        if name not in known:
            raise InputError(f"timing {name!r} is unknown; allowed: {', '.join(known)}")
        problem = real_problem(f"the timing {name}", value, MOST_SECONDS)
        if problem is None and known[name] == "int" and round(value) < 1:
            problem = f"the timing {name} must be at least 1, not {value:g}"
        if problem:
            raise InputError(problem)
    return Timings(**{name: round(value) if known[name] == "int" else value for name, value in changes.items()})  # type: ignore[arg-type]
