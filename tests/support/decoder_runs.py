"""Runs of the small decoders in plain ONNX Runtime: the reference that everything else is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import decoder_traps as traps
import decoders
import numpy as np
import onnx
import onnxruntime
from decoder_parts import Size

ROOM = 64
"""Size of the buffers that a decoder with in-place states gets, where it leaves that free."""


@dataclass(frozen=True)
class Family:
    """A way of writing decoders.

    Attributes:
        make: makes the model; takes ``seed``.
        states: name of the output for each input that is a state, where the names do not say it.
        fixed: values of inputs that do not change.
        in_place: states keep their size, and a step writes its positions into them.
        is_decoder: whether it is one that can be used step by step; otherwise the model must be refused.
        head: width of a head.
    """

    make: Callable[..., onnx.ModelProto]
    states: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, np.ndarray] = field(default_factory=dict)
    in_place: bool = False
    is_decoder: bool = True
    head: int = Size.head


def _with(make: Callable[..., onnx.ModelProto], **options) -> Callable[..., onnx.ModelProto]:
    return lambda **more: make(**options, **more)


_CROSSED = {
    f"past_key_values.{layer}.{part}": f"present.{(1, 0, 2)[layer]}.{part}"
    for layer in range(Size.layers)
    for part in ("key", "value")
}

FAMILIES: Mapping[str, Family] = {
    "gqa": Family(decoders.gqa),
    "gqa, unread positions": Family(_with(decoders.gqa, positions=True)),
    "gqa, rotary outside": Family(_with(decoders.gqa, rotary="outside")),
    "gqa, not packed": Family(_with(decoders.gqa, packed=False)),
    "gqa, 4 bits": Family(_with(decoders.gqa, int4=True)),
    "gqa, free width": Family(_with(decoders.gqa, free_width=True)),
    "gqa, local window": Family(_with(decoders.gqa, window=8)),
    "plain": Family(decoders.plain),
    "plain, gathered tables": Family(_with(decoders.plain, gathered=True)),
    "plain, no positions": Family(_with(decoders.plain, positions=False)),
    "plain, causal by position": Family(_with(decoders.plain, by_position=True)),
    "merged": Family(decoders.merged),
    "gpt2": Family(decoders.gpt2, head=8),
    "torch export": Family(decoders.torch_export),
    "attention 23": Family(decoders.attention23),
    "attention 23, causal": Family(_with(decoders.attention23, mask=False)),
    "attention 23, cache outside": Family(_with(decoders.attention23, cache="outside")),
    "tensor scatter": Family(decoders.tensor_scatter, in_place=True),
    "tensor scatter, free": Family(_with(decoders.tensor_scatter, capacity=None), in_place=True),
    "tensor scatter, one control": Family(_with(decoders.tensor_scatter, capacity=None, lengths=False), in_place=True),
    "lstm": Family(decoders.lstm, states={"h0": "hn", "c0": "cn"}),
    "lstm by layer": Family(
        _with(decoders.lstm, stacked=False), states={f"{s}0.{n}": f"{s}n.{n}" for s in "hc" for n in range(2)}
    ),
    "gru": Family(decoders.gru, states={"h0": "hn"}),
    "window": Family(decoders.window),
    "mixed": Family(decoders.mixed),
    "relative bias": Family(traps.relative_bias),
    "alibi": Family(traps.alibi),
    "crossed": Family(traps.crossed, states=_CROSSED, is_decoder=False),
    "stacked": Family(traps.stacked, states={"past": "present"}, is_decoder=False),
    "puzzling": Family(traps.puzzling, fixed={"style": np.full((1, Size.width), 0.5, np.float32)}, is_decoder=False),
}


class Reference:
    """A decoder in plain ONNX Runtime on one thread, whose rows all have the same length."""

    def __init__(self, family: Family, model: onnx.ModelProto | None = None, *, rows: int = 1, seed: int = 0) -> None:
        model = model or family.make(seed=seed)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.family, self.rows, self.length = family, rows, 0
        names = {one.name for one in self.session.get_inputs()}
        outputs = [one.name for one in self.session.get_outputs()]
        self.outputs = outputs
        self.pairs = {name: family.states.get(name) or _present(name) for name in names if name not in _CONTROLS}
        self.pairs = {past: present for past, present in self.pairs.items() if present in outputs}
        self.states = {past: self._first(past) for past in self.pairs}

    def _first(self, past: str) -> np.ndarray:
        (declared,) = (one for one in self.session.get_inputs() if one.name == past)
        sizes = {"batch_size": self.rows, "past_sequence_length": 0, "kv_cache_dim": self.family.head, "capacity": ROOM}
        return np.zeros([size if isinstance(size, int) else sizes[size] for size in declared.shape], np.float32)

    def step(self, tokens) -> np.ndarray:
        """Scores [rows, new, vocabulary] of new tokens [rows, new]; the states go on."""
        tokens = np.asarray(tokens, np.int64).reshape(self.rows, -1)
        new = tokens.shape[1]
        place = self.length + np.arange(new)
        lengths = np.full(self.rows, self.length)
        given = {
            "input_ids": tokens,
            "attention_mask": np.ones((self.rows, self._before() + new), np.int64),
            "position_ids": np.tile(place, (self.rows, 1)),
            "write_indices": lengths,
            "valid_lengths": lengths + new,
            "use_cache_branch": np.array([self.length > 0]),
            **self.family.fixed,
            **self.states,
        }
        feeds = {one.name: given[one.name] for one in self.session.get_inputs()}
        found = dict(zip(self.outputs, self.session.run(None, feeds), strict=True))
        self.states = {past: found[present] for past, present in self.pairs.items()}
        self.length += new
        return found["logits"]

    def _before(self) -> int:
        """Positions that the buffers hold."""
        for past, tensor in self.states.items():
            if past.startswith("past_key_values"):
                return tensor.shape[2]
        return self.states["past"].shape[4] if "past" in self.states else self.length

    def greedy(self, prompt, count: int) -> list[int]:
        """The tokens that follow a prompt, always the one of the highest score; for one row."""
        scores, text = self.step([prompt]), []
        for _ in range(count):
            text.append(int(scores[0, -1].argmax()))
            scores = self.step([[text[-1]]])
        return text


_CONTROLS = {"input_ids", "attention_mask", "position_ids", "write_indices", "valid_lengths", "use_cache_branch"}


def _present(past: str) -> str:
    """The output of a state whose input is ``past...``."""
    return past.replace("past_key_values", "present").replace("past_", "present_")
