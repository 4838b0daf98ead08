"""The steps of a decoder, as one of its stages sees them: what must arrive, what is not allowed, what leaves. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from onnxsplit.plan import CALLER, Plan
from runtime.node.events import OutputsByTarget
from runtime.node.slots import Slots
from runtime.topology import StepGraph
from runtime.wire.messages.data import Fragment
from runtime.wire.messages.sequences import Opening, StepRow


class StageSteps:
    """The steps at one stage.

    Args:
        plan: the plan; it has a decoder.
        stage: the stage.
        slots: the number of slots.
        length: the most positions of a sequence.

    Attributes:
        slots: which sequence is in which slot.
        sources: the stages that send to this one in a step, or the caller; empty if it does not run in steps.
    """

    def __init__(self, plan: Plan, stage: int, slots: int, length: int) -> None:
        decoder = plan.decoder
        assert decoder is not None
        graph = StepGraph(plan)
        self.slots = Slots(slots, rollback=decoder.rollback)
        self.sources = graph.sources.get(stage, frozenset())
        self._decoder = decoder
        self._token_bytes, self._fixed_bytes = decoder.token_bytes(stage), decoder.fixed_bytes(stage)
        self._count = slots
        self._length = min(length or decoder.max_length, decoder.max_length)
        below = decoder.vocabulary if decoder.tokens_below is None else decoder.tokens_below
        self._below = below
        self._drawn_below = min(below, decoder.vocabulary)
        self._readers = tuple(graph.readers.get(stage, {}).items())
        self._is_tail = stage == graph.tail

    @property
    def state_bytes(self) -> int:
        """The bytes of the states that the slots hold. Thread-safe."""
        return self.slots.positions * self._token_bytes + self.slots.sequences * self._fixed_bytes

    def leaving(self, wanted: tuple[str, ...]) -> OutputsByTarget:
        """The outputs that each target of a step gets; the caller always hears from the last stage."""
        scores = tuple(name for name in wanted if name == self._decoder.scores)
        return (*self._readers, *([(CALLER, scores)] if self._is_tail else []))

    def problem(self, fragment: Fragment) -> str:
        """Why a step can never run here; empty if nothing forbids it."""
        rows = fragment.rows
        if fragment.source not in self.sources:
            return f"a step came from stage {fragment.source}, which sends none to this stage"
        if len(rows) > self._count:
            return f"a step of {len(rows)} rows for {self._count} slots"
        first, new = rows[0].slot, len(rows[0].tokens)
        if first + len(rows) > self._count:
            return f"a step of {len(rows)} rows from slot {first} on; there are {self._count} slots"
        if len({row.sequence for row in rows}) != len(rows):
            return "a step holds the same sequence twice"
        for place, row in enumerate(rows):
            if row.slot != first + place:
                return f"sequence {row.sequence} is in slot {row.slot}; its row belongs into slot {first + place}"
            if len(row.tokens) != new:
                return f"sequence {row.sequence} has {len(row.tokens)} new tokens, the first row has {new}"
            if (text := self._row_problem(row)) != "":
                return f"sequence {row.sequence}: {text}"
        return self._layout_problem(rows, new)

    def _row_problem(self, row: StepRow) -> str:
        end = row.start + len(row.tokens)
        if end > self._length:
            return f"positions {row.start} to {end}; at most {self._length} are allowed"
        if max(row.tokens) >= self._below:
            return f"token {max(row.tokens)}; tokens are below {self._below}"
        if row.opening is not None:
            return self._opening_problem(row, row.opening)
        return "it begins without an opening" if row.start == 0 else ""

    def _opening_problem(self, row: StepRow, opening: Opening) -> str:
        """Why a sequence cannot begin like this."""
        sampling, reuse = opening.sampling, opening.reuse
        named = (*(token for token, _ in sampling.bias), *sampling.end_tokens)
        if named and max(named) >= self._drawn_below:
            return f"token {max(named)} among the biases or the end tokens; tokens are below {self._drawn_below}"
        length = 0 if reuse is None else reuse.length
        if not row.start == length == len(opening.reused):
            return f"it begins at {row.start}, and reuses {length} positions with {len(opening.reused)} tokens"
        if reuse is None:
            return ""
        if not self._decoder.rollback:
            return "it reuses states of another sequence; a state of the model cannot be cut"
        if reuse.sequence == row.sequence:
            return "it reuses its own states"
        if max(opening.reused) >= self._below:
            return f"token {max(opening.reused)} among those reused; tokens are below {self._below}"
        return ""

    def _layout_problem(self, rows: Sequence[StepRow], new: int) -> str:
        """Whether the model can run these rows together."""
        layout, chunk, count = self._decoder.rows, self._decoder.chunk, len(rows)
        if count > 1:
            if layout == "one":
                return f"a step of {count} rows; the model runs one row at a time"
            if layout == "equal" and len({row.start for row in rows}) > 1:
                return "rows of unequal length; the model runs rows of one length together"
            if new > 1 and chunk != "rows":
                return f"a step of {count} rows with {new} new tokens each; the model runs one such row at a time"
        if new > 1 and chunk == "none" and any(row.start > 0 for row in rows):
            return f"{new} new tokens behind position {rows[0].start}; the model takes one new token at a time"
        return ""
