"""A node whose runs of stage 1 take as long as the benchmark says; see policies.py."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from runtime.node import serve
from runtime.node.stage_runner import StageRunner


def main() -> int:
    """Patch the session's run, then start a node."""
    stage = int(sys.argv[sys.argv.index("--stage") + 1])
    replica = int(sys.argv[sys.argv.index("--replica") + 1])
    case, row_ms = json.loads(os.environ["SLEEPING"])
    execute, bound = StageRunner.run, StageRunner.bound

    def factor() -> float:
        if case == "slow":
            return 10.0 if replica == 0 else 1.0
        if case == "transient":
            return 5.0 if int(time.monotonic() / 0.5) % 9 == 3 * replica else 1.0
        return 1.0

    def sleep(inputs: Any) -> None:
        rows = next(iter(inputs.values())).shape[0]
        time.sleep(row_ms * rows * factor() / 1e3)

    def run(self: Any, inputs: Any, into: Any) -> Any:
        sleep(inputs)
        return execute(self, inputs, into)

    def sleeping_bound(self: Any, inputs: Any, into: Any) -> Any:
        once = bound(self, inputs, into)

        def run() -> None:
            sleep(inputs)
            once()

        return run

    if stage == 1:
        StageRunner.run, StageRunner.bound = run, sleeping_bound
    return serve.main()


if __name__ == "__main__":
    sys.exit(main())
