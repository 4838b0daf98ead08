"""The protocol's JSON documents, apart from inference requests and responses. Pure.

HTTP sends them as they are, and gRPC as messages with the same fields.

The OpenAPI description is generated from these types, so clients read their docstrings.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

from msgspec import Meta, Struct

from runtime.gateway.protocol.inference import DATATYPES

Json = dict[str, Any]
"""A JSON object whose fields no type describes."""


def described(**schema: Any) -> Meta:
    """Constraints that a field's OpenAPI schema states. They are not checked when the field is decoded."""
    return Meta(extra_json_schema=schema)


Datatype = Annotated[str, described(enum=list(DATATYPES.values()))]
"""A datatype's name; a decoded request may hold any text."""


class VersionState(Enum):
    """The state of a version of a model."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


class ErrorMessage(Struct, frozen=True):
    """Why a request failed."""

    error: str


class ServerMetadata(Struct, frozen=True):
    """The server's name and version, and the protocol extensions that it has."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(Struct, frozen=True):
    """An input or output of a model. In a shape, -1 stands for a size that may vary."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(Struct, frozen=True):
    """The loaded versions of a model, its inputs and its outputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


@dataclass
class Duration:
    """How often something took place, and its total time in nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Add ``count`` occurrences that took ``ns`` together."""
        self.count += count
        self.ns += ns


class InferenceStatistics(Struct, frozen=True, kw_only=True):
    """How many requests took how long, by outcome and by part of the work. Times are in nanoseconds."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class BatchStatistics(Struct, frozen=True, kw_only=True):
    """How many executions had this batch size, and how long they took."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStatistics(Struct, frozen=True):
    """Statistics of one version of a model, or of one stage. The last inference is in milliseconds since the epoch."""

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferenceStatistics
    batch_stats: list[BatchStatistics]


class Statistics(Struct, frozen=True):
    """Statistics of the models and stages that were asked for."""

    model_stats: list[ModelStatistics]


class IndexRequest(Struct, frozen=True):
    """Which versions the repository index lists: all, or only those that are ready."""

    ready: bool = False


class IndexEntry(Struct, frozen=True):
    """A version in the repository, its state, and why it is not ready."""

    name: str
    version: str
    state: VersionState
    reason: str


class ChangeRequest(Struct, frozen=True):
    """A request to load or to unload a model. Loading takes no parameters."""

    parameters: Any = {}


class RegisterRequest(Struct, frozen=True):
    """A region of system shared memory: the object's name, as shm_open takes it, and a range of bytes in it."""

    key: Annotated[str, described(pattern="^/?[^/.]{1,200}$")]
    byte_size: Annotated[int, described(minimum=1)]
    offset: Annotated[int, described(minimum=0)] = 0


class GenerateRequest(Struct, frozen=True):
    """A prompt, and how it is continued: the fields of a completion of OpenAI's API, here or beside the prompt."""

    text_input: str
    parameters: Json | None = None


class GenerateAnswer(Struct, frozen=True):
    """A text, or a part of it."""

    model_name: str
    model_version: str
    text_output: str


class RegionStatus(Struct, frozen=True):
    """A region of system shared memory that is registered."""

    name: str
    key: str
    offset: int
    byte_size: int
