"""Requests of sequences on their way through the gateway: they wait for their turns, and run with their states.

    join -> run: wait for the turn, add the states to the inputs, run -> keep -> leave
                                                                  '- failed -> leave

The gateway holds the states, so a request finds them wherever it is executed, and however often it is tried.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnxsplit.errors import InputError, shown
from onnxsplit.plan import Plan
from onnxsplit.tensors import Array, content_bytes
from runtime.errors import DeadlineExceeded
from runtime.gateway.batcher import Batcher, Inference
from runtime.gateway.models.states import ModelStates, candidates, states_of
from runtime.gateway.protocol.inference import InferRequest, RequestedOutput, SequencePlace
from runtime.gateway.sequence_states import Room, SequenceStates, SequenceTurn, States
from runtime.gateway.threads import takes_long


@dataclass(frozen=True)
class SequenceOptions:
    """How a server keeps the states of sequences.

    Attributes:
        declared: The states that the user has named, as ``INPUT=OUTPUT`` by model.
        room: The room for the sequences of all models.
        idle_ns: Time after which a sequence without requests is dropped.
        most_waiting: Most requests of a model that wait for those before them in their sequences.
    """

    declared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    room: Room = field(default_factory=Room)
    idle_ns: int = 60 * 10**9
    most_waiting: int = 256

    def states(self, model: str, plan: Plan) -> ModelStates:
        """The states of a model.

        Raises:
            InputError: Those that the user has named do not fit the plan.
        """
        return states_of(model, plan, self.declared.get(model, ()))


class Sequences:
    """The sequences of one loaded version of a model. Every method is called in the event loop's thread.

    Args:
        model: Name of the model.
        plan: Its plan.
        states: Its states.
        options: How they are kept.
    """

    def __init__(self, model: str, plan: Plan, states: ModelStates, options: SequenceOptions) -> None:
        self.plan = plan
        self.states = states
        self.options = options
        self._model = model
        self._lines = SequenceStates(options.room, idle_ns=options.idle_ns, most_waiting=options.most_waiting)
        self._expiry: asyncio.TimerHandle | None = None

    @property
    def running(self) -> int:
        """Number of running sequences."""
        return self._lines.running

    @property
    def size_bytes(self) -> int:
        """Bytes of their states."""
        return self._lines.size_bytes

    @property
    def pending(self) -> int:
        """Number of requests that were accepted and are not answered."""
        return self._lines.turns

    def join(self, place: SequencePlace) -> SequenceStep:
        """Take the last turn in the line of a sequence. The step has to leave, whatever happens.

        Raises:
            InputError: The model has no states that are known.
            Busy: Too many requests wait for those before them.
        """
        if not self.states.pairs:
            found = candidates(self.plan)
            maybe = f"; by their types and shapes, these may be states: {', '.join(found)}" if found else ""
            raise InputError(
                f"sequence_id is {shown(place.id)}, but the server does not know which tensors of model "
                f"{self._model!r} are states: start it with --state INPUT=OUTPUT, or leave sequence_id out{maybe}"
            )
        return SequenceStep(self, self._lines, self._lines.join(place, time.monotonic_ns()))

    def close(self) -> None:
        """End all sequences."""
        self._lines.close()
        if self._expiry is not None:
            self._expiry.cancel()

    def watch_idle(self) -> None:
        """See to it that idle sequences are dropped, also if no request comes."""
        if self._expiry is None and (due_ns := self._lines.due_ns()) is not None:
            wait_s = max(0, due_ns - time.monotonic_ns()) / 1e9
            self._expiry = asyncio.get_running_loop().call_later(wait_s, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        self._lines.expire(time.monotonic_ns())
        self.watch_idle()


class SequenceStep:
    """One request of a sequence.

    Args:
        sequences: The sequences of its model.
        lines: The same, as the pure core has them.
        turn: Its turn.
    """

    def __init__(self, sequences: Sequences, lines: SequenceStates, turn: SequenceTurn) -> None:
        self._sequences = sequences
        self._lines = lines
        self._turn = turn
        self._after: States | None = None

    async def run(
        self,
        batcher: Batcher,
        request: InferRequest,
        requested: Sequence[RequestedOutput],
        arrived_ns: int,
        deadline_ns: int | None,
    ) -> tuple[dict[str, Array], Inference]:
        """Wait for the turn, run the request with the states of its sequence, and return the outputs.

        Args:
            batcher: Executes it.
            request: The request.
            requested: The outputs that the response holds.
            arrived_ns: Time at which it arrived.
            deadline_ns: Time after which its answer is useless; None for no limit.

        Raises:
            InputError: The sequence does not run, or the request does not fit the model.
            Busy: There is no room for the sequence.
            DeadlineExceeded: The time ran out while it waited.
            PipelineError: As for :meth:`.Batcher.run`.
        """
        await self._wait(deadline_ns)
        inputs = self._inputs(request.inputs)
        names = self._sequences.states.outputs | {output.name for output in requested}
        checked = batcher.check(inputs, tuple(name for name in self._sequences.plan.outputs if name in names))
        outputs, inference = await batcher.run(inputs, checked, arrived_ns, deadline_ns, request.priority)
        self._after = await self._states_after(outputs)
        return outputs, inference

    def keep(self) -> None:
        """Keep the states after the request, which was answered.

        Raises:
            Busy: There is no room for them. The states before stay.
        """
        assert self._after is not None
        self._lines.keep(self._turn, self._after, sum(map(content_bytes, self._after.values())))

    def leave(self) -> None:
        """Let the next request of the sequence run."""
        following = self._lines.leave(self._turn, time.monotonic_ns())
        if following is not None and following.item is not None and not following.item.done():
            following.item.set_result(None)
        self._sequences.watch_idle()

    async def _wait(self, deadline_ns: int | None) -> None:
        """Wait until the requests before this one have left."""
        if self._lines.is_first(self._turn):
            return
        self._turn.item = asyncio.get_running_loop().create_future()
        left_s = None if deadline_ns is None else max(0, deadline_ns - time.monotonic_ns()) / 1e9
        try:
            async with asyncio.timeout(left_s):
                await self._turn.item
        except TimeoutError:
            raise DeadlineExceeded(
                "the request's time ran out while it waited for the one before it in its sequence"
            ) from None

    def _inputs(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs of the request with the states of its sequence, or with initial ones."""
        states, turn = self._sequences.states, self._turn
        before = self._lines.begin(turn)
        if before is not None:
            return states.continued(before, given)
        shapes = states.initial_shapes(given)
        own_bytes = sum(content_bytes(array) for name, array in given.items() if name in states.inputs)
        self._lines.reserve(turn, states.shapes_bytes(shapes) + own_bytes)
        return {**states.zeros(shapes), **given}

    async def _states_after(self, outputs: Mapping[str, Array]) -> States:
        states = self._sequences.states
        copied = sum(outputs[name].nbytes for name in states.outputs if outputs[name].base is not None)
        if not takes_long(copied_bytes=copied):
            return states.after(outputs)
        return await asyncio.get_running_loop().run_in_executor(None, states.after, outputs)
