"""What the gateway refuses, and what each error of the system is to a client.

OnnxsplitError
└── GatewayError
    ├── UnknownModel     no such model or version here
    ├── UnknownRegion    no such shared memory
    ├── NotLoaded        it is known, but not loaded, or the server stops
    ├── Unauthorized     no token, or not one of ours
    ├── Forbidden        not from there
    ├── TooLarge         a request is larger than allowed
    ├── TooSlow          a request did not arrive in time
    └── Unsupported      an endpoint of the protocol that this server does not have
"""

from __future__ import annotations

import traceback
from typing import NamedTuple

from onnxsplit.errors import InputError, OnnxsplitError
from runtime.errors import Busy, Cancelled, DeadlineExceeded, PipelineClosed, StageUnavailable


class GatewayError(OnnxsplitError):
    """Base of what the gateway itself refuses."""


class UnknownModel(GatewayError):
    """The model, or the version, is not one of this server's. HTTP 404, gRPC NOT_FOUND."""


class UnknownRegion(GatewayError):
    """No region of this name, or no such shared memory. HTTP 404, gRPC NOT_FOUND."""


class NotLoaded(GatewayError):
    """The model is known but takes no requests now. HTTP 503, gRPC UNAVAILABLE."""


class Unauthorized(GatewayError):
    """A token is needed, and none of ours came. HTTP 401, gRPC UNAUTHENTICATED."""


class Forbidden(GatewayError):
    """This is not served to whoever asks from there. HTTP 403, gRPC PERMISSION_DENIED."""


class TooLarge(GatewayError):
    """More bytes than allowed. HTTP 413, gRPC RESOURCE_EXHAUSTED."""


class TooSlow(GatewayError):
    """The client did not send its request in time. HTTP 408, gRPC DEADLINE_EXCEEDED."""


class Unsupported(GatewayError):
    """The protocol has it, this server has not. HTTP 501, gRPC UNIMPLEMENTED."""


def words(error: BaseException, most: int = 2000) -> str:
    """What a client is told of an error: of a bounded length, since what a client sent may be in it."""
    text = str(error) if isinstance(error, OnnxsplitError) else f"an error in the server: {type(error).__name__}"
    return text if len(text) <= most else f"{text[:most]} ... ({len(text)} characters)"


def forget_frames(error: BaseException) -> None:
    """Let an error hold nothing of the request it ended: in its traceback are all that was at hand, and in cycles."""
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found = found.__cause__ or found.__context__


class Status(NamedTuple):
    """What an error is to a client: HTTP's status, and the name of gRPC's."""

    http: int
    grpc: str


_STATUS: tuple[tuple[type[BaseException], Status], ...] = (
    (InputError, Status(400, "INVALID_ARGUMENT")),
    (UnknownModel, Status(404, "NOT_FOUND")),
    (UnknownRegion, Status(404, "NOT_FOUND")),
    (NotLoaded, Status(503, "UNAVAILABLE")),
    (Unauthorized, Status(401, "UNAUTHENTICATED")),
    (Forbidden, Status(403, "PERMISSION_DENIED")),
    (TooLarge, Status(413, "RESOURCE_EXHAUSTED")),
    (TooSlow, Status(408, "DEADLINE_EXCEEDED")),
    (Unsupported, Status(501, "UNIMPLEMENTED")),
    (Busy, Status(503, "UNAVAILABLE")),
    (StageUnavailable, Status(503, "UNAVAILABLE")),
    (PipelineClosed, Status(503, "UNAVAILABLE")),
    (DeadlineExceeded, Status(504, "DEADLINE_EXCEEDED")),
    (Cancelled, Status(499, "CANCELLED")),
)


def status_of(error: BaseException) -> Status:
    """What a client is told; what is not listed, a stage that failed among it, is 500 and INTERNAL."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), Status(500, "INTERNAL"))
