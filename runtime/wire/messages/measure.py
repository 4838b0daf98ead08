"""Messages between a measuring agent and the process that asks it."""

from __future__ import annotations

from typing import Annotated

import msgspec

from runtime.wire.messages.base import Amount, Message, Nanoseconds
from runtime.wire.messages.control import Trust


class Ping(Message, tag="ping", frozen=True):
    """Request for an immediate :class:`Pong`. A frame of bytes may follow, to measure the bandwidth."""

    number: Amount


class Pong(Message, tag="pong", frozen=True):
    """Answer to :class:`Ping` or :class:`~runtime.wire.messages.control.Trust`."""

    number: Amount


class MeasureLink(Message, tag="measure-link", frozen=True):
    """Request to measure the link to another agent.

    Attributes:
        address: the other agent's address.
        key: its public key; empty where links are not encrypted.
    """

    address: str
    key: str


class LinkFigures(Message, tag="link-figures", frozen=True):
    """A link as measured.

    Attributes:
        round_trip_ns: round-trip time of an empty message.
        message_ns: time between two empty messages when many are sent at once.
        bytes_per_s: bandwidth, measured with large messages.
    """

    round_trip_ns: Nanoseconds
    message_ns: Nanoseconds
    bytes_per_s: Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]


class FilePiece(Message, tag="put", frozen=True):
    """A piece of a file to be stored by the agent; its bytes are in the frame that follows.

    Attributes:
        name: name of the file, without a path.
        offset: of the piece; 0 creates the file anew.
    """

    name: str
    offset: Amount


class FileStored(Message, tag="taken", frozen=True):
    """Answer to :class:`FilePiece`: the file's present size."""

    name: str
    size_bytes: Amount


class MeasureModel(Message, tag="measure-model", frozen=True):
    """Request to time a model.

    Attributes:
        model: name of the model file, which was sent before.
        inputs: name of the ``.npz`` with its inputs, which was sent before.
        provider: the execution provider.
        threads: threads of the session.
    """

    model: str
    inputs: str
    provider: str
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)]


class ModelTime(Message, tag="model-time", frozen=True):
    """Time that a run of the model takes; 0 where the provider is not available."""

    time_ns: Nanoseconds


class CannotMeasure(Message, tag="cannot", frozen=True):
    """The agent cannot do what it was asked, for this reason."""

    reason: str


AgentRequest = Ping | Trust | MeasureLink | FilePiece | MeasureModel
AgentAnswer = Pong | LinkFigures | FileStored | ModelTime | CannotMeasure
