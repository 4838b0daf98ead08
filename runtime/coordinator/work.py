"""All requests and all sequences of a pipeline, where it does not matter which of the two something is. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from onnxsplit.errors import InputError, OnnxsplitError
from runtime.coordinator.events import Steps, Submitted, Tick, Unsendable
from runtime.coordinator.numbers import Numbers
from runtime.coordinator.reach import LinkKey
from runtime.coordinator.requests import RequestTable
from runtime.coordinator.sequence_events import SequenceSubmitted
from runtime.coordinator.sequences import SequenceTable
from runtime.wire.messages.data import AttemptKey, Failed, Step


class Work:
    """All requests and all sequences that have not ended. They share one count of numbers.

    Args:
        requests: the requests.
        sequences: the sequences; None where the plan has no decoder.
        numbers: numbers requests, sequences and steps.
    """

    def __init__(self, requests: RequestTable, sequences: SequenceTable | None, numbers: Numbers) -> None:
        self._requests = requests
        self._sequences = sequences
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._requests) + (len(self._sequences) if self._sequences is not None else 0)

    @property
    def oldest(self) -> int:
        """The oldest request or sequence, or else the next number; nodes may forget all before it."""
        firsts = [self._requests.oldest, self._sequences.oldest if self._sequences is not None else None]
        return min((first for first in firsts if first is not None), default=self._numbers.following)

    @property
    def kept(self) -> tuple[int, ...]:
        """The sequences that have ended, and whose states nodes must not forget."""
        return self._sequences.kept if self._sequences is not None else ()

    @property
    def in_flight(self) -> tuple[AttemptKey, ...]:
        """The attempts at requests, and the steps of sequences, that are under way."""
        steps = self._sequences.in_flight if self._sequences is not None else ()
        return self._requests.in_flight + steps

    @property
    def next_deadline_ns(self) -> int | None:
        """The next deadline; None when there is none."""
        times = [self._requests.deadlines.next_ns()]
        if self._sequences is not None:
            times.append(self._sequences.deadlines.next_ns())
        return min((at for at in times if at is not None), default=None)

    def expired(self, now_ns: int) -> tuple[tuple[int, AttemptKey], ...]:
        """The numbers whose deadline has passed. With each, the attempt or the step that nodes may be executing."""
        requests = tuple((key[0], key) for key in self._requests.expired(now_ns))
        return requests + (self._sequences.expired(now_ns) if self._sequences is not None else ())

    def is_overdue(self, now_ns: int) -> bool:
        """Whether an attempt or a step has been under way for too long."""
        return bool(self._requests.overdue(now_ns)) or (
            self._sequences is not None and self._sequences.is_overdue(now_ns)
        )

    def take_ended(self) -> bool:
        """Whether anything has ended or left its nodes since this was called last."""
        ended, self._requests.has_ended = self._requests.has_ended, False
        if self._sequences is not None:
            ended, self._sequences.has_ended = ended or self._sequences.has_ended, False
        return ended

    def may_reach(self, number: int, leaves_at: int) -> bool:
        """Whether a node that leaves, and that views from this one on do not have, may still have or get work."""
        sequences = self._sequences is not None and self._sequences.uses(number)
        return sequences or leaves_at > self._requests.oldest_view

    def submit(self, event: Submitted | SequenceSubmitted) -> OnnxsplitError | None:
        """Accept a request or a sequence; returns why it cannot be accepted."""
        if isinstance(event, Submitted):
            self._requests.submit(event)
        elif self._sequences is None:
            return InputError("the pipeline takes no sequences, because its plan has no decoder")
        else:
            self._sequences.submit(event)
        return None

    # What ends attempts and epochs

    def resume(self, now_ns: int) -> None:
        """Use the nodes as they are now: begin all that waits for them."""
        self._requests.resume(now_ns)
        if self._sequences is not None:
            self._sequences.resume(now_ns)

    def time_passed(self, tick: Tick) -> None:
        """Repeat what is overdue."""
        self._requests.time_passed(tick)
        if self._sequences is not None:
            self._sequences.time_passed(tick)

    def node_lost(self, stage: int, number: int, called: str, reason: str, steps: Steps) -> int:
        """Repeat what a lost node had; see :meth:`.RequestTable.node_lost`."""
        count = self._requests.node_lost(stage, number, called, reason, steps)
        if self._sequences is not None:
            count += self._sequences.node_lost(number, called, reason, steps)
        return count

    def links_died(self, links: list[LinkKey], now_ns: int) -> None:
        """Repeat what may be stuck at links that were just found dead; :meth:`resume` begins it."""
        self._requests.links_died(links, now_ns)
        if self._sequences is not None:
            self._sequences.links_died(links)

    # What ends requests and sequences

    def reported(self, message: Failed) -> None:
        """Handle an attempt or a step that a node could not execute."""
        self._requests.reported(message)
        if self._sequences is not None:
            self._sequences.reported(message)

    def unsendable(self, event: Unsendable) -> None:
        """End what cannot be sent, or what has brought outputs that cannot be read."""
        if event.attempt in (0, self._requests.attempt(event.request)):
            self._requests.refuse(event.request, event.error)
        if self._sequences is not None:
            self._sequences.unsendable(event.request, event.error)

    def time_ran_out(self, number: int, steps: Mapping[int, Step]) -> None:
        """End a request or a sequence whose deadline has passed."""
        self._requests.time_ran_out(number, steps)
        if self._sequences is not None:
            self._sequences.time_ran_out(number, steps)

    def refuse(self, number: int, error: OnnxsplitError) -> None:
        """End a request or a sequence with an error; nothing happens when it has ended."""
        self._requests.refuse(number, error)
        if self._sequences is not None:
            self._sequences.refuse(number, error)

    def refuse_hopeless(self) -> None:
        """Refuse what waits for a stage whose nodes keep failing."""
        self._requests.refuse_hopeless()
        if self._sequences is not None:
            self._sequences.refuse_hopeless()

    def refuse_all(self, error: OnnxsplitError) -> None:
        """End everything with an error."""
        self._requests.refuse_all(error)
        if self._sequences is not None:
            self._sequences.refuse_all(error)
