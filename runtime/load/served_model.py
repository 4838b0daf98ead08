"""What a server says of a model by the Open Inference Protocol: its inputs, and how long its parts took.

The same documents come over HTTP as JSON and over gRPC as messages, which are turned into the same JSON. Servers differ
in which fields they send, so every field but a name may be absent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import msgspec

from onnxsplit.errors import InputError
from onnxsplit.plan_base import PlanStruct
from runtime.errors import PipelineError
from runtime.gateway.protocol.documents import TensorMetadata

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
    config = server.config(name)
    optional = {entry.get("name") for entry in config.get("input", ()) if entry.get("optional")}
    try:
        inputs = msgspec.convert(metadata.get("inputs", []), tuple[TensorMetadata, ...], strict=False)
        steps = tuple(str(step["model_name"]) for step in config.get("ensemble_scheduling", {}).get("step", ()))
        batched = int(config.get("max_batch_size", 0)) > 0
    except (msgspec.ValidationError, KeyError, TypeError, ValueError) as error:
        raise PipelineError(
            f"{url} describes the model {name!r} in a way that is not of the protocol: {error}"
        ) from None
    if not inputs:
        raise InputError(f"{url} names no inputs of {name!r}, so no request can be made for it")
    needed = tuple(spec for spec in inputs if spec.name not in optional)
    return ServedModel(name=name, inputs=needed, batched=batched, stages=steps)


def spent(server: ModelServer, model: ServedModel) -> list[Spent]:
    """What a model and each of its stages have done so far; fewer or none where the server does not tell."""
    found = []
    for name in (model.name, *model.stages):
        stats = server.statistics(name).get("model_stats") or [{}]
        versions = [one.get("inference_stats") or {} for one in stats]
        if any(versions):
            found.append(
                Spent(
                    name=name,
                    count=_sum(versions, "count", "success"),
                    queue_ns=_sum(versions, "ns", "queue"),
                    compute_ns=_sum(versions, "ns", "compute_input", "compute_infer", "compute_output"),
                    total_ns=_sum(versions, "ns", "success"),
                    failed=_sum(versions, "count", "fail"),
                )
            )
    return found


def _sum(versions: list[dict[str, Any]], field: str, *parts: str) -> int:
    return sum(int((version.get(part) or {}).get(field) or 0) for version in versions for part in parts)
