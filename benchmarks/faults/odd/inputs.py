"""Odd inputs: the same values in other forms, objects that are not inputs, and strings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.faults.odd.asked import ROWS, Ask, Errors, Kind, Source, ordinary, refused, unjoinable
from benchmarks.faults.odd.nets import Net
from onnxsplit.errors import InputError


def _as(change: Callable[[Any], Any], *, may: Errors = (), rows: int | None = None) -> Kind:
    """Return a kind that gives the same values in another form."""

    def kind(net: Net, source: Source) -> Ask | None:
        if net.name == "strings":
            return None
        asked = ordinary(net, source, rows if rows is not None else int(source.choice([1, 3, ROWS])))
        inputs = {name: change(array) for name, array in asked.inputs.items()}
        return replace(asked, inputs=inputs, may=(*asked.may, *unjoinable(net, ROWS), *may))

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


FORMS: dict[str, Kind] = {
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


class _NoArray:
    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("this will not be an array")


def _wrong(change: Callable[[Any], Any]) -> Kind:
    """Return a kind that replaces every array by something else."""

    def kind(net: Net, source: Source) -> Ask:
        asked = refused(net, source)
        return replace(asked, inputs={name: change(array) for name, array in asked.inputs.items()})

    return kind


def _wrong_inputs(change: Callable[[dict[str, Any]], Any]) -> Kind:
    """Return a kind that replaces the inputs by something else."""

    def kind(net: Net, source: Source) -> Ask:
        asked = refused(net, source)
        return replace(asked, inputs=change(asked.inputs))

    return kind


WRONG: dict[str, Kind] = {
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
    "an object that refuses to be an array": _wrong(lambda _: _NoArray()),
    "one dimension more": _wrong(lambda a: a[np.newaxis]),
    "33 dimensions": _wrong(lambda a: a.reshape((1,) * (33 - a.ndim) + a.shape)),
    "inputs None": _wrong_inputs(lambda _: None),
    "inputs a list": _wrong_inputs(lambda inputs: [inputs]),
    "inputs pairs": _wrong_inputs(lambda inputs: list(inputs.items())),
    "inputs empty": _wrong_inputs(lambda _: {}),
    "inputs with another": _wrong_inputs(lambda inputs: {**inputs, "no such input": np.zeros(3)}),
    "inputs with a number for a name": _wrong_inputs(lambda inputs: {**inputs, 1: np.zeros(3)}),
    "inputs with None for a name": _wrong_inputs(lambda inputs: {**inputs, None: np.zeros(3)}),
    "inputs with a long name": _wrong_inputs(lambda inputs: {**inputs, "x" * 1_000_000: np.zeros(3)}),
}


def _strings(texts: Callable[[], Any], *, may: Errors | None = None, plain: Callable[[], Any] | None = None) -> Kind:
    """Return a kind with string inputs; ``plain`` gives the strings that they mean, or None if they must be refused."""

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


STRINGS: dict[str, Kind] = {
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
