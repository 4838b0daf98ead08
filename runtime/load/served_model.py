"""What a server says of a model by the Open Inference Protocol: its inputs, and how long its parts took.

The same documents come over HTTP as JSON and over gRPC as messages, which are turned into the same JSON. Servers differ
in which fields they send, so every field but a name may be absent; fields of other types are refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from onnxsplit.errors import InputError
from onnxsplit.plan_base import PlanStruct
from runtime.errors import PipelineError
from runtime.gateway.protocol.documents import TensorMetadata

_Document = TypeVar("_Document", bound=Struct)

ANSWERS_IN_S = 10.0
"""Seconds in which a server must answer a question about a model."""


class ServedModel(PlanStruct, frozen=True, kw_only=True):
    """A model of a server.

    Attributes:
        name: its name.
        inputs: the inputs that a request must bring.
        batched: whether the first axis of each input is the batch, as Triton's ``max_batch_size`` says.
        stages: the models of its stages where it is an ensemble, in their order.
    """

    name: str
    inputs: tuple[TensorMetadata, ...]
    batched: bool
    stages: tuple[str, ...]


class Spent(PlanStruct, frozen=True, kw_only=True):
    """How many requests a model or a stage has answered, and for how long they waited and ran in it; or a difference.

    Attributes:
        name: the model's or the stage's name.
        count: number of answered requests.
        queue_ns: sum of the times that they waited.
        compute_ns: sum of the times that they ran, decoding and encoding included.
        total_ns: sum of the times from their arrival until their answers.
        failed: number of failed requests.
    """

    name: str
    count: int
    queue_ns: int
    compute_ns: int
    total_ns: int
    failed: int

    def since(self, before: Spent) -> Spent:
        """What was added since an earlier state."""
        return Spent(
            name=self.name,
            count=self.count - before.count,
            queue_ns=self.queue_ns - before.queue_ns,
            compute_ns=self.compute_ns - before.compute_ns,
            total_ns=self.total_ns - before.total_ns,
            failed=self.failed - before.failed,
        )


class _Input(Struct, frozen=True):
    name: str = ""
    optional: bool = False


class _Step(Struct, frozen=True):
    model_name: str


class _Ensemble(Struct, frozen=True):
    step: tuple[_Step, ...] = ()


class _Config(Struct, frozen=True):
    """The fields of a model's configuration that a load needs."""

    max_batch_size: int = 0
    input: tuple[_Input, ...] = ()
    ensemble_scheduling: _Ensemble | None = None


class _Metadata(Struct, frozen=True):
    inputs: tuple[TensorMetadata, ...] = ()


class _Duration(Struct, frozen=True):
    count: int = 0
    ns: int = 0


class _Durations(Struct, frozen=True):
    success: _Duration | None = None
    fail: _Duration | None = None
    queue: _Duration | None = None
    compute_input: _Duration | None = None
    compute_infer: _Duration | None = None
    compute_output: _Duration | None = None


class _Version(Struct, frozen=True):
    inference_stats: _Durations | None = None


class _Statistics(Struct, frozen=True):
    model_stats: tuple[_Version, ...] = ()


class ModelServer(ABC):
    """Asks a server about its models."""

    @abstractmethod
    def models(self) -> list[str]:
        """The names of the models that are ready; empty where the server does not tell.

        Raises:
            PipelineError: the server does not answer.
        """

    @abstractmethod
    def metadata(self, model: str) -> dict[str, Any]:
        """The metadata of a model.

        Raises:
            InputError: there is no such model.
            PipelineError: the server does not answer.
        """

    @abstractmethod
    def config(self, model: str) -> dict[str, Any]:
        """The configuration of a model; empty where the server has none."""

    @abstractmethod
    def statistics(self, model: str) -> dict[str, Any]:
        """The statistics of a model or stage; empty where the server has none."""


def choose_model(server: ModelServer, url: str, name: str | None) -> ServedModel:
    """The model of a server to send requests to: the one that is named, or the only one.

    Raises:
        InputError: there is no such model, or there are several and none is named.
        PipelineError: the server does not answer.
    """
    found = server.models()
    if name is None:
        if len(found) != 1:
            listed = f"it has {', '.join(sorted(found))}" if found else "it does not list its models"
            raise InputError(f"name the model of {url} with --model; {listed}")
        name = found[0]
    try:
        metadata = server.metadata(name)
    except InputError as error:
        listed = f" It has {', '.join(sorted(found))}; name one of them with --model." if found else ""
        raise InputError(f"{error}.{listed}") from error
    described = _read(metadata, _Metadata, url, name)
    config = _read(server.config(name), _Config, url, name)
    steps = tuple(step.model_name for step in config.ensemble_scheduling.step) if config.ensemble_scheduling else ()
    optional = {entry.name for entry in config.input if entry.optional}
    inputs = described.inputs
    if not inputs:
        raise InputError(f"{url} names no inputs of {name!r}, so no request can be made for it")
    needed = tuple(spec for spec in inputs if spec.name not in optional)
    return ServedModel(name=name, inputs=needed, batched=config.max_batch_size > 0, stages=steps)


def spent(server: ModelServer, model: ServedModel) -> list[Spent]:
    """What a model and each of its stages have done so far; fewer or none where the server does not tell."""
    found = []
    for name in (model.name, *model.stages):
        stats = _read(server.statistics(name), _Statistics, "the server", name)
        versions = [version.inference_stats for version in stats.model_stats if version.inference_stats]
        if versions:
            success = [version.success or _Duration() for version in versions]
            computed = [(one.compute_input, one.compute_infer, one.compute_output) for one in versions]
            found.append(
                Spent(
                    name=name,
                    count=sum(part.count for part in success),
                    queue_ns=sum(version.queue.ns for version in versions if version.queue),
                    compute_ns=sum(part.ns for parts in computed for part in parts if part),
                    total_ns=sum(part.ns for part in success),
                    failed=sum(version.fail.count for version in versions if version.fail),
                )
            )
    return found


def _read(document: Any, kind: type[_Document], url: str, model: str) -> _Document:
    """The fields of a document that are needed.

    Raises:
        PipelineError: one of them is of another type than the protocol says.
    """
    try:
        return msgspec.convert(document, kind, strict=False)
    except msgspec.ValidationError as error:
        raise PipelineError(
            f"{url} describes the model {model!r} in a way that is not of the protocol: {error}"
        ) from None
