"""The errors of the online half, an extension of ``onnxsplit.errors``.

OnnxsplitError
└── PipelineError
    ├── LaunchFailed       the pipeline did not come up
    ├── Busy               no room for another request, and the caller would not wait
    ├── DeadlineExceeded   the request's time ran out (also a TimeoutError)
    ├── Cancelled          the caller gave the request up
    ├── StageFailed        a stage could not execute this request; others are not affected
    ├── NotSeparable       the answers to the parts of a batch do not fit each other
    ├── NodeFailed         the request killed every node that tried it; names stage, node, exit code or signal, log
    ├── StageUnavailable   the nodes of a stage keep failing; tells why, and when they are tried again
    ├── PipelineClosed     the pipeline was closed
    └── ProtocolError      a peer said something that is not of the protocol
        └── MemoryWithdrawn    a message names memory that is not, or no longer, mapped here
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


class NotSeparable(PipelineError):
    """A batch ran in parts, and their outputs cannot be joined: the model's rows are not independent."""


class NodeFailed(PipelineError):
    """Nodes died while they executed this request, as often as it was tried; it is not tried again."""


class StageUnavailable(PipelineError):
    """The nodes of a stage that the request needs keep failing; they are left alone for a while. Try again then."""


class Cancelled(PipelineError):
    """The caller gave the request up."""


class PipelineClosed(PipelineError):
    """The pipeline was closed before the request was answered, or before it was made."""


class ProtocolError(PipelineError):
    """A peer sent something that is not of the protocol; it is dropped."""


class MemoryWithdrawn(ProtocolError):
    """A message names memory that is not, or no longer, mapped here; another attempt at the request follows."""
