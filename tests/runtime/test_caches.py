"""Where the states of sequences lie: every kind of bank with every type and place of the axes, and its memory."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from build import model, value
from decoder_plans import cut, describe
from decoder_runs import FAMILIES
from onnx import helper

from onnxsplit.binding import Binding, view_of
from onnxsplit.plan_decoder import State
from onnxsplit.session import open_session
from onnxsplit.tensors import ONNX_TYPE_NUMBER, numpy_dtype
from runtime.node.caches.bank import Pool, StepSpan, by_position
from runtime.node.caches.caches import Caches
from runtime.node.caches.holes import HolesBank
from runtime.node.caches.in_place import InPlaceBank
from runtime.node.caches.packed import PackedBank
from runtime.node.slots import Move

SLOTS, LENGTH = 6, 200
AXES = [(0, 2), (0, 1), (1, 2), (1, 3), (2, 0), (3, 1)]  # of the rows and of the positions, in states of four axes
TYPES = ["float32", "float16", "bfloat16", "int8"]


def state(name: str, batch: int, axis: int | None, kind: str, capacity: int | None = None) -> State:
    sizes = iter((2, 3, 2))
    shape = [1 if at == batch else 0 if at == axis else next(sizes) for at in range(4)]
    return State(
        past=f"past.{name}", present=f"present.{name}", kind=kind, batch_axis=batch, axis=axis, shape=tuple(shape),
        capacity=capacity, stage=0, token_bytes=1, fixed_bytes=0,
    )  # fmt: skip


def appending(states: list[State], dtype: str) -> onnx.ModelProto:
    """present = past and the new positions, which are inputs of their own."""
    number, free = ONNX_TYPE_NUMBER[dtype], ["a", "b", "c", "d"]
    nodes, inputs, outputs = [], [], []
    for one in states:
        new = one.past.replace("past", "new")
        names = list(free)
        for at, size in enumerate(one.shape):
            if at not in (one.batch_axis, one.axis):
                names[at] = size
        inputs += [
            value(one.past, [f"{n}{one.past}p" if isinstance(n, str) else n for n in names], number),
            value(new, [f"{n}{one.past}n" if isinstance(n, str) else n for n in names], number),
        ]
        outputs.append(value(one.present, None, number))
        nodes.append(helper.make_node("Concat", [one.past, new], [one.present], axis=one.axis))
    return model(nodes, inputs, outputs)


@dataclass
class Rows:
    """A bank, a session on it, and what every slot must hold: one number for each position."""

    bank: HolesBank | PackedBank
    states: list[State]
    dtype: str
    layout: str

    def __post_init__(self) -> None:
        proto = appending(self.states, self.dtype)
        self.session = open_session(proto.SerializeToString(), threads=1)
        self.held: dict[int, list[int]] = {}
        self.counter = itertools.count(1)
        self.binding = self.session.binding()
        self.mark: object = None
        self.generation = self.bank.generation

    def filled(self, one: State, rows: list[list[int]], width: int, *, left: bool) -> np.ndarray:
        """An array of a state whose rows hold these numbers, and 0 elsewhere."""
        shape = [
            len(rows) if at == one.batch_axis else width if at == one.axis else s for at, s in enumerate(one.shape)
        ]
        array = np.zeros((1, *shape), np.float32)
        part = by_position(array, one)[0]
        for row, numbers in enumerate(rows):
            columns = slice(width - len(numbers), width) if left else slice(0, len(numbers))
            part[row, columns] = np.array(numbers, np.float32).reshape(-1, *[1] * (part.ndim - 2))
        return array[0].astype(numpy_dtype(self.dtype))

    def step(self, first: int, count: int, new: int = 1) -> int:
        rows = [self.held.setdefault(slot, []) for slot in range(first, first + count)]
        added = [[next(self.counter) % 100 for _ in range(new)] for _ in rows]
        span = StepSpan(first, tuple(len(row) for row in rows), new, (True,) * count)
        width = self.bank.prepare(span)
        if self.bank.generation != self.generation:
            self.generation, self.binding, self.mark = self.bank.generation, self.session.binding(), None
        self.mark = self.bank.bind(self.binding, self.mark)
        for one in self.states:
            self.binding.feed(one.past.replace("past", "new"), self.filled(one, added, new, left=False))
        self.binding.run()
        made = self.binding.made()
        for one in self.states:
            present = view_of(made[one.present], self.dtype)
            left = self.layout == "left"
            past = self.filled(one, rows, width, left=left)
            columns = by_position(past[None].astype(np.float32), one)[0]
            got = by_position(np.asarray(present, np.float32)[None], one)[0]
            for row, numbers in enumerate(rows):  # nothing is said about the columns that a mask hides
                own = slice(width - len(numbers), width) if left else slice(0, len(numbers))
                assert np.array_equal(got[row, own], columns[row, own])
            assert np.isfinite(got).all()
        self.bank.commit(span, made)
        for row, numbers in zip(rows, added, strict=True):
            row += numbers
        return width

    def move(self, *moves: tuple[int, int]) -> None:
        self.bank.move([Move(source, target, len(self.held[source])) for source, target in moves])
        contents = {target: self.held.pop(source) for source, target in moves}
        self.clear([source for source, _ in moves if source not in contents])
        self.held |= contents

    def clear(self, slots: list[int]) -> None:
        self.bank.clear(slots)
        for slot in slots:
            self.held.pop(slot, None)


@pytest.fixture(params=["holes", "left"])
def layout(request):
    return request.param


def rows_of(layout: str, batch: int, axis: int, dtype: str) -> Rows:
    states = [state(name, batch, axis, "append") for name in "kv"]
    bank = HolesBank(states, dtype, SLOTS, LENGTH) if layout == "holes" else PackedBank(states, [dtype] * 2)
    return Rows(bank, states, dtype, layout)


@pytest.mark.parametrize(("batch", "axis"), AXES)
@pytest.mark.parametrize("dtype", TYPES)
def test_rows_of_unequal_length_share_runs(layout, batch, axis, dtype):
    rows = rows_of(layout, batch, axis, dtype)
    for slot, length in enumerate((17, 5, 40)):
        rows.step(slot, 1, length)
    for _ in range(3):
        rows.step(0, 3)
    rows.step(1, 2)
    rows.step(0, 3, 4)
    rows.clear([1])
    rows.move((2, 1))
    rows.step(0, 2)
    rows.move((0, 1), (1, 0))
    rows.step(0, 2)
    rows.step(2, 1, 3)
    rows.step(0, 3)


def test_a_pool_with_holes_grows_and_shrinks_with_its_rows():
    rows = rows_of("holes", 0, 2, "float32")
    rows.step(0, 1, 60)
    rows.step(1, 1, 3)
    assert rows.step(0, 2) == 64
    for _ in range(5):
        rows.step(0, 2)
    assert rows.step(0, 2) == 128
    assert rows.step(1, 1) == 64, "a step is as wide as its own rows need"
    rows.move((1, 4))
    rows.step(0, 1, 90)
    assert rows.step(0, 1) == LENGTH
    rows.step(4, 1)
    rows.clear([0])
    assert rows.bank._capacity == 64
    rows.step(4, 1)
    rows.clear([4])
    assert rows.bank._scratch.nbytes == 0, "nothing is kept for nobody"
    rows.step(3, 1, 2)
    rows.step(3, 1)


def test_packed_rows_that_stay_together_are_not_copied():
    rows = rows_of("left", 0, 2, "float32")
    rows.step(0, 1, 9)
    rows.step(1, 1, 4)
    rows.step(0, 2)
    gathered = []
    original = rows.bank._gathered
    rows.bank._gathered = lambda step: gathered.append(step) or original(step)
    for _ in range(4):
        rows.step(0, 2)
    assert gathered == []
    rows.step(1, 1)
    assert len(gathered) == 1
    packs = [weakref.ref(pack) for pack, _ in rows.bank._now.values()]
    rows.clear([0, 1])
    rows.binding = None  # the caches drop it as well
    assert [pack() for pack in packs] == [None, None], "nothing is kept for nobody"


@pytest.mark.parametrize(("batch", "axis"), AXES)
def test_states_in_place_of_any_shape_are_the_slots_themselves(batch, axis):
    states = [state(name, batch, axis, "in-place", 7) for name in "kv"]
    bank = InPlaceBank(states, "float32", SLOTS, LENGTH)
    doubled = model(
        [helper.make_node("Add", [one.past, one.past], [one.present]) for one in states],
        [value(one.past, [None] * 4) for one in states],
        [value(one.present, [None] * 4) for one in states],
    )
    session = open_session(doubled.SerializeToString(), threads=1)
    bank._pool.array[...] = np.arange(SLOTS).reshape(1, SLOTS, 1, 1, 1)
    binding, mark = session.binding(), None
    for first, count, times in ((1, 3, 2), (1, 3, 4), (2, 1, 2)):
        span = StepSpan(first, (3,) * count, 1, (True,) * count)
        bank.prepare(span)
        mark = bank.bind(binding, mark)
        before = bank._pool.array.copy()
        binding.run()
        bank.commit(span, {})
        changed = bank._pool.array[:, first : first + count]
        assert np.array_equal(changed, before[:, first : first + count] * 2), times
        rest = [slot for slot in range(SLOTS) if not first <= slot < first + count]
        assert np.array_equal(bank._pool.array[:, rest], before[:, rest])


def test_recurrent_states_keep_the_ones_before_the_last_step():
    one = State(
        past="past", present="present", kind="recurrent", batch_axis=1, axis=None, shape=(2, 1, 3), stage=0,
        token_bytes=0, fixed_bytes=24,
    )  # fmt: skip
    proto = model(
        [helper.make_node("Add", ["past", "x"], ["present"])],
        [value("past", [2, "b", 3]), value("x", [1, "b", 1])],
        [value("present", [2, "b", 3])],
    )
    session, bank = open_session(proto.SerializeToString(), threads=1), PackedBank([one], ["float32"])

    def step(first: int, starts: tuple[int, ...], added: list[float], live=None) -> np.ndarray:
        binding = session.binding()
        span = StepSpan(first, starts, 1, live or (True,) * len(starts))
        bank.prepare(span)
        bank.bind(binding, None)
        binding.feed("x", np.array(added, np.float32).reshape(1, -1, 1))
        binding.run()
        bank.commit(span, made := binding.made())
        return view_of(made["present"], "float32")[0, :, 0].copy()

    assert step(0, (0,), [1]).tolist() == [1]
    assert step(1, (0,), [10]).tolist() == [10]
    assert step(0, (1, 1), [2, 20]).tolist() == [3, 30]
    assert step(0, (1,), [5]).tolist() == [6], "back by one step"
    assert step(0, (2, 2), [1, 1]).tolist() == [7, 31]
    assert step(0, (3, 3), [1, 1], (False, True)).tolist() == [8, 32]
    assert step(0, (3,), [2]).tolist() == [9], "a dead row keeps nothing"
    bank.move([Move(1, 4, 4)])
    bank.clear([1, 0])
    assert step(4, (3,), [0]).tolist() == [31], "the spare has moved too"
    assert step(0, (0,), [1]).tolist() == [1]


def _resident_bytes(array) -> int:
    """The memory that an array of its own mapping takes, as the system counts it."""
    first, found = array.__array_interface__["data"][0], 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word = line.split()[0]
        if "-" in word and not word.endswith(":"):
            begin, end = (int(part, 16) for part in word.split("-"))
            inside = first <= begin < first + array.nbytes or begin <= first < end
        elif inside and word == "Rss:":
            found += int(line.split()[1]) << 10
    return found


BIG = State(
    past="p", present="q", kind="in-place", batch_axis=0, axis=2, shape=(1, 2, 0, 64), stage=0, token_bytes=512,
    fixed_bytes=0,
)  # fmt: skip


def test_a_pool_takes_the_memory_that_is_touched_and_gives_it_back():
    pool = Pool([BIG] * 2, "float32", 1024, 32768)
    assert pool.array.nbytes == 2 << 34
    before = _resident_bytes(pool.array)
    pool.by_position[:, 5, :16384] = 1
    touched = _resident_bytes(pool.array) - before
    assert 15 << 20 < touched < 20 << 20
    pool.move([Move(5, 6, 16384)])
    pool.clear([5, 6])
    assert _resident_bytes(pool.array) - before < 1 << 20
    assert not pool.by_position[:, 5:7, :16384].any()


def test_a_slot_that_is_cut_gives_back_what_lies_behind():
    pool = Pool([BIG] * 2, "float32", 4, 16384)
    before = _resident_bytes(pool.array)
    pool.by_position[:, 1:4, :16384] = 1
    one = (_resident_bytes(pool.array) - before) // 3
    pool.move([Move(2, 2, 1001, keep=True)])
    assert _resident_bytes(pool.array) - before < 2 * one + one // 8
    assert pool.by_position[:, 2, :1001].all()
    assert not pool.by_position[:, 2, 1001:].any()
    assert pool.by_position[:, [1, 3]].all()


def test_clearing_a_slot_leaves_its_neighbours():
    small = state("k", 0, 2, "append")
    pool = Pool([small] * 2, "float32", 5, 700)  # slots begin inside pages
    pool.array[...] = 1
    pool.clear([2])
    assert not pool.array[:, 2].any()
    assert pool.array[:, [0, 1, 3, 4]].all()


def test_a_pool_that_cannot_be_reserved_says_what_to_do():
    with pytest.raises(MemoryError, match=r"does not reserve \d+ bytes .* \(--max-rows, --max-length\)"):
        Pool([state("k", 0, 2, "append")], "float32", 1 << 16, 1 << 40)


def test_controls_live_until_the_run_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("onnxsplit.binding.SMALL_BYTES", 0)  # as masks of many rows or positions are beyond it
    proto = FAMILIES["gqa"].make(seed=3)
    described = describe("gqa", proto, kind="in-place", rows="right", chunk="one-row", length=40)
    plan = cut(proto, described, tmp_path / "p", stages=1)
    session = open_session(tmp_path / "p" / plan.stages[0].file, threads=1)
    fed: list[weakref.ref] = []
    alive: list[bool] = []
    feed, run = Binding.feed, Binding.run

    def feed_noted(self, name, array):
        fed.append(weakref.ref(array))
        feed(self, name, array)

    def run_checked(self):
        alive.extend(one() is not None for one in fed)
        run(self)

    monkeypatch.setattr(Binding, "feed", feed_noted)
    monkeypatch.setattr(Binding, "run", run_checked)
    Caches(plan, 0, session, 4, 40).run(StepSpan(0, (0, 0), 1, (True, True)), [[1], [2]], {}, {})
    assert alive == [True, True]  # tokens and mask
