"""The states of a model: which pairs are accepted, and what a sequence starts with."""

from __future__ import annotations

import numpy as np
import pytest

from onnxsplit.errors import InputError
from onnxsplit.plan import TensorSpec
from onnxsplit.plan_decoder import State
from runtime.errors import PipelineError
from runtime.gateway.models.states import ModelStates, bind_to_models, candidates, states_of
from runtime.gateway.protocol.inference import SequencePlace
from runtime.gateway.sequences import SequenceOptions, Sequences

F32 = "float32"
LSTM = {
    "inputs": {"x": (F32, ("time", "batch", 4)), "h0": (F32, (1, "batch", 8)), "c0": (F32, (1, "batch", 8))},
    "outputs": {"y": (F32, (1, "batch", 3)), "hn": (F32, (1, "batch", 8)), "cn": (F32, (1, "batch", 8))},
}


class Described:
    """A plan, as far as states ask it: tensors as type, shape and, if any, batch axis."""

    def __init__(self, inputs, outputs, *, defaults=(), states=(), constants=()):
        named = {**inputs, **outputs}
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.tensors = {
            name: TensorSpec(dtype=one[0], shape=one[1], batch_axis=one[2] if len(one) > 2 else None)
            for name, one in named.items()
        }
        self.defaults = dict.fromkeys(defaults)
        self.decoder = type("Decoder", (), {"states": tuple(states)})() if states else None
        self.dropped_outputs = ("gone",)
        self._constants = constants

    def refused_inputs(self):
        return {name: f"input {name!r} became a constant" for name in self._constants}


def initial(plan, *declared, **inputs) -> dict[str, np.ndarray]:
    """The initial states for inputs, given by their shapes."""
    states = states_of("m", plan, declared)
    return states.zeros(states.initial_shapes({name: np.zeros(shape, np.float32) for name, shape in inputs.items()}))


def shapes(plan, *declared, **inputs) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in initial(plan, *declared, **inputs).items()}


def test_sizes_that_share_a_name_with_another_input_follow_it():
    assert shapes(Described(**LSTM), "h0=hn", "c0=cn", x=(5, 3, 4)) == {"h0": (1, 3, 8), "c0": (1, 3, 8)}


def test_a_proven_batch_axis_gives_the_rows_without_a_name():
    plan = Described({"x": (F32, ("?", "?"), 0), "s": (F32, (2, "?", 16), 1)}, {"t": (F32, ("?", "?", "?"), 1)})
    assert shapes(plan, "s=t", x=(3, 512)) == {"s": (2, 3, 16)}


def test_a_free_first_axis_is_the_batch():
    plan = Described({"x": (F32, ("n", 4)), "s": (F32, ("?", 8))}, {"t": (F32, ("?", 8))})
    assert shapes(plan, "s=t", x=(6, 4)) == {"s": (6, 8)}


@pytest.mark.parametrize("after", ["all", "?"])
def test_a_cache_that_grows_starts_empty(after):
    plan = Described(
        {"x": (F32, ("batch", "new", 4)), "past": (F32, ("batch", "past", 4))}, {"present": (F32, ("batch", after, 4))}
    )
    assert shapes(plan, "past=present", x=(2, 1, 4)) == {"past": (2, 0, 4)}


def test_a_size_that_the_output_fixes_is_taken_from_it():
    plan = Described({"x": (F32, (1,)), "s": (F32, (1, "width"))}, {"t": (F32, (1, 12))})
    assert shapes(plan, "s=t", x=(1,)) == {"s": (1, 12)}


def test_a_size_that_nobody_knows_is_said():
    plan = Described({"x": (F32, (1,)), "s": (F32, (1, "width"))}, {"t": (F32, (1, "width"))})
    with pytest.raises(
        InputError, match=r"'s' cannot be made: the size of dimension 1 \(width\) is not known. Send 's'"
    ):
        shapes(plan, "s=t", x=(1,))
    assert shapes(plan, "s=t", x=(1,), s=(1, 5)) == {}  # the client gives it
    unnamed = Described({"x": (F32, (1,)), "s": (F32, (1, "?"))}, {"t": (F32, (1, "?"))})
    with pytest.raises(InputError, match="the size of dimension 1 is not known"):
        shapes(unnamed, "s=t", x=(1,))


def test_an_input_that_is_missing_is_said():
    with pytest.raises(InputError, match=r"dimension 1 \(batch\) is that of input 'x', which is missing"):
        shapes(Described(**LSTM), "h0=hn", "c0=cn")


def test_the_caches_of_a_decoder_are_its_states_and_are_not_hidden():
    cache = State(
        past="past", present="present", kind="append", batch_axis=0, axis=2, shape=(1, 2, 0, 4), stage=0,
        token_bytes=32, fixed_bytes=0,
    )  # fmt: skip
    plan = Described(
        {"ids": ("int64", ("batch", "seq")), "mask": ("int64", ("batch", "past")),
         "past": (F32, ("batch", 2, "past", 4))},
        {"present": (F32, ("batch", 2, "past", 4))},
        states=[cache],
    )  # fmt: skip
    states = states_of("m", plan)
    found = states.initial_shapes({"ids": np.zeros((3, 7)), "mask": np.zeros((3, 7))})
    assert found == {"past": (3, 2, 0, 4)}
    assert states.hidden == frozenset()
    assert states_of("m", plan, ["past=present"]).hidden == {"past", "present"}


def test_an_input_with_a_default_starts_with_it():
    plan = Described({"x": (F32, (1,)), "s": (F32, (3,))}, {"t": (F32, (3,))}, defaults=["s"])
    assert shapes(plan, "s=t", x=(1,)) == {}


def test_texts_and_other_types_start_empty_or_at_zero():
    plan = Described(
        {"x": (F32, (1,)), "s": ("string", (2,)), "b": ("bool", ())}, {"t": ("string", (2,)), "c": ("bool", ())}
    )
    made = initial(plan, "s=t", "b=c", x=(1,))
    assert made["s"].tolist() == ["", ""]
    assert made["b"].dtype == bool
    assert made["b"].shape == ()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("z=hn", "no input 'z'"),
        ("fixed=hn", "input 'fixed' became a constant"),
        ("h0=z", "no output 'z'"),
        ("h0=gone", "output 'gone' was left out of the plan"),
        ("x=hn", r"'x' and output 'hn' do not fit each other: float32\[time, batch, 4\] and float32\[1, batch, 8\]"),
        ("n=hn", r"int64\[1\] and float32\[1, batch, 8\]"),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_said(word, message):
    plan = Described({**LSTM["inputs"], "n": ("int64", (1,))}, LSTM["outputs"], constants=["fixed"])
    with pytest.raises(
        InputError,
        match=f"does not fit model 'm': .*{message}.* It has the inputs x, h0, c0, n and the outputs y, hn, cn",
    ):
        states_of("m", plan, [word])


def test_all_problems_are_said_at_once():
    with pytest.raises(InputError, match=r"no output 'q'.*input 'h0' is in two states"):
        states_of("m", Described(**LSTM), ["h0=hn", "h0=q"])


def test_a_fixed_size_of_the_output_may_fill_a_free_one_but_not_the_other_way_at_run_time():
    plan = Described({"x": (F32, (1,)), "s": (F32, (1, 4))}, {"t": (F32, ("?", "?"))})
    states = states_of("m", plan, ["s=t"])
    assert states.after({"t": np.ones((1, 4), np.float32)})["s"].sum() == 4
    with pytest.raises(
        PipelineError, match=r"output 't' is float32 of shape \[1, 5\], which does not fit the state 's'"
    ):
        states.after({"t": np.ones((1, 5), np.float32)})


def test_a_request_with_other_rows_than_its_sequence_is_refused():
    states = states_of("m", Described(**LSTM), ["h0=hn", "c0=cn"])
    before = {name: np.zeros((1, 2, 8), np.float32) for name in ("h0", "c0")}
    x = np.zeros((5, 2, 4), np.float32)
    assert states.continued(before, {"x": x}) == {**before, "x": x}
    with pytest.raises(InputError, match=r"axis 1 of input 'x' has size 3, and the sequence has its state 'h0' with"):
        states.continued(before, {"x": np.zeros((5, 3, 4), np.float32)})


def test_kept_states_share_no_memory_with_a_joined_batch():
    batch = np.ones((4, 8), np.float32)
    plan = Described({"s": (F32, ("?", 8))}, {"t": (F32, ("?", 8))})
    assert states_of("m", plan, ["s=t"]).after({"t": batch[1:2]})["s"].base is None


def test_candidates_are_only_pairs_without_a_doubt():
    plan = Described(
        {"x": (F32, ("?", "?")), "s": (F32, (2, "?", 4))}, {"y": (F32, ("?", 1)), "t": (F32, ("?", "?", "?"))}
    )
    assert candidates(plan) == ["s=t"]
    assert candidates(Described(**LSTM)) == []


def test_a_sequence_of_a_model_without_states_is_refused_with_what_may_be_one():
    plan = Described({"x": (F32, ("?", "?")), "s": (F32, (2, "?", 4))}, {"t": (F32, ("?", "?", "?"))})
    sequences = Sequences("m", plan, ModelStates(), SequenceOptions())
    with pytest.raises(InputError, match=r"of model 'm' are states: start it with --state .* these may be states: s=t"):
        sequences.join(SequencePlace(1, start=True))


def test_words_name_their_models_or_the_only_one():
    assert bind_to_models(["a=b", "c=d"], ["m"]) == {"m": ("a=b", "c=d")}
    assert bind_to_models(["m:a=b", "n:a:0=b:0"], ["m", "n"]) == {"m": ("a=b",), "n": ("a:0=b:0",)}
    assert bind_to_models(["a:0=b:0"], ["m"]) == {"m": ("a:0=b:0",)}
    assert bind_to_models(["later:a=b"], []) == {"later": ("a=b",)}


@pytest.mark.parametrize(
    ("word", "models", "message"),
    [
        ("a=b", ["m", "n"], "with MODEL one of m, n"),
        ("a=b", [], "one of those that will be served"),
        ("m:ab", ["m"], "is not INPUT=OUTPUT"),
        ("=b", ["m"], "is not INPUT=OUTPUT"),
    ],
)
def test_a_word_that_cannot_be_bound_is_said(word, models, message):
    with pytest.raises(InputError, match=f"--state {word} .*{message}"):
        bind_to_models([word], models)


def test_names_may_hold_an_equals_sign():
    plan = Described({"a=1": (F32, (1,))}, {"b=2": (F32, (1,))})
    assert states_of("m", plan, ["a=1=b=2"]).inputs == {"a=1"}
