"""The errors of the online half, an extension of ``onnxsplit.errors``.

OnnxsplitError
└── PipelineError
    ├── LaunchFailed       the pipeline did not come up
    ├── Busy               no room for another request, and the caller would not wait
    ├── DeadlineExceeded   the request's time ran out (also a TimeoutError)
    ├── StageFailed        a stage could not execute this request; others are not affected
    ├── NodeFailed         a node died; names stage, node, exit code or signal, log
    ├── PipelineClosed     the pipeline was closed
    └── ProtocolError      a peer said something that is not of the protocol
"""

from __future__ import annotations

from onnxsplit.errors import OnnxsplitError


class PipelineError(OnnxsplitError):
    """Base of what can go wrong while a plan runs."""


class LaunchFailed(PipelineError):
    """The pipeline did not come up: a node did not start, did not report in time, or refused its stage."""


class Busy(PipelineError):
    """As many requests are in flight as the pipeline admits; the caller asked not to wait. Try again."""


class DeadlineExceeded(PipelineError, TimeoutError):
    """The request's timeout ran out; names the stages it was waiting for."""


class StageFailed(PipelineError):
    """A stage could not execute this request; carries ONNX Runtime's words. Other requests are not affected."""


class NodeFailed(PipelineError):
    """A node died. Every request in the pipeline fails with it."""


class PipelineClosed(PipelineError):
    """The pipeline was closed before the request was answered, or before it was made."""


class ProtocolError(PipelineError):
    """A peer sent something that is not of the protocol; it is dropped."""
