"""What a measuring agent is asked, and answers."""

from __future__ import annotations

from typing import Annotated

import msgspec

from runtime.wire.messages.base import Amount, Message, Nanoseconds
from runtime.wire.messages.control import Trust


class Ping(Message, tag="ping", frozen=True):
    """Answer at once. Bytes may follow, to see how fast they come."""

    number: Amount


class Pong(Message, tag="pong", frozen=True):
    """The answer."""

    number: Amount


class MeasureLink(Message, tag="measure-link", frozen=True):
    """Measure the link to another agent at an address; its public key, where links are encrypted."""

    address: str
    key: str


class LinkFigures(Message, tag="link-figures", frozen=True):
    """A link as measured.

    Attributes:
        round_trip_ns: of a message of next to nothing.
        message_ns: between two such messages of many at once.
        bytes_per_s: of large ones.
    """

    round_trip_ns: Nanoseconds
    message_ns: Nanoseconds
    bytes_per_s: Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]


class FilePiece(Message, tag="put", frozen=True):
    """A piece of a file, which follows; ``name`` is a plain one. The first piece begins the file anew."""

    name: str
    offset: Amount


class FileStored(Message, tag="taken", frozen=True):
    """The file has so many bytes now."""

    name: str
    size_bytes: Amount


class MeasureModel(Message, tag="measure-model", frozen=True):
    """Time a model that was put here, on inputs that were."""

    model: str
    inputs: str
    provider: str
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)]


class ModelTime(Message, tag="model-time", frozen=True):
    """It takes so long; 0 where the provider is not to be had."""

    time_ns: Nanoseconds


class CannotMeasure(Message, tag="cannot", frozen=True):
    """What was asked cannot be done."""

    reason: str


AgentRequest = Ping | Trust | MeasureLink | FilePiece | MeasureModel


AgentAnswer = Pong | LinkFigures | FileStored | ModelTime | CannotMeasure
