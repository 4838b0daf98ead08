"""Compares the answers of two plans of one model, on requests that came lately, before the newer one takes any."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from onnxsplit.distance import distance, tolerance
from onnxsplit.npz import load_npz
from onnxsplit.plan import Plan
from onnxsplit.plan_files import example_file
from onnxsplit.tensors import Array
from runtime.errors import PipelineError, StageFailed
from runtime.recut.running_plan import RunningPlan

_MOST_SAMPLES = 8
_MOST_BYTES = 64 << 20
_WAIT_S = 60.0  # the most time of one request
_TEXT_WAIT_S = 600.0  # the same of a text, which may wait for a place
_LOOK_S = 0.1
_MOST_REPEATS = 10
_PROMPT = 8  # tokens
_SLACK, _MOST_ALLOWED = 2.0, 0.5  # as for ``onnxsplit verify``


@dataclass(frozen=True)
class Sample:
    """A request that is sent to both plans: its inputs, and the names of its outputs."""

    inputs: Mapping[str, Array]
    outputs: tuple[str, ...]


class RequestSamples:
    """Keeps copies of a few requests of different shapes, among those that enter meanwhile; a context manager.

    Args:
        running: the plan that takes the requests.
    """

    def __init__(self, running: RunningPlan) -> None:
        self._running = running
        self._lock = threading.Lock()
        self._seen: dict[object, Sample] = {}
        self._bytes = 0
        self._outputs = frozenset(running.plan.outputs)

    def __enter__(self) -> RequestSamples:
        self._running.entrance.on_request = self._look
        return self

    def __exit__(self, *_: object) -> None:
        self._running.entrance.on_request = None

    def _look(self, inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> None:
        """Copy a request if none of these shapes was seen."""
        kind = outputs, tuple((name, array.dtype, array.shape) for name, array in inputs.items())
        if kind in self._seen or len(self._seen) >= _MOST_SAMPLES or not self._outputs.issuperset(outputs):
            return  # tensors between the stages of one plan are not there in another one
        size = sum(array.nbytes for array in inputs.values())
        with self._lock:
            if self._bytes + size > _MOST_BYTES:
                return
            self._bytes += size
            self._seen[kind] = Sample({name: np.array(array) for name, array in inputs.items()}, outputs)

    def taken(self) -> list[Sample]:
        """The requests so far; if there are none, that of the plan's example inputs."""
        with self._lock:
            found = list(self._seen.values())
        running = self._running
        if not found and running.plan.example_inputs is not None:
            found = [Sample(load_npz(example_file(running.folder, running.plan)), running.plan.outputs)]
        return [*found, *_resized(found, running)]


def _resized(found: list[Sample], running: RunningPlan) -> Iterator[Sample]:
    """Requests of the shapes that were seen lately, made of the values of those that were found."""
    known = [{name: array.shape for name, array in sample.inputs.items()} for sample in found]
    for outputs, shapes in running.entrance.recent_kinds(_MOST_SAMPLES):
        like = next((sample for sample in found if sample.inputs.keys() == shapes.keys()), None)
        if like is None or shapes in known or not set(running.plan.outputs).issuperset(outputs):
            continue
        known.append(shapes)
        yield Sample({name: np.resize(array, shapes[name]) for name, array in like.inputs.items()}, outputs)


class AnswersDiffer(PipelineError):
    """Raised when two plans answer a request differently."""


def allowed_difference(plan: Plan) -> float:
    """How far the answers of two cuts of a plan's model may differ, relative to the scale of each output.

    It is the tolerance of ``onnxsplit verify``: for the types that cross, for what narrow borders may cost, and twice
    what optimisation moves the answers.
    """
    borders = plan.borders.tolerance if plan.borders is not None else 0.0
    rounding = tolerance(spec.dtype for spec in plan.tensors.values())
    return max(rounding, borders, min(_SLACK * plan.costs.moved, _MOST_ALLOWED))


def compare(old: RunningPlan, new: RunningPlan, samples: list[Sample], stopped: Callable[[], bool]) -> int:
    """Send requests to both plans; returns how many were compared. This also warms the new plan up.

    A request that the old plan refuses too says nothing, and does not count.

    Raises:
        AnswersDiffer: the answers differ by more than rounding explains, or only the new plan refuses one.
        PipelineError: a request was not answered, or the pipeline closes.
    """
    allowed = max(allowed_difference(old.plan), allowed_difference(new.plan))
    compared = 0
    for sample in samples:
        expected, found = _answer(old, sample, stopped), _answer(new, sample, stopped)
        if isinstance(expected, StageFailed):
            continue
        shown = ", ".join(f"{name} {list(array.shape)}" for name, array in sample.inputs.items())
        if isinstance(found, StageFailed):
            raise AnswersDiffer(f"only the present plan executes a request of {shown}; the new one says: {found}")
        apart = {name: distance(found[name], array) for name, array in expected.items()}
        if any(not each <= allowed for each in apart.values()):
            own = _own_differences(old, sample, expected, allowed, stopped)
            _refuse_difference(apart, own, allowed, shown)
        compared += 1
    if old.plan.decoder is not None:
        apart = {"scores": distance(_scores(new, stopped), _scores(old, stopped))}
        _refuse_difference(apart, {}, allowed, "a prompt")
        compared += 1
    return compared


def _own_differences(
    old: RunningPlan, sample: Sample, expected: Mapping[str, Array], allowed: float, stopped: Callable[[], bool]
) -> dict[str, float]:
    """How far the outputs of the present plan are from those of other runs of it: much, where ops are random.

    An output of a few numbers may be the same by chance, so up to ``_MOST_REPEATS`` runs are compared.
    """
    own = dict.fromkeys(expected, 0.0)
    for _ in range(_MOST_REPEATS):
        again = _answer(old, sample, stopped)
        if isinstance(again, StageFailed):
            break
        for name, array in expected.items():
            own[name] = max(own[name], distance(again[name], array))
        if all(far > allowed for far in own.values()):
            break
    return own


def _refuse_difference(apart: Mapping[str, float], own: Mapping[str, float], allowed: float, shown: str) -> None:
    """Refuse answers that differ, unless the present plan differs from itself as much: then nothing can be compared.

    Args:
        apart: how far each output of the new plan is from that of the present one, relative to its scale.
        own: the same between runs of the present plan.
        allowed: how far rounding moves outputs.
        shown: the shapes of the request, for the message.

    Raises:
        AnswersDiffer: names an output.
    """
    for name, far in apart.items():
        if not far <= allowed and own.get(name, 0.0) <= allowed:
            raise AnswersDiffer(
                f"the answers differ: output {name!r} of the new plan is {far:.2g} of its scale away from that of the "
                f"present one, and rounding explains {allowed:.2g} (request of {shown})"
            )


def _scores(running: RunningPlan, stopped: Callable[[], bool]) -> Array:
    """The scores of the token that follows a short prompt; a second token is computed too, to warm the nodes up."""
    decoder, limits = running.plan.decoder, running.coordinator.limits
    assert decoder is not None
    assert limits is not None
    length = max(1, min(_PROMPT, limits.length - 2))
    prompt = [token % (decoder.tokens_below or decoder.vocabulary) for token in range(1, length + 1)]
    generation = running.generator(
        prompt, max_tokens=min(2, limits.length - length), stop_tokens=(), scores=True, timeout=_TEXT_WAIT_S
    )
    while True:
        try:
            scores = generation.result(_LOOK_S).scores
        except TimeoutError:
            if generation.done:
                raise
            if stopped():
                generation.cancel()
                raise PipelineError("the pipeline is closing") from None
        else:
            assert scores, "they were asked for"
            return scores[0]


def _answer(running: RunningPlan, sample: Sample, stopped: Callable[[], bool]) -> dict[str, Array] | StageFailed:
    """The outputs of a request, or why it cannot be executed."""
    deadline_ns = time.monotonic_ns() + int(_WAIT_S * 1e9)
    future = running.entrance.submit(dict(sample.inputs), sample.outputs, deadline_ns, block=True)
    while True:
        try:
            return future.result(_LOOK_S)
        except StageFailed as error:
            return error
        except TimeoutError:
            if future.done():
                raise
            if stopped():
                future.cancel()
                raise PipelineError("the pipeline is closing") from None
