"""Odd requests and their permitted outcomes: the answer of plain ONNX Runtime, or certain errors of onnxsplit.

Every kind is a function of a net and a random generator. It returns an :class:`Ask`, or None if it does not apply to
the net. ``KINDS`` lists all by name.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.faults.odd.asked import ROWS, Ask, Errors, Kind, Source, ordinary, unjoinable
from benchmarks.faults.odd.inputs import FORMS, STRINGS, WRONG
from benchmarks.faults.odd.nets import Net
from onnxsplit.errors import InputError, OnnxsplitError
from runtime.errors import Busy, DeadlineExceeded


def warm(net: Net, source: Source) -> list[Ask]:
    """Return a few requests, small and large, after which a pipeline has opened all its resources."""
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


# Cancelling


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
    want = net.answer(inputs, net.plan.outputs)  # such a request is not split, and the model may accept it
    return Ask("", inputs, want, may=(OnnxsplitError,) if want is None else ())


# Outputs


def _subset(net: Net, source: Source) -> Ask:
    rows = int(source.choice([1, 2, 20]))
    inputs = net.make(source, rows)
    names = [*net.plan.outputs, *net.inner]
    chosen = [str(name) for name in source.permutation(names)[: source.integers(1, len(names) + 1)]]
    give = chosen if source.random() < 0.5 else tuple(chosen)
    return Ask("", inputs, net.answer(inputs, chosen), outputs=give, may=unjoinable(net, rows))


def _twice(net: Net, source: Source) -> Ask:
    asked = ordinary(net, source, 2)
    return replace(asked, outputs=[*net.plan.outputs, net.plan.outputs[0]])


def _only_needed_inputs(net: Net, source: Source) -> Ask | None:
    """Ask for one output, with only the inputs that its stages read."""
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
        "cancel a request with little time": _cancel("in a moment", rows=20, timeout=2e-3),
        "batch": _batch,
        "batch without rows": _no_rows,
        "batch that disagrees": _rows_disagree,
        "outputs some": _subset,
        "outputs twice": _twice,
        "outputs that need few inputs": _only_needed_inputs,
        **_OUTPUTS,
        "changed": _changed(2),
        "changed, larger": _changed(ROWS),
        "changed while no node is there": _changed(2, kill=True),
        "changed while no node is there, larger": _changed(ROWS, kill=True),
        **FORMS,
        **WRONG,
        **STRINGS,
        "block=False": _not_waiting,
        "callback raises": _then("raise"),
        "callback exits": _then("exit"),
        "callback submits": _then("submit"),
        "callback submits without waiting": _then("submit without waiting"),
    }.items()
}
"""The odd kinds of requests by name."""


def selected(only: Sequence[str], without: Sequence[str]) -> tuple[str, ...]:
    """Return the kinds whose names contain one of ``only``, and none of ``without``."""
    return tuple(
        name
        for name in KINDS
        if (not only or any(text in name for text in only)) and not any(text in name for text in without)
    )
