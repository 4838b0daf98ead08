"""Odd requests, and what may become of each: the answer of plain ONNX Runtime, or an error of ours that is fitting.

Every kind is a function of a net and a source of chance; it gives an :class:`Ask`, or None where the net has no use
for it. ``KINDS`` lists all by name.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.faults.odd.nets import Net
from onnxsplit.errors import InputError, OnnxsplitError
from runtime.errors import Busy, DeadlineExceeded

ROWS = 64
"""Of the largest batches."""

Errors = tuple[type[BaseException], ...]
Source = np.random.Generator


@dataclass(frozen=True)
class Ask:
    """A request, and what may become of it.

    Attributes:
        kind: its name in ``KINDS``.
        inputs: as handed to ``submit``; so are ``outputs``, ``timeout`` and ``block``.
        want: the right answer; None when no answer is right.
        may: the errors that it may fail with instead.
        cancel: ``at once``, ``in a moment`` or ``after the answer``.
        change: write other values into the inputs as soon as ``submit`` has returned.
        kill: kill the node of the first stage before, so that the request waits for another.
        then: what a callback of the future does: ``raise``, ``exit``, ``submit`` or ``submit without waiting``.
    """

    kind: str
    inputs: Any
    want: dict[str, Any] | None
    outputs: Any = None
    timeout: Any = None
    block: bool = True
    may: Errors = ()
    cancel: str = ""
    change: bool = False
    kill: bool = False
    then: str = ""


Kind = Callable[[Net, Source], "Ask | None"]


def ordinary(net: Net, source: Source, rows: int | None = None) -> Ask:
    """A request as it should be, of a few rows."""
    inputs = net.make(source, int(source.integers(1, 4)) if rows is None else rows)
    return Ask("ordinary", inputs, net.answer(inputs, net.plan.outputs), may=_unjoinable(net, rows or 3))


def _unjoinable(net: Net, rows: int) -> Errors:
    """Parts of the longest row may have lengths that cannot be joined, which is an error of its plan."""
    return (OnnxsplitError,) if net.name == "longest" and rows > net.micro_batch else ()


def _refused(net: Net, source: Source, **changes: Any) -> Ask:
    """A request that must be refused for what it says."""
    return replace(ordinary(net, source), want=None, may=(InputError,), **changes)


def warm(net: Net, source: Source) -> list[Ask]:
    """What opens all that a pipeline opens late: a few requests, small and large."""
    large = KINDS["strings large"](net, source)
    asks = [ordinary(net, source, rows) for rows in (1, 2, ROWS)]
    return 4 * (asks if large is None else [*asks, large])


# Time


def _timeout(value: Any, *, right: bool, may: Errors) -> Kind:
    def kind(net: Net, source: Source) -> Ask:
        asked = ordinary(net, source, int(source.choice([2, 2, 40])))
        return replace(asked, timeout=value, want=asked.want if right else None, may=(*asked.may, *may))

    return kind


_TIMEOUTS: list[tuple[Any, bool, Errors]] = [
    *((value, True, (DeadlineExceeded, InputError)) for value in (0, 1e-9, 1e-4, 1e-3, 3e-3)),
    *((value, True, (InputError,)) for value in (1e9, 1e10, 1e300, math.inf, 2**62, 2**63, 2**70, 10**400, True)),
    *((value, True, ()) for value in (None, 60, 60.0)),
    *((value, True, (InputError,)) for value in (np.float32(60), np.int64(60), decimal.Decimal(60))),
    *((value, False, (DeadlineExceeded, InputError)) for value in (-1, -1e-9, -math.inf, -(2**70))),
    *((value, False, (InputError,)) for value in (math.nan, "5", b"5", [5], {}, 5j, object())),
]


# Giving up


def _cancel(when: str, *, rows: int | None = None, timeout: float | None = None) -> Kind:
    may: Errors = (DeadlineExceeded,) if timeout else ()

    def kind(net: Net, source: Source) -> Ask:
        asked = ordinary(net, source, rows)
        return replace(asked, cancel=when, timeout=timeout, may=(*asked.may, *may))

    return kind


# Batches


def _batch(net: Net, source: Source) -> Ask:
    return ordinary(net, source, int(source.integers(1, ROWS + 1)))


def _no_rows(net: Net, source: Source) -> Ask:
    asked = ordinary(net, source, 0)
    return replace(asked, may=(OnnxsplitError,) if asked.want is None else ())


def _rows_disagree(net: Net, source: Source) -> Ask | None:
    if net.name not in ("dag", "longest"):
        return None
    few, many = net.make(source, 9), net.make(source, 10)
    first = next(iter(few))
    inputs = {**many, first: few[first]}
    want = net.answer(inputs, net.plan.outputs)  # such a request runs whole, and the model may take it
    return Ask("", inputs, want, may=(OnnxsplitError,) if want is None else ())


# Outputs


def _subset(net: Net, source: Source) -> Ask:
    rows = int(source.choice([1, 2, 20]))
    inputs = net.make(source, rows)
    names = [*net.plan.outputs, *net.inner]
    chosen = [str(name) for name in source.permutation(names)[: source.integers(1, len(names) + 1)]]
    give = chosen if source.random() < 0.5 else tuple(chosen)
    return Ask("", inputs, net.answer(inputs, chosen), outputs=give, may=_unjoinable(net, rows))


def _twice(net: Net, source: Source) -> Ask:
    asked = ordinary(net, source, 2)
    return replace(asked, outputs=[*net.plan.outputs, net.plan.outputs[0]])


def _only_needed_inputs(net: Net, source: Source) -> Ask | None:
    """One output, and only the inputs that its stages read."""
    for name in net.plan.outputs:
        stages = net.plan.stages_for((name,))
        needed = {read for stage in stages for read in net.plan.stages[stage].inputs} & set(net.plan.inputs)
        if stages and needed != set(net.plan.inputs):
            asked = ordinary(net, source)
            inputs = {read: asked.inputs[read] for read in needed}
            return replace(asked, inputs=inputs, outputs=[name], want={name: (asked.want or {})[name]})
    return None


def _outputs(value: Callable[[Net], Any], *, right: bool = False) -> Kind:
    def kind(net: Net, source: Source) -> Ask:
        asked = ordinary(net, source)
        name = net.plan.outputs[0]
        want = {name: asked.want[name]} if right and asked.want else None
        return replace(asked, outputs=value(net), want=want, may=(*asked.may, InputError))

    return kind


_OUTPUTS: dict[str, Kind] = {
    "outputs=[]": _outputs(lambda _: []),
    "outputs unknown": _outputs(lambda net: [net.plan.outputs[0], "no such output"]),
    "outputs one text": _outputs(lambda net: net.plan.outputs[0], right=True),
    "outputs a list in a list": _outputs(lambda net: [[net.plan.outputs[0]]]),
    "outputs numbers": _outputs(lambda _: [1, 2.5]),
    "outputs [None]": _outputs(lambda _: [None]),
    "outputs bytes": _outputs(lambda net: [net.plan.outputs[0].encode()]),
    "outputs a number": _outputs(lambda _: 7),
    "outputs a generator": _outputs(lambda net: (name for name in net.plan.outputs[:1]), right=True),
    "outputs a dict": _outputs(lambda net: {net.plan.outputs[0]: 1}, right=True),
    "outputs [{}]": _outputs(lambda _: [{}]),
    "outputs an input": _outputs(lambda net: [net.plan.inputs[-1]]),
    "outputs a lone surrogate": _outputs(lambda _: ["\ud800"]),
    "outputs a long name": _outputs(lambda _: ["y" * 1_000_000]),
}


# Inputs that change


def _changed(rows: int, *, kill: bool = False) -> Kind:
    def kind(net: Net, source: Source) -> Ask:
        asked = ordinary(net, source, rows)
        return replace(asked, change=True, kill=kill)

    return kind


# Arrays


def _as(change: Callable[[Any], Any], *, may: Errors = (), rows: int | None = None) -> Kind:
    """The same values in another form."""

    def kind(net: Net, source: Source) -> Ask | None:
        if net.name == "strings":
            return None
        asked = ordinary(net, source, rows if rows is not None else int(source.choice([1, 3, ROWS])))
        inputs = {name: change(array) for name, array in asked.inputs.items()}
        return replace(asked, inputs=inputs, may=(*asked.may, *_unjoinable(net, ROWS), *may))

    return kind


def _strided(array: Any) -> Any:
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def _read_only(array: Any) -> Any:
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)


def _misaligned(array: Any) -> Any:
    memory = np.zeros(array.nbytes + 1, np.uint8)
    memory[1:] = np.frombuffer(array.tobytes(), np.uint8)
    return memory[1:].view(array.dtype).reshape(array.shape)


class _Subclass(np.ndarray):  # type: ignore[type-arg]
    pass


def _broadcast(net: Net, source: Source) -> Ask | None:
    if net.name not in ("chain", "dag", "positions"):
        return None
    inputs = {n: np.broadcast_to(a, (40, a.shape[1])) for n, a in net.make(source, 1).items()}
    plain = {name: np.array(array) for name, array in inputs.items()}
    return Ask("", inputs, net.answer(plain, net.plan.outputs))


def _shared(net: Net, source: Source) -> Ask | None:
    if net.name != "dag":
        return None
    one = net.make(source, 20)["x"]
    return Ask("", {"x": one, "z": one}, net.answer({"x": one, "z": one}, net.plan.outputs))


_FORMS: dict[str, Kind] = {
    "big-endian": _as(lambda a: a.astype(a.dtype.newbyteorder(">"))),
    "F-order": _as(np.asfortranarray),
    "strided": _as(_strided),
    "negative strides": _as(lambda a: np.ascontiguousarray(a[::-1])[::-1]),
    "read-only": _as(_read_only),
    "misaligned": _as(_misaligned),
    "a list": _as(lambda a: a.tolist(), may=(InputError,)),
    "masked": _as(lambda a: np.ma.array(a, mask=a > 0), may=(InputError,)),
    "a subclass": _as(lambda a: a.view(_Subclass)),
    "an array of objects": _as(lambda a: a.astype(object), may=(InputError,)),
    "a memoryview": _as(memoryview, may=(InputError,)),
    "one row repeated": _broadcast,
    "one array for two inputs": _shared,
}


# What is no input


class _NoArray:
    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("this will not be an array")


def _wrong(change: Callable[[Any], Any]) -> Kind:
    """Something else in place of every array."""

    def kind(net: Net, source: Source) -> Ask:
        asked = _refused(net, source)
        return replace(asked, inputs={name: change(array) for name, array in asked.inputs.items()})

    return kind


def _wrong_inputs(change: Callable[[dict[str, Any]], Any]) -> Kind:
    """Something else in place of the inputs."""

    def kind(net: Net, source: Source) -> Ask:
        asked = _refused(net, source)
        return replace(asked, inputs=change(asked.inputs))

    return kind


_WRONG: dict[str, Kind] = {
    "float128": _wrong(lambda a: np.zeros(a.shape, np.longdouble)),
    "complex": _wrong(lambda a: np.zeros(a.shape, np.complex64)),
    "dates": _wrong(lambda a: np.zeros(a.shape, "M8[s]")),
    "a structure": _wrong(lambda a: np.zeros(a.shape, [("a", "f4"), ("b", "i4")])),
    "None": _wrong(lambda _: None),
    "text": _wrong(lambda _: "text"),
    "a number": _wrong(lambda _: 5),
    "a dict": _wrong(lambda _: {"a": 1}),
    "a ragged list": _wrong(lambda _: [[1.0, 2.0], [3.0]]),
    "a list with None": _wrong(lambda _: [[1.0, None]]),
    "what will not be an array": _wrong(lambda _: _NoArray()),
    "one dimension more": _wrong(lambda a: a[np.newaxis]),
    "33 dimensions": _wrong(lambda a: a.reshape((1,) * (33 - a.ndim) + a.shape)),
    "inputs None": _wrong_inputs(lambda _: None),
    "inputs a list": _wrong_inputs(list),
    "inputs pairs": _wrong_inputs(lambda inputs: list(inputs.items())),
    "inputs empty": _wrong_inputs(lambda _: {}),
    "inputs with another": _wrong_inputs(lambda inputs: {**inputs, "no such input": np.zeros(3)}),
    "inputs with a number for a name": _wrong_inputs(lambda inputs: {**inputs, 1: np.zeros(3)}),
    "inputs with None for a name": _wrong_inputs(lambda inputs: {**inputs, None: np.zeros(3)}),
    "inputs with a long name": _wrong_inputs(lambda inputs: {**inputs, "x" * 1_000_000: np.zeros(3)}),
}


# Strings


def _strings(texts: Callable[[], Any], *, may: Errors | None = None, plain: Callable[[], Any] | None = None) -> Kind:
    """String inputs; ``plain`` gives what they mean, None of them nothing that is right."""

    def kind(net: Net, _: Source) -> Ask | None:
        if net.name != "strings":
            return None
        want = net.answer({"s": plain()}, net.plan.outputs) if plain is not None else None
        return Ask("", {"s": texts()}, want, may=(InputError,) if may is None else may)

    return kind


def _objects(*items: Any) -> Callable[[], Any]:
    def make() -> Any:
        found = np.empty(len(items), object)
        found[:] = items
        return found

    return make


_STRINGS: dict[str, Kind] = {
    "strings None": _strings(_objects(None, "b")),
    "strings numbers": _strings(_objects(1, 2.5)),
    "strings nested": _strings(_objects(["a"], ["b", "c"])),
    "strings not UTF-8": _strings(_objects(b"\xff\xfe", "b")),
    "strings lone surrogates": _strings(_objects("\ud800", "b")),
    "strings lone surrogates, many": _strings(_objects(*["x" * 100 + "\udfff"] * 50)),
    "strings of objects": _strings(_objects(object(), "b")),
    "strings bytes": _strings(_objects("ä".encode(), b"b"), plain=_objects("ä", "b")),
    "strings bytes of numpy": _strings(lambda: np.array([b"ab", b"c"]), plain=_objects("ab", "c")),
    "strings bytes of numpy, not UTF-8": _strings(lambda: np.array([b"\xff", b"c"])),
    "strings text of numpy": _strings(lambda: np.array(["ab", "c"]), plain=_objects("ab", "c"), may=()),
    "strings text, big-endian": _strings(
        lambda: np.array(["ab", "c"]).astype(">U2"), plain=_objects("ab", "c"), may=()
    ),
    "strings a list": _strings(lambda: ["ab", "c"], plain=_objects("ab", "c")),
    "strings of NumPy's strings": _strings(_objects(np.str_("ab"), "c"), plain=_objects("ab", "c")),
    "strings with zeros": _strings(_objects("a\0b", "\0"), plain=_objects("a\0b", "\0")),
    "strings empty": _strings(_objects("", ""), plain=_objects("", ""), may=()),
    "strings large": _strings(_objects("x" * 300_000, "y"), plain=_objects("x" * 300_000, "y"), may=()),
    "strings beyond 16 bits": _strings(_objects("\U0001f600", "é"), plain=_objects("\U0001f600", "é"), may=()),
}


# Callers


def _then(what: str) -> Kind:
    def kind(net: Net, source: Source) -> Ask:
        return replace(ordinary(net, source), then=what)

    return kind


def _not_waiting(net: Net, source: Source) -> Ask:
    asked = ordinary(net, source)
    return replace(asked, block=False, may=(*asked.may, Busy))


def _called(timeout: Any) -> str:
    text = type(timeout).__name__ if type(timeout) is object else repr(timeout)
    return f"timeout={text}" if len(text) < 40 else f"timeout={text[:10]}... of {len(text)} digits"


def _named(name: str, kind: Kind) -> Kind:
    def found(net: Net, source: Source) -> Ask | None:
        asked = kind(net, source)
        return None if asked is None else replace(asked, kind=name)

    return found


KINDS: dict[str, Kind] = {
    name: _named(name, kind)
    for name, kind in {
        **{_called(value): _timeout(value, right=right, may=may) for value, right, may in _TIMEOUTS},
        "cancel at once": _cancel("at once"),
        "cancel in a moment": _cancel("in a moment"),
        "cancel after the answer": _cancel("after the answer"),
        "cancel a batch at once": _cancel("at once", rows=ROWS),
        "cancel a batch in a moment": _cancel("in a moment", rows=ROWS),
        "cancel what has little time": _cancel("in a moment", rows=20, timeout=2e-3),
        "batch": _batch,
        "batch of none": _no_rows,
        "batch that disagrees": _rows_disagree,
        "outputs some": _subset,
        "outputs twice": _twice,
        "outputs that need few inputs": _only_needed_inputs,
        **_OUTPUTS,
        "changed": _changed(2),
        "changed, larger": _changed(ROWS),
        "changed while no node is there": _changed(2, kill=True),
        "changed while no node is there, larger": _changed(ROWS, kill=True),
        **_FORMS,
        **_WRONG,
        **_STRINGS,
        "block=False": _not_waiting,
        "callback raises": _then("raise"),
        "callback exits": _then("exit"),
        "callback submits": _then("submit"),
        "callback submits without waiting": _then("submit without waiting"),
    }.items()
}
"""The odd kinds of requests by name."""


def selected(only: Sequence[str], without: Sequence[str]) -> tuple[str, ...]:
    """The kinds whose names hold one of ``only``, and none of ``without``."""
    return tuple(
        name
        for name in KINDS
        if (not only or any(text in name for text in only)) and not any(text in name for text in without)
    )
