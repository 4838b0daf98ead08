"""A whole pipeline in memory, for tests and simulations. Pure: no process, no socket, no clock.

The state machines of the coordinator and of the nodes are those of real pipelines, and so is the dispatcher of the
coordinator's effects (:mod:`runtime.coordinator.interpreter`). Processes, links, tensors and time are simulated. A
tensor is a nested tuple that records how it was computed, down to the request and the attempt, so
:meth:`SimulatedPipeline.check` can tell whether an answer is right.

There are two ways to use it:

- **By hand** (``delay_ns=None``): messages wait in their links until :meth:`~SimulatedPipeline.deliver` is called, and
  nodes work when :meth:`~SimulatedPipeline.work` is called. A test, or hypothesis, thus chooses the order of events.
  :meth:`~SimulatedPipeline.settle` runs until everything has ended.
- **In simulated time** (``delay_ns`` is a number): messages arrive after the delay, nodes work by themselves, and
  :meth:`~SimulatedPipeline.step` goes to the next event. Subclasses can define how long nodes run and how replicas are
  chosen.

Either way a test can kill processes, stop and wake them, part and mend links, and lose messages::

    pipeline = SimulatedPipeline(plan, (1, 2), random.Random(0))
    pipeline.settle()                   # all nodes are ready
    pipeline.submit(("y",))
    pipeline.kill(1)                    # a process dies,
    pipeline.notice(1)                  # and the coordinator notices
    pipeline.settle()                   # another takes its place; the request is answered
    pipeline.check()
"""

from __future__ import annotations

from runtime.testing.network import SECOND, SimulatedLink
from runtime.testing.node import COORDINATOR, SimulatedNode, Tensor
from runtime.testing.pipeline import NEVER_FAILS, SimulatedPipeline

__all__ = ["COORDINATOR", "NEVER_FAILS", "SECOND", "SimulatedLink", "SimulatedNode", "SimulatedPipeline", "Tensor"]
