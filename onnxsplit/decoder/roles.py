"""The roles of the inputs that are not states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnxsplit.decoder.names import role_by_name
from onnxsplit.decoder.op_slots import role_of_slot
from onnxsplit.decoder.override import Override
from onnxsplit.decoder.reasons import DECIDE, NotClaimed, listed
from onnxsplit.decoder.traces import Trace
from onnxsplit.model.graph import OpGraph
from onnxsplit.plan import Shape, TensorSpec
from onnxsplit.plan_decoder import Control, Role

_INTEGERS = frozenset({"int32", "int64"})


def roles_by_use(graph: OpGraph, traces: Mapping[str, Trace]) -> dict[str, set[Role]]:
    """The roles that the ops that read an input give it, by input."""
    uses: dict[str, set[Role]] = {}
    for op in graph.ops:
        for position, name in enumerate(op.node.input):
            trace, role = traces.get(name), role_of_slot(op, position)
            if role is not None and trace is not None and trace.kind is None and not trace.parts:
                uses.setdefault(trace.source, set()).add(role)
    return uses


@dataclass(frozen=True)
class Inputs:
    """The inputs that are not states, and what is known of them.

    Attributes:
        names: their names.
        specs: types and shapes of the model's inputs.
        uses: the roles that the ops that read an input give it.
        tables: the number of rows of the table that an input picks rows of.
        common: common names of inputs, from a file beside the model.
        unread: inputs that no op reads, so that any value will do.
    """

    names: Sequence[str]
    specs: Mapping[str, TensorSpec]
    uses: Mapping[str, set[Role]]
    tables: Mapping[str, int]
    common: Mapping[str, str]
    unread: frozenset[str]


def tokens_input(inputs: Inputs, override: Override) -> str | None:
    """The input with the new tokens; None where no input picks rows of an embedding table.

    Raises:
        NotClaimed: several inputs may be it, or it does not have the shape [rows, new tokens].
    """
    given = [control.input for control in override.controls if control.role == "tokens"]
    if override.tokens is not None or given:
        return override.tokens or given[0]
    decided = {control.input for control in override.controls}
    integers = [
        name
        for name in inputs.names
        if name not in decided and name in inputs.specs and inputs.specs[name].dtype in _INTEGERS
    ]
    found = [name for name in integers if _role(inputs.common.get(name, name)) == "tokens"]
    if len(found) > 1:
        found = [name for name in found if name in inputs.tables]
    if not found:
        unnamed = [name for name in integers if _role(inputs.common.get(name, name)) is None]
        found = [name for name in unnamed if name in inputs.tables and inputs.uses.get(name, {"tokens"}) == {"tokens"}]
    if not found:
        return None
    if len(found) > 1:
        raise NotClaimed(
            f"several inputs may be the tokens: {listed(found)}; give tokens = NAME in --decoder FILE.toml"
        )
    shape = inputs.specs[found[0]].shape
    if shape is not None and len(shape) != 2:
        raise NotClaimed(f"the tokens {found[0]!r} {_text(shape)} need two axes: [rows, new tokens]")
    return found[0]


def control_claims(inputs: Inputs, tokens: str, override: Override) -> tuple[Control, ...]:
    """The controls of a model: all its inputs that are not states.

    Args:
        inputs: the inputs.
        tokens: the input with the tokens.
        override: the user's decisions.

    Raises:
        NotClaimed: names the inputs whose role is not known or cannot be played.
    """
    given = {control.input: control for control in override.controls}
    controls, unknown = [], []
    for name in inputs.names:
        control = given.get(name) or (Control(input=name, role="tokens") if name == tokens else _decided(name, inputs))
        if control is None and name in inputs.unread:
            control = Control(input=name, role="fixed", value=0)
        if control is None:
            unknown.append(name)
        else:
            controls.append(control)
    if unknown:
        what, each = ("input", "it") if len(unknown) == 1 else ("inputs", "each of them")
        raise NotClaimed(
            f"nothing says what the {what} {listed(unknown)} must be in a step; give {each} a [[control]] in --decoder "
            "FILE.toml"
        )
    return tuple(controls)


def _role(common: str) -> Role | None:
    found = role_by_name(common)
    return found[0] if found is not None else None


def _decided(name: str, inputs: Inputs) -> Control | None:
    """The control that an input is; the ops that read it decide before its name."""
    by_name, used = role_by_name(inputs.common.get(name, name)), inputs.uses.get(name, set())
    if by_name is not None and by_name[0] == "fixed":
        return Control(input=name, role="fixed", value=by_name[1])
    if len(used) > 1:
        raise NotClaimed(f"ops read {name!r} as {' and as '.join(sorted(used))}; {DECIDE}")
    role = next(iter(used), by_name[0] if by_name is not None else None)
    if role is None or role == "tokens":  # there is another input with the tokens
        return None
    spec = inputs.specs.get(name)
    return Control(input=name, role=_played(name, role, spec.shape if spec is not None else None))


def _played(name: str, role: Role, shape: Shape | None) -> Role:
    """The role that an input of this shape can play."""
    if shape is None:
        return role
    text = _text(shape)
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


def _text(shape: Shape) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"
