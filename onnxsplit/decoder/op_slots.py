"""The ops that update states, and the inputs of ops that have a role: by the schemas of ONNX and ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, replace

from onnxsplit.model.graph import Op
from onnxsplit.plan_decoder import Role, StateKind

_MS = "com.microsoft"


@dataclass(frozen=True)
class StateSlot:
    """An input of an op that is a state, and the output that continues it.

    Attributes:
        past: the position of the input among the op's inputs.
        present: the position of the output.
        kind: how the op changes the state.
        batch_axis: the axis of the rows in the op's input; None where the op does not say it.
        axis: the axis of the positions in the op's input; None for recurrent states.
        least: the smallest size of that axis; with fewer positions than this axis has, nothing is ever cut away.
    """

    past: int
    present: int
    kind: StateKind
    batch_axis: int | None
    axis: int | None = None
    least: int | None = None


def _caches(key: int, kind: StateKind) -> tuple[StateSlot, ...]:
    """Keys and values, [rows, heads, positions, width], whose continuations are the outputs 1 and 2."""
    return StateSlot(key, 1, kind, 0, 2), StateSlot(key + 1, 2, kind, 0, 2)


_SLOTS: dict[tuple[str, str], tuple[StateSlot, ...]] = {
    (_MS, "GroupQueryAttention"): _caches(3, "in-place"),
    (_MS, "SparseAttention"): _caches(3, "in-place"),
    (_MS, "MultiHeadAttention"): _caches(6, "append"),
    (_MS, "DecoderMaskedMultiHeadAttention"): _caches(5, "append"),
    # Keys and values in one tensor, [2, rows, heads, positions, width].
    (_MS, "Attention"): (StateSlot(4, 1, "append", 1, 3),),
    (_MS, "QAttention"): (StateSlot(8, 1, "append", 1, 3),),
    (_MS, "DecoderMaskedSelfAttention"): (StateSlot(4, 1, "append", 1, 3),),
    (_MS, "CausalConvWithState"): (StateSlot(3, 1, "recurrent", 0),),
    (_MS, "LinearAttention"): (StateSlot(3, 1, "recurrent", 0),),
    ("", "Attention"): _caches(4, "append"),
    ("", "CausalConvWithState"): (StateSlot(3, 1, "recurrent", 0),),
    ("", "LinearAttention"): (StateSlot(3, 1, "recurrent", 0),),
}
_RECURRENT = {"LSTM": ((5, 1), (6, 2)), "GRU": ((5, 1),), "RNN": ((5, 1),)}

_ROLES: dict[tuple[str, str, int], Role] = {
    (_MS, "GroupQueryAttention", 5): "last-index",
    (_MS, "GroupQueryAttention", 6): "total-length",
    (_MS, "GroupQueryAttention", 9): "positions",
    (_MS, "SparseAttention", 7): "total-length",
    (_MS, "SparseAttention", 8): "total-length",
    (_MS, "MultiHeadAttention", 4): "mask",
    (_MS, "MultiHeadAttention", 8): "past-length",
    (_MS, "DecoderMaskedMultiHeadAttention", 3): "mask",
    (_MS, "DecoderMaskedMultiHeadAttention", 7): "past-length",
    (_MS, "Attention", 3): "mask",
    (_MS, "Attention", 6): "past-length",
    (_MS, "DecoderMaskedSelfAttention", 3): "mask",
    (_MS, "DecoderMaskedSelfAttention", 6): "past-length",
    (_MS, "RotaryEmbedding", 1): "positions",
    (_MS, "EmbedLayerNormalization", 0): "tokens",
    (_MS, "EmbedLayerNormalization", 8): "positions",
    ("", "RotaryEmbedding", 3): "positions",
    ("", "TensorScatter", 2): "past-length",
    ("", "Attention", 6): "total-length",
}
_TABLES = {  # position of the tables of rotations among the inputs; they have a row for each position
    (_MS, "GroupQueryAttention"): 7,
    (_MS, "SparseAttention"): 9,
    (_MS, "RotaryEmbedding"): 2,
    ("", "RotaryEmbedding"): 1,
}


def domain_of(op: Op) -> str:
    """The domain of an op; '' for ONNX's own under either of its names."""
    return "" if op.domain == "ai.onnx" else op.domain


def attribute(op: Op, name: str, default: int) -> int:
    """An integer attribute of an op."""
    return next((a.i for a in op.node.attribute if a.name == name), default)


def state_slots(op: Op) -> tuple[StateSlot, ...]:
    """The states of an op by its type; empty for most ops."""
    kind = (domain_of(op), op.op_type)
    if kind == ("", "TensorScatter"):
        return (StateSlot(0, 0, "in-place", 0, attribute(op, "axis", -2)),)
    if kind[0] == "" and op.op_type in _RECURRENT:
        rows = 0 if attribute(op, "layout", 0) else 1
        return tuple(StateSlot(past, present, "recurrent", rows) for past, present in _RECURRENT[op.op_type])
    if kind == ("", "Scan"):
        scanned = max(attribute(op, "num_scan_inputs", 0), 0)
        return tuple(StateSlot(i, i, "recurrent", None) for i in range(len(op.node.input) - scanned))
    if kind == ("", "Loop"):
        return tuple(StateSlot(i, i - 2, "recurrent", None) for i in range(2, len(op.node.input)))
    slots = _SLOTS.get(kind, ())
    if attribute(op, "sliding_window_cache", 0):
        least = max(attribute(op, "local_window_size", 0), 1)
        return tuple(replace(slot, least=least) for slot in slots)
    if attribute(op, "past_present_share_buffer", 0):
        return tuple(replace(slot, kind="in-place") for slot in slots)
    return slots


def role_of_slot(op: Op, position: int) -> Role | None:
    """The role of one of an op's inputs; None for most."""
    return _ROLES.get((domain_of(op), op.op_type, position))


def table_slot(op: Op) -> int | None:
    """The position of the input with a table that has a row for each position of a sequence; None for most ops."""
    return _TABLES.get((domain_of(op), op.op_type))
