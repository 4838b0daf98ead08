"""The errors of the runtime. They extend the tree of :mod:`onnxsplit.errors`.

    OnnxsplitError
    └── PipelineError
        ├── LaunchFailed
        ├── RecutRefused
        ├── RecutFailed
        ├── Busy
        ├── DeadlineExceeded        also a TimeoutError
        ├── Cancelled
        ├── StageFailed
        ├── NotSeparable
        ├── NodeFailed
        ├── StageUnavailable
        ├── PipelineClosed
        └── ProtocolError           never reaches the caller of a request
            └── MemoryWithdrawn

Arguments that are wrong raise :class:`~onnxsplit.errors.InputError` instead.
"""

from __future__ import annotations

from onnxsplit.errors import OnnxsplitError


class PipelineError(OnnxsplitError):
    """Base of all errors of a running plan.

    Raised directly for conditions without a class of their own, such as an address that is in use, a peer that does not
    answer, or a process that has no file descriptors left.
    """


class LaunchFailed(PipelineError):
    """Raised when a pipeline starts: a node did not start, did not report in time, or refused its stage."""


class RecutRefused(PipelineError):
    """Raised when a pipeline cannot change to another plan, before anything was begun; says what to do."""


class RecutFailed(PipelineError):
    """Raised when a change to another plan was given up; says why. The pipeline serves on with the plan it had."""


class Busy(PipelineError):
    """Raised by ``submit`` with ``block=False``: the pipeline has as many requests as it admits. Try again later."""


class DeadlineExceeded(PipelineError, TimeoutError):
    """Raised by a request whose timeout has passed; names the stages that it was waiting for."""


class StageFailed(PipelineError):
    """Raised by a request that a stage cannot execute, with ONNX Runtime's message. Other requests are not affected."""


class NotSeparable(PipelineError):
    """Raised by a request that ran in micro-batches whose outputs cannot be joined, because its rows are dependent."""


class NodeFailed(PipelineError):
    """Raised by a request that has killed every node that tried it.

    Names the stage, the node, its exit code or signal, and its log. The request is not repeated.
    """


class StageUnavailable(PipelineError):
    """Raised by a request that needs a stage whose nodes keep failing.

    Says why they fail, and when they are started again. Try again then.
    """


class Cancelled(PipelineError):
    """Raised by a request that the caller has cancelled."""


class PipelineClosed(PipelineError):
    """Raised by a request when the pipeline closes before it is answered, and by ``submit`` after that."""


class ProtocolError(PipelineError):
    """Raised when a peer sends a message that violates the protocol. The message is logged and dropped."""


class MemoryWithdrawn(ProtocolError):
    """Raised when a message refers to shared memory that is not, or no longer, mapped. The request is repeated."""
