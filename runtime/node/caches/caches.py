"""Runs the steps of one stage on the states that its node keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnxsplit.binding import Binding
from onnxsplit.errors import ModelError
from onnxsplit.plan import Plan
from onnxsplit.plan_decoder import State
from onnxsplit.session import Session
from onnxsplit.step_inputs import control_array
from onnxsplit.tensors import Array
from runtime.node.caches.bank import Bank, StepSpan
from runtime.node.caches.holes import HolesBank
from runtime.node.caches.in_place import InPlaceBank
from runtime.node.caches.packed import PackedBank
from runtime.node.slots import Move

_BINDINGS = 64  # the most bindings that are kept
_WIDTH_FROM = (
    "append",
    "window",
    "recurrent",
    "in-place",
)  # the first kind that a stage has decides how wide a mask is


@dataclass
class _Kept:
    """A binding, and what each bank has bound in it."""

    binding: Binding
    marks: dict[int, object] = field(default_factory=dict)


class Caches:
    """The states of the sequences of one stage.

    Args:
        plan: the plan; it has a decoder.
        stage: the stage.
        session: its session; must be ``bindable``.
        slots: the number of slots.
        length: the most positions of a sequence.

    Raises:
        MemoryError: the system cannot reserve the room; says what to do.
    """

    def __init__(self, plan: Plan, stage: int, session: Session, slots: int, length: int) -> None:
        decoder = plan.decoder
        assert decoder is not None
        self._session = session
        self._layout = decoder.rows
        inputs = frozenset(plan.stages[stage].inputs)
        self._controls = [
            (control, plan.tensors[control.input]) for control in decoder.controls if control.input in inputs
        ]
        self._outputs = tuple(n for n in plan.stages[stage].outputs if n not in decoder.presents())
        states = [state for state in decoder.states if state.stage == stage]
        self._banks = _banks(plan, states, slots, length)
        self._rebinds = any(bank.rebinds for bank in self._banks)
        self._kept: dict[tuple[int, ...], _Kept] = {}
        self._generations: list[int] = []
        self._own: dict[tuple[str, int], Array] = {}  # outputs of decode steps that nobody gave an array for
        self._unbound: set[str] = set()  # outputs whose shapes depend on more than the number of rows

    def move(self, moves: Sequence[Move]) -> None:
        """Move sequences to other slots, or copy them, all at once."""
        for bank in self._banks:
            bank.move(moves)

    def clear(self, slots: Sequence[int]) -> None:
        """Forget the states in some slots, and give their memory back to the system."""
        for bank in self._banks:
            bank.clear(slots)
        self._drop_outdated()

    def run(
        self, step: StepSpan, tokens: Sequence[Sequence[int]], tensors: Mapping[str, Array], into: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Run a step.

        Args:
            step: its rows.
            tokens: for each row, its new tokens.
            tensors: what other stages have sent, by name.
            into: arrays for some of the outputs, of the types and shapes of earlier steps with as many rows and new
                tokens. An output that is returned as another array was not written into them.

        Returns:
            All outputs but the states. They are valid until the next step.

        Raises:
            ModelError: ONNX Runtime could not run the step. The states are as before.
            InputError: the rows cannot share a run.
        """
        kept, width = self._prepare(step)
        binding = kept.binding
        for control, spec in self._controls:
            array = control_array(control, spec, step.starts, step.new, tokens, width, self._layout)
            binding.feed(control.input, array)
        for name, array in tensors.items():
            binding.feed(name, array)
        places = self._places(step, into)
        try:
            made = self._run(binding, places)
        except ModelError:
            if not places:
                raise
            self._rebind(kept)
            made = self._run(binding, {})
            self._unbound |= {n for n, array in places.items() if tuple(made[n].shape()) != array.shape} or set(places)
            places = {}
        for bank in self._banks:
            bank.commit(step, made)
        return {name: places[name] if name in places else self._made(step, name, made) for name in self._outputs}

    def _prepare(self, step: StepSpan) -> tuple[_Kept, int]:
        """The binding for a step, with past and present, and the size of past along the positions."""
        widths = [width for bank in self._banks if (width := bank.prepare(step)) is not None]
        self._drop_outdated()
        key = () if self._rebinds else (step.first, step.rows, step.new)
        kept = self._kept.get(key)
        if kept is None:
            if len(self._kept) >= _BINDINGS:
                self._kept.clear()
            kept = self._kept[key] = _Kept(self._session.binding())
        self._rebind(kept)
        return kept, widths[0] if widths else max(step.starts)

    def _rebind(self, kept: _Kept) -> None:
        for at, bank in enumerate(self._banks):
            kept.marks[at] = bank.bind(kept.binding, kept.marks.get(at))

    def _drop_outdated(self) -> None:
        """Drop the bindings that were made when a bank had other memory."""
        generations = [bank.generation for bank in self._banks]
        if generations != self._generations:
            self._generations = generations
            self._kept.clear()

    def _places(self, step: StepSpan, into: Mapping[str, Array]) -> dict[str, Array]:
        """The arrays that outputs are written into."""
        places = {}
        for name in self._outputs:
            if name in self._unbound:
                continue
            array = into.get(name)
            if array is None and step.new == 1:
                array = self._own.get((name, step.rows))
            if array is not None:
                places[name] = array
        return places

    def _run(self, binding: Binding, places: Mapping[str, Array]) -> Mapping[str, Any]:
        """Run the session; returns what ONNX Runtime has made itself."""
        for name in self._outputs:
            if name in places:
                binding.fill(name, places[name])
            else:
                binding.make(name)
        binding.run()
        return binding.made() if self._rebinds or len(places) < len(self._outputs) else {}

    def _made(self, step: StepSpan, name: str, made: Mapping[str, Any]) -> Array:
        """An output that ONNX Runtime has made; later decode steps with as many rows write it into the same array."""
        array = self._session.view(name, made[name])
        if step.new == 1 and name not in self._unbound:
            self._own[name, step.rows] = array
        return array


def _banks(plan: Plan, states: Sequence[State], slots: int, length: int) -> list[Bank]:
    """The states of a stage in banks; the one that decides how wide a mask is comes first."""
    decoder = plan.decoder
    assert decoder is not None
    groups: dict[tuple[object, ...], list[State]] = {}
    for state in sorted(states, key=lambda state: _WIDTH_FROM.index(state.kind)):
        shape = (plan.tensors[state.past].dtype, state.shape, state.batch_axis, state.axis)
        pooled = state.kind == "in-place" or (state.kind == "append" and decoder.rows == "holes")
        groups.setdefault((state.kind, state.capacity, *(shape if pooled else ())), []).append(state)
    banks: list[Bank] = []
    for group in groups.values():
        dtypes = [plan.tensors[state.past].dtype for state in group]
        if group[0].kind == "in-place":
            banks.append(InPlaceBank(group, dtypes[0], slots, length))
        elif group[0].kind == "append" and decoder.rows == "holes":
            banks.append(HolesBank(group, dtypes[0], slots, length))
        else:
            banks.append(PackedBank(group, dtypes))
    return banks
