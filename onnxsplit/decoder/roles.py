"""The roles of the inputs that are not states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from onnxsplit.decoder.constants import Constants
from onnxsplit.decoder.names import of_encoder, role_by_name
from onnxsplit.decoder.op_slots import attribute, domain_of, role_of_slot, table_slot
from onnxsplit.decoder.override import Override
from onnxsplit.decoder.reasons import DECIDE, NotClaimed, listed
from onnxsplit.decoder.traces import Trace
from onnxsplit.model.graph import Op, OpGraph
from onnxsplit.plan import Shape, TensorSpec
from onnxsplit.plan_decoder import Control, Role

_INTEGERS = frozenset({"int32", "int64"})
_SAME_ROWS = frozenset(["Identity", "Cast", "DequantizeLinear", "Slice", "Squeeze", "Unsqueeze", "Reshape"])
_MOST_STEPS = 8


class Inputs:
    """How a graph reads its inputs: roles by the ops that read them, and the tables that they pick rows of."""

    def __init__(self, graph: OpGraph, traces: Mapping[str, Trace]) -> None:
        self._graph, self._traces = graph, traces
        self._constants = Constants(graph)
        self.uses: dict[str, set[Role]] = {}
        self.tables: dict[str, int] = {}
        self.most_positions: int | None = None
        for op in graph.ops:
            self._read(op)

    def _read(self, op: Op) -> None:
        for position, name in enumerate(op.node.input):
            trace = self._traces.get(name)
            role = role_of_slot(op, position)
            if role is not None and trace is not None and trace.kind is None and not trace.parts:
                self.uses.setdefault(trace.source, set()).add(role)
        rotations = table_slot(op)
        if rotations is not None and rotations < len(op.node.input):
            self._limit(self._rows(op.node.input[rotations], _MOST_STEPS))
        table = self._picked(op)
        if table is not None:
            source, rows = table
            self.tables[source] = min(rows, self.tables.get(source, rows))

    def _picked(self, op: Op) -> tuple[str, int] | None:
        """The input by which an op picks rows of a constant table, and the number of rows."""
        kind, names = (domain_of(op), op.op_type), op.node.input
        axis = {("", "Gather"): "axis", ("com.microsoft", "GatherBlockQuantized"): "gather_axis"}.get(kind)
        if axis is not None:
            trace, place = self._traces.get(names[1]), attribute(op, axis, 0)
            rows = self._rows(names[0], _MOST_STEPS) if place == 0 else None
        elif kind == ("com.microsoft", "EmbedLayerNormalization"):
            trace, rows = self._traces.get(names[0]), self._rows(names[2], _MOST_STEPS)
        else:
            return None
        if trace is None or rows is None or trace.kind is not None or trace.parts:
            return None
        return trace.source, rows

    def _rows(self, name: str, steps: int) -> int | None:
        """The rows of a constant table with two axes; further axes have size 1."""
        shape = self._constants.shape(name)
        if shape is not None:
            sizes = [size for size in shape if size != 1]
            return sizes[0] if len(sizes) == 2 else None
        index = self._graph.producer.get(name)
        if index is None or steps == 0 or self._graph.ops[index].op_type not in _SAME_ROWS:
            return None
        return self._rows(self._graph.ops[index].node.input[0], steps - 1)

    def _limit(self, rows: int | None) -> None:
        if rows is not None:
            self.most_positions = rows if self.most_positions is None else min(rows, self.most_positions)


def tokens_input(
    names: Sequence[str], specs: Mapping[str, TensorSpec], reads: Inputs, common: Mapping[str, str], override: Override
) -> str | None:
    """The input with the new tokens; None where no input picks rows of an embedding table.

    Args:
        names: the inputs that are not states.
        specs: types and shapes of the inputs.
        reads: how the graph reads them.
        common: common names of inputs, from a file beside the model.
        override: the user's decisions.

    Raises:
        NotClaimed: several inputs may be it, or it does not have the shape [rows, new tokens].
    """
    given = [control.input for control in override.controls if control.role == "tokens"]
    if override.tokens is not None or given:
        return override.tokens or given[0]
    integers = [name for name in names if name in specs and specs[name].dtype in _INTEGERS]
    by_name = [name for name in integers if _role(common.get(name, name)) == "tokens"]
    unnamed = [name for name in integers if _role(common.get(name, name)) is None]
    picks = [name for name in unnamed if name in reads.tables and not reads.uses.get(name)]
    found = by_name or picks
    if not found:
        return None
    if len(found) > 1:
        raise NotClaimed(
            f"several inputs may be the tokens: {listed(found)}; give tokens = NAME in --decoder FILE.toml"
        )
    shape = specs[found[0]].shape
    if shape is not None and len(shape) != 2:
        raise NotClaimed(f"the tokens {found[0]!r} have {len(shape)} axes; [rows, new tokens] are needed")
    return found[0]


def control_claims(
    names: Iterable[str],
    tokens: str,
    specs: Mapping[str, TensorSpec],
    reads: Inputs,
    common: Mapping[str, str],
    override: Override,
    unread: Iterable[str],
) -> tuple[Control, ...]:
    """The controls of a model.

    Args:
        names: the inputs that are not states.
        tokens: the input with the tokens.
        specs: types and shapes of the inputs.
        reads: how the graph reads them.
        common: common names of inputs, from a file beside the model.
        override: the user's decisions.
        unread: inputs that no op reads, so that any value will do.

    Raises:
        NotClaimed: names the inputs whose role is not known or cannot be played.
    """
    given = {control.input: control for control in override.controls}
    ignored = set(unread)
    controls, unknown = [], []
    for name in names:
        if name in given:
            controls.append(given[name])
            continue
        if name == tokens:
            controls.append(Control(input=name, role="tokens"))
            continue
        if of_encoder(name):
            raise NotClaimed(f"{name!r} comes from an encoder; models with one are not run with resident caches yet")
        spec = specs.get(name)
        role = _decided(name, common.get(name, name), spec.shape if spec is not None else None, reads)
        if role is not None:
            controls.append(role)
        elif name in ignored:
            controls.append(Control(input=name, role="fixed", value=0))
        else:
            unknown.append(name)
    if unknown:
        what = "input" if len(unknown) == 1 else "inputs"
        raise NotClaimed(
            f"nothing says what the {what} {listed(unknown)} must be in a step; give each a [[control]] in --decoder "
            "FILE.toml"
        )
    return tuple(controls)


def _role(common: str) -> Role | None:
    found = role_by_name(common)
    return found[0] if found is not None else None


def _decided(name: str, common: str, shape: Shape | None, reads: Inputs) -> Control | None:
    """The control that an input is; the ops that read it decide before its name."""
    by_name, used = role_by_name(common), reads.uses.get(name, set())
    if by_name is not None and by_name[0] == "fixed":
        return Control(input=name, role="fixed", value=by_name[1])
    if len(used) > 1:
        raise NotClaimed(f"ops read {name!r} as {' and as '.join(sorted(used))}; {DECIDE}")
    role = next(iter(used), by_name[0] if by_name is not None else None)
    if role == "tokens":  # there is another input with the tokens
        return None
    if role is None and name in reads.tables:
        role = "positions"
    return None if role is None else Control(input=name, role=_played(name, role, shape))


def _played(name: str, role: Role, shape: Shape | None) -> Role:
    """The role that an input of this shape can play."""
    if shape is None:
        return role
    text = "[" + ", ".join(str(size) for size in shape) + "]"
    if role == "positions":
        if len(shape) > 2 or (len(shape) == 2 and shape[0] == 3):
            raise NotClaimed(
                f"{name!r} {text} has several positions for each token (multimodal rotary embedding), which is not "
                "supported"
            )
        return "past-length" if shape in ((), (1,)) else role  # the position of the first new token
    if role == "mask" and len(shape) != 2:
        raise NotClaimed(f"the mask {name!r} {text} has {len(shape)} axes; [rows, positions] are needed")
    if role in ("past-length", "total-length", "last-index") and len(shape) > 2:
        raise NotClaimed(f"{name!r} {text} has {len(shape)} axes; a length of each row is needed")
    return role
