"""A node whose session sleeps before it runs: a stage that computes elsewhere, as on an accelerator."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

import runtime.node.executor
import runtime.node.options
import runtime.node.serve
from onnxsplit.tensors import Array
from runtime.node.stage_runner import StageRunner

CONNECT, STAGE, SECONDS = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])


class SleepingRunner(StageRunner):
    """A stage runner that sleeps for a given time before each run."""

    def run(self, inputs: Mapping[str, Array], into: Mapping[str, Array]) -> dict[str, Array]:
        """Sleep, then run."""
        time.sleep(SECONDS)
        return super().run(inputs, into)

    def bound(self, inputs: Mapping[str, Array], into: Mapping[str, Array]) -> Callable[[], None]:
        """A run that sleeps first."""
        run = super().bound(inputs, into)

        def sleep_and_run() -> None:
            time.sleep(SECONDS)
            run()

        return sleep_and_run


runtime.node.executor.StageRunner = SleepingRunner
sys.exit(runtime.node.serve.serve(runtime.node.options.NodeOptions(connect=CONNECT, stage=STAGE, threads=1)))
