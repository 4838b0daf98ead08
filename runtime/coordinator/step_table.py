"""The steps in flight. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.coordinator.chains import StepRecord
from runtime.coordinator.sequence_record import SequenceRecord
from runtime.timings import Timings
from runtime.wire.messages.data import AttemptKey

_SMOOTHING = 0.05  # weight of the latest step in the usual time of one
_MOST_DOUBLINGS = 8
STEP_ATTEMPT = 1
"""The number of the attempt at a step. A step is never repeated: its sequences are, in other steps."""


class StepTable:
    """All steps in flight.

    Args:
        timings: when a step counts as lost.

    Attributes:
        timings: as given; they may be replaced.
        returned_steps: the number of steps that have come back.
        returned_rows: the number of their rows.
    """

    def __init__(self, timings: Timings) -> None:
        self.timings = timings
        self.returned_steps = 0
        self.returned_rows = 0
        self._steps: dict[int, StepRecord] = {}
        self._usual_ns = 0.0  # time from the beginning of a step to its end, for each thousandth of its cost

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(list(self._steps.values()))

    def get(self, number: int) -> StepRecord | None:
        """The step with a number; None when it is not in flight."""
        return self._steps.get(number)

    @property
    def in_flight(self) -> tuple[AttemptKey, ...]:
        """The numbers of the steps, each with that of its only attempt."""
        return tuple((number, STEP_ATTEMPT) for number in self._steps)

    def begin(self, step: StepRecord) -> None:
        """Record a step that is sent."""
        self._steps[step.number] = step
        step.chain.hold(step.held)
        if step.group is not None:
            step.group.step = step.number
        else:
            step.chain.chunks += 1
            step.chain.reading += step.tokens
        for sequence, _ in step.rows:
            sequence.steps.add(step.number)
            sequence.stepped = step.number

    def end(self, number: int) -> StepRecord | None:
        """Remove a step that has come back, or will never; None when it is not in flight."""
        step = self._steps.pop(number, None)
        if step is None:
            return None
        step.chain.let_go(step.held)
        if step.group is not None:
            step.group.step = None
        else:
            step.chain.chunks -= 1
            step.chain.reading -= step.tokens
        for sequence, epoch in step.rows:
            if sequence.epoch == epoch:
                sequence.steps.discard(number)
        return step

    def returned(self, step: StepRecord, now_ns: int) -> None:
        """Note that a step has come back, and how long it took."""
        self.returned_steps += 1
        self.returned_rows += len(step.rows)
        self._usual_ns += _SMOOTHING * (max(0, now_ns - step.begun_ns) / step.cost - self._usual_ns)

    def abandon(self, sequence: SequenceRecord) -> None:
        """A sequence no longer waits for its steps. Those that nobody waits for are removed: nodes drop them."""
        for number in tuple(sequence.steps):
            step = self._steps[number]
            step.live -= 1
            if not step.live:
                self.end(number)
        sequence.steps.clear()

    def overdue(self, now_ns: int) -> tuple[StepRecord, ...]:
        """The steps that have been in flight for too long. A sequence is given twice the time after each such step."""
        lost_ns, factor = self.timings.lost_s * 1e9, self.timings.stall_factor * self._usual_ns
        return tuple(
            step
            for step in self._steps.values()
            if now_ns - step.begun_ns
            > max(lost_ns, factor * step.cost) * 2 ** min(max(row.overdue for row, _ in step.rows), _MOST_DOUBLINGS)
        )
