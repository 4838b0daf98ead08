"""The errors of the gateway, and the HTTP status and gRPC code of every error that a client can see.

OnnxsplitError
├── GatewayError
│   ├── UnknownModel      404  NOT_FOUND            no such model or version
│   ├── UnknownRegion     404  NOT_FOUND            no such region of shared memory
│   ├── NotLoaded         503  UNAVAILABLE          the model takes no requests now
│   ├── Unauthorized      401  UNAUTHENTICATED      no valid token
│   ├── Forbidden         403  PERMISSION_DENIED    not allowed from there
│   ├── TooLarge          413  RESOURCE_EXHAUSTED   more bytes than allowed
│   ├── TooSlow           408  DEADLINE_EXCEEDED    the request did not arrive in time
│   └── Unsupported       501  UNIMPLEMENTED        part of the protocol that this server lacks
├── MissingDependency     501  UNIMPLEMENTED        the server lacks a package that the request needs
├── InputError            400  INVALID_ARGUMENT     the request does not fit the protocol or the model
└── PipelineError         500  INTERNAL             a stage or node failed
├── RecutRefused                                409  FAILED_PRECONDITION
├── Busy, StageUnavailable, PipelineClosed      503  UNAVAILABLE
├── DeadlineExceeded                            504  DEADLINE_EXCEEDED
└── Cancelled                                   499  CANCELLED
"""

from __future__ import annotations

import traceback
from typing import NamedTuple

from onnxsplit.errors import InputError, MissingDependency, OnnxsplitError
from runtime.errors import Busy, Cancelled, DeadlineExceeded, PipelineClosed, RecutRefused, StageUnavailable


class GatewayError(OnnxsplitError):
    """The base class of errors that the gateway itself raises. The client sees the status of the subclass."""


class UnknownModel(GatewayError):
    """This server does not have the model, or not this version of it. HTTP 404, gRPC NOT_FOUND."""


class UnknownRegion(GatewayError):
    """No region is registered under this name, or its shared memory does not exist. HTTP 404, gRPC NOT_FOUND."""


class NotLoaded(GatewayError):
    """The model takes no requests now: it is not loaded, or the server is stopping. HTTP 503, gRPC UNAVAILABLE."""


class Unauthorized(GatewayError):
    """The server asks for a token, and the client sent none that is valid. HTTP 401, gRPC UNAUTHENTICATED."""


class Forbidden(GatewayError):
    """The request comes from a web site or host that may not send it. HTTP 403, gRPC PERMISSION_DENIED."""


class TooLarge(GatewayError):
    """The request has more bytes than allowed. HTTP 413, gRPC RESOURCE_EXHAUSTED."""


class TooSlow(GatewayError):
    """The client did not send the whole request in time. HTTP 408, gRPC DEADLINE_EXCEEDED."""


class Unsupported(GatewayError):
    """The protocol has this call, but the server does not. HTTP 501, gRPC UNIMPLEMENTED."""


def client_message(error: BaseException, most: int = 2000) -> str:
    """The error message for a client: at most ``most`` characters, because it may contain the client's own input."""
    text = str(error) if isinstance(error, OnnxsplitError) else f"an error in the server: {type(error).__name__}"
    return text if len(text) <= most else f"{text[:most]} ... ({len(text)} characters)"


def clear_frames(error: BaseException) -> None:
    """Remove the request's data from an error: its traceback holds all local variables, often in reference cycles."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


class Status(NamedTuple):
    """The HTTP status of an error, and the name of its gRPC code."""

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
    (MissingDependency, Status(501, "UNIMPLEMENTED")),
    (RecutRefused, Status(409, "FAILED_PRECONDITION")),
    (Busy, Status(503, "UNAVAILABLE")),
    (StageUnavailable, Status(503, "UNAVAILABLE")),
    (PipelineClosed, Status(503, "UNAVAILABLE")),
    (DeadlineExceeded, Status(504, "DEADLINE_EXCEEDED")),
    (Cancelled, Status(499, "CANCELLED")),
)


def status_of(error: BaseException) -> Status:
    """The status of an error. Errors without a row in the table, such as a failed stage, are 500 and INTERNAL."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), Status(500, "INTERNAL"))
