"""The load that a node publishes, and the steps that it executes."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from onnxsplit.errors import ModelError
from onnxsplit.plan import CALLER
from onnxsplit.session import open_session
from runtime.node.events import Assigned, AttemptCancelled, LoadFailed, Turn, Wired
from runtime.node.state import NodeState
from runtime.node.worker import Worker
from runtime.wire import codec
from runtime.wire.messages.control import Assign
from runtime.wire.messages.control import Wire as WireMessage
from runtime.wire.messages.data import Fragment, TensorHead
from runtime.wire.messages.sequences import Opening, Sampling, StepRow


@pytest.mark.parametrize(
    "head",
    [
        TensorHead("s", "string", (1,), b"\x01\0\0\0\xff"),
        TensorHead("x", "float32", (2,), b"four"),
        TensorHead("x", "float32", (0, 1 << 62), b""),
        TensorHead("x", "complex64", (1,), b"eight bs"),
    ],
)
def test_an_unreadable_fragment_counts_as_done_and_affects_no_other_request(head):
    worker = Worker(0)
    fragment = Fragment(1, 1, 1, 700, 0, 3, CALLER, (0,), ("y",), (head,), ())
    for _ in range(2):
        assert worker.arrival(codec.encode(fragment), []) is None
    assert worker.payloads.board.done(3) == 1400
    worker.close()


@pytest.mark.parametrize("changed", [{"request": 2**63 - 1}, {"sender": 256}, {"cost": 0}, {"route": (2**40,)}])
def test_a_fragment_with_a_number_out_of_bounds_is_refused(changed):
    worker = Worker(0)
    fields = {"request": 1, "sender": 3, "cost": 700, "route": (0,)} | changed
    fragment = Fragment(attempt=1, view=1, budget_ns=0, source=CALLER, wanted=(), tensors=(), history=(), **fields)
    assert worker.arrival(codec.encode(fragment), []) is None
    worker.close()


class Wire:
    """A link that keeps what is sent."""

    def __init__(self) -> None:
        self.headers: list[bytes] = []
        self.connected = True

    def send(self, header, frames=(), *, track=False):
        assert not frames
        self.headers.append(header)
        return []


class Files:
    """Where a worker finds its plan."""

    custom_ops = ()

    def __init__(self, plan, folder) -> None:
        self.found = plan, folder

    def find(self, assign):
        return self.found

    def discard(self, folder):
        return False


@pytest.fixture
def decoder(tmp_path):
    from decoder_plans import cut, describe
    from decoder_runs import FAMILIES

    model = FAMILIES["gqa"].make(seed=3)
    folder = tmp_path / "plan"
    plan = cut(model, describe("gqa", model, kind="in-place", rows="right", chunk="one-row"), folder, stages=1)
    return Files(plan, folder)


@pytest.mark.parametrize("name", ["input_ids", "past_key_values.0.key", "present.1.value", "logits"])
def test_a_plan_with_another_type_than_the_stage_is_refused(decoder, tmp_path, name):
    plan, folder = decoder.found
    wrong = msgspec.structs.replace(plan.tensors[name], dtype="float16")
    changed = Files(msgspec.structs.replace(plan, tensors={**plan.tensors, name: wrong}), folder)
    loaded = Worker(0).load(changed, assigned(slots=4, length=32), home=tmp_path, threads=1)
    assert isinstance(loaded, LoadFailed)
    assert f"{name!r} of the type {plan.tensors[name].dtype}, and plan.json says float16" in loaded.reason


def test_a_worker_executes_steps_and_sends_the_chosen_tokens(decoder, tmp_path):
    worker = Worker(0)
    worker.payloads.meet(1, {})
    worker._links[0] = link = Wire()
    loaded = worker.load(decoder, assigned(slots=4, length=32), home=tmp_path, threads=1)
    node = NodeState()
    node.handle(Assigned(assigned(slots=4, length=32)))
    node.handle(loaded)
    node.handle(Wired(WireMessage(1, 1, ())))
    for number, (start, tokens) in enumerate([(0, (1, 2, 3)), (3, (9,))], 1):
        opening = Opening(3, Sampling(logprobs=1)) if start == 0 else None
        rows = (StepRow(7, 1, 2, start, tokens, True, opening),)
        fragment = Fragment(number, 1, 1, 1000, 0, 0, CALLER, (1,), ("logits",), (), (), rows)
        arrived = worker.arrival(codec.encode(fragment), [])
        assert node.handle(arrived) == []
        (run,) = node.handle(Turn(0))
        executed = worker.run(run)
        forward, back = node.handle(executed)
        worker.forward(forward)
        worker.give_back(back.fragments[0])
        answer = codec.decode_data(link.headers[-1])
        (token,) = answer.drawn
        scores = worker.payloads.receive(answer, [])["logits"].reshape(-1)
        assert (token.sequence, token.position, token.token) == (7, start + len(tokens), scores.argmax())
        assert token.top[0] == (token.token, token.logprob)
        assert [visit.stage for visit in answer.history] == [0]
    assert (node.sequences, node.state_bytes) == (1, 4 * decoder.found[0].decoder.token_bytes(0))
    (cleared,) = node.handle(AttemptCancelled(7, 1))
    worker.clear(cleared.slots)
    assert (node.sequences, node.state_bytes) == (0, 0)
    worker.close()


def test_a_step_with_other_tensors_than_the_plan_says_is_dropped(decoder, tmp_path):
    worker = Worker(0)
    worker.load(decoder, assigned(slots=4, length=32), home=tmp_path, threads=1)
    head = TensorHead("attention_mask", "int64", (1, 1), b"\0" * 8)
    rows = (StepRow(7, 1, 0, 0, (1,), True, Opening(1, Sampling())),)
    fragment = Fragment(1, 1, 1, 1000, 0, 0, CALLER, (1,), (), (head,), (), rows)
    assert worker.arrival(codec.encode(fragment), []) is None
    worker.close()


def test_states_that_do_not_fit_into_memory_say_what_to_do(decoder, tmp_path):
    plan, folder = decoder.found
    huge = msgspec.structs.replace(plan, decoder=msgspec.structs.replace(plan.decoder, max_length=2**31 - 1))
    worker = Worker(0)
    failed = worker.load(Files(huge, folder), assigned(slots=1 << 15, length=2**31 - 1), home=tmp_path, threads=1)
    assert isinstance(failed, LoadFailed)
    assert "--max-rows, --max-length" in failed.reason
    worker.close()


@pytest.mark.parametrize("shape", [(1, 1, 9), (0, 1, 9), (2, 0, 9), (2, 5, 9), (9,), (2, 1, 1, 9), (2, 8), (2, 1, 8)])
def test_scores_of_another_shape_fail_their_step_alone(shape):
    from runtime.node.sequence_runner import _last_position

    with pytest.raises(ModelError, match="at least 9 for each row"):
        _last_position(np.zeros(shape, np.float32), 2, 3, 9)
    for good in ((2, 9), (2, 1, 9), (2, 3, 10)):
        assert _last_position(np.zeros(good, np.float32), 2, 3, 9).size in (18, 20)


def test_steps_on_a_device_are_refused_with_what_to_do(decoder):
    from runtime.node.executor import _why_no_steps

    plan, folder = decoder.found
    session = open_session(folder / "stage-0.onnx", threads=1)
    assert _why_no_steps(plan, assigned(slots=4), session) == ""
    assert "--provider cpu" in _why_no_steps(plan, assigned(slots=4, provider="cuda:0"), session)
    assert "no slots" in _why_no_steps(plan, assigned(slots=0), session)


def assigned(*, slots: int, length: int = 0, provider: str = "cpu") -> Assign:
    return Assign("", "", "", 0, 0, provider, 0, False, False, 1, 1, "completion", slots, length)
